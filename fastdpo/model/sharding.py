"""FSDP2: each rank holds a share of every weight, of its gradient and of its states.

Every layer is gathered when a row comes to it and forgotten after it; what lies outside of layers
(embedding, last norm, head) is the root's and stays whole while a row is scored. The head is no
layer that is called: its weight is read. So everything that reads the root's weights runs inside a
method of the root that FSDP knows, and `inside` is the way there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from .head import base_causal_lm
from .layers import layers_of

T = TypeVar("T")


def shard_model(model: nn.Module, mesh: DeviceMesh, head: nn.Module | None = None) -> None:
    """Shard a model, which may be a PeftModel, over `mesh`: (replicas, shares) of ranks.

    Losses have to be a rank's share of the step's: gradients are summed over ranks, in fp32 at
    least. The weight of `head` is not gathered ever: each rank keeps some rows of the vocabulary.
    """
    replicas = mesh.size(0)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    reduce_dtype = torch.float32 if trained & {torch.bfloat16, torch.float16} else None
    options: dict[str, Any] = {
        "mesh": mesh if replicas > 1 else mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False),
    }
    if head is not None:
        options["ignored_params"] = {_over_the_vocabulary(head, mesh)}
    for layer in layers_of(base_causal_lm(model)):
        fully_shard(layer, reshard_after_forward=True, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.fastdpo_inside = _call  # type: ignore[assignment]
    register_fsdp_forward_method(model, "fastdpo_inside")


def settle(model: nn.Module) -> None:
    """Fix which weights need a gradient, now that a sharded model has its values: they are asked
    when they are first gathered, and a reference has adapters switched off.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def _over_the_vocabulary(head: nn.Module, mesh: DeviceMesh) -> nn.Parameter:
    """Leave this rank some rows of a head's weight; the weight, which is a DTensor now."""
    whole: Any = head.weight
    placements: tuple[Placement, ...] = (Replicate(), Shard(0))
    if mesh.size(0) == 1:
        mesh, placements = mesh["shard"], (Shard(0),)
    rows = distribute_tensor(whole.detach().to(mesh.device_type), mesh, placements)
    head.weight = nn.Parameter(rows, requires_grad=whole.requires_grad)
    return head.weight


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` was here."""
    return isinstance(model, FSDPModule)


def inside(model: Any, function: Callable[[], T]) -> T:
    """What the function returns, called where the weights outside of layers are whole. All ranks
    call it together.
    """
    if not is_sharded(model):
        return function()
    result = model.fastdpo_inside(function)
    if not torch.is_grad_enabled():  # no backward will do it, and parameters are the shares again
        model.reshard()
    return result


def add_replicas_up(model: Any, now: bool) -> None:
    """Whether the next backward adds the gradients of replicas up: once a step, after its last row.
    Those of shares are added up after each row, so that no rank holds a whole one.
    """
    model.set_requires_all_reduce(now)


def _call(function: Callable[[], T]) -> T:
    return function()
