"""A model of which one rank reads the weights: the others have its shape alone, on torch's meta
device, and take their shares from that rank tensor by tensor. So a host holds a large model once
while it is loaded, and no device ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..config import TrainConfig
from .dropout import switch_off
from .load import load_model_config
from .place import find_model


def takes_skeletons(config: TrainConfig, path: str | None) -> bool:
    """Whether the model at `path` (default: the policy's) can be had without its weights: an
    adapter on disk, and tiles, which are tried out on a layer, need those.
    """
    return not (find_model(config, path).adapter or config.layer_tile_tokens)


def load_skeleton(config: TrainConfig, path: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model at `path` without weights, as `load_model` makes it with them."""
    model_config = load_model_config(config, path)
    dropouts = switch_off(model_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attn_implementation,
        )
    model.fastdpo_dropouts = dropouts
    return model


def fill_skeleton(
    model: nn.Module, state: dict[str, Tensor] | None, device: torch.device, first: bool
) -> None:
    """Give every rank its shares of the first one's weights, and its buffers.

    Args:
        state: the whole one, of the first rank; None of the others, whose model is sharded and has
            no values yet.
    """
    if not first:
        model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    given: dict[str, Any] = dict(state or {})
    set_model_state_dict(model, given, options=options)
    for module in model.modules():
        for name, value in _tensors_of(module):
            held = value.to(device) if not value.is_meta else torch.empty_like(value, device=device)
            dist.broadcast(held, src=0)
            setattr(module, name, held)


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own buffers, and what it keeps beside them, by name."""
    kept: list[dict[str, Any]] = [module._buffers, vars(module)]
    for values in kept:
        yield from [(name, v) for name, v in values.items() if type(v) is Tensor]
