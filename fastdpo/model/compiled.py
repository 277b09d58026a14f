"""torch.compile for the layers of a model whose rows differ in length.

Each layer is compiled by itself, and as all of them run the same code, that is one compilation for
the model; lengths are symbolic, so rows of other lengths need no further one. Attention over packed
rows stays out of the graphs: it reads the row's segments, Python objects that change with each row.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ConfigError
from .attention import NAME
from .head import base_causal_lm


def compile_layers(model: nn.Module) -> int:
    """Compile the layers of `model`, which may be a PeftModel; returns how many there are.

    Call it after `choose_layout`, adapters and checkpointing. Raises ConfigError where the
    architecture does not say which modules its layers are.
    """
    base = base_causal_lm(model)
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"torch_compile: the layers of {type(base).__name__} are not known")
    AttentionInterface.register(NAME, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[NAME]))
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
