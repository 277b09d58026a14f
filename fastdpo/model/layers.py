"""The layers of a model one by one: recomputed in the backward, or compiled."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ConfigError
from .attention import NAME
from .head import base_causal_lm
from .offload import Offloader, Transfer


def layers_of(base: nn.Module) -> list[Any]:
    """The layers of a transformers model, in order; empty where it does not mark them."""
    return [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]


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
    layers = layers_of(base)
    if not layers and (every > 1 or offload):
        key = "gradient_checkpointing_every" if every > 1 else "activation_offloading"
        raise ConfigError(f"{key}: {name} recomputes its layers in a way of its own; leave it out")
    with warnings.catch_warnings():  # transformers 5.24 calls it otherwise, 5.17 does not know how
        warnings.simplefilter("ignore", FutureWarning)
        base.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    if offload is not None:
        offloader = Offloader(offload)
        for layer in layers:
            layer._gradient_checkpointing_func = offloader


def compile_layers(model: nn.Module) -> int:
    """Compile the layers of `model`, which may be a PeftModel; returns how many there are.

    Each layer is compiled by itself, and as all of them run the same code, that is one compilation
    for the model; lengths are symbolic, so rows of other lengths need no further one. Attention
    over packed rows stays out of the graphs: it reads the row's segments, Python objects that
    change with each row. Call it after `choose_layout`, adapters and checkpointing.

    Raises:
        ConfigError: the architecture does not say which modules its layers are.
    """
    base = base_causal_lm(model)
    layers = layers_of(base)
    if not layers:
        raise ConfigError(f"torch_compile: the layers of {type(base).__name__} are not known")
    AttentionInterface.register(NAME, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[NAME]))
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
