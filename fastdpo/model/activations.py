"""Gradient checkpointing: which layers are recomputed, and where their inputs are kept meanwhile.

`tiles` does the same within a layer.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ConfigError
from .head import base_causal_lm
from .offload import Offloader, Transfer


def recompute_layers(model: nn.Module, *, every: int = 1, offload: Transfer | None = None) -> None:
    """Checkpoint every `every`-th layer of `model`, which may be a PeftModel, without re-entrance.

    Args:
        model: in training mode its layers are recomputed in the backward.
        every: 1 for all layers, n for the first of each n.
        offload: what copies the layers' inputs to the host and back; None keeps them.

    Raises:
        ConfigError: the architecture cannot do that.
    """
    base = base_causal_lm(model)
    name = type(base).__name__
    if not base.supports_gradient_checkpointing:
        raise ConfigError(f"gradient_checkpointing: {name} has no support for it; set it to false")
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers and (every > 1 or offload):
        key = "gradient_checkpointing_every" if every > 1 else "activation_offloading"
        raise ConfigError(f"{key}: {name} recomputes its layers in a way of its own; leave it out")
    base.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    if offload is not None:
        offloader: Any = Offloader(offload)
        for layer in layers:
            layer._gradient_checkpointing_func = offloader
