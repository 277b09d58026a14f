"""What the operators of `library.py` begin and end with: engine, rounding, ignored tokens."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import check_head, check_packed, scored_targets
from .backends import choose_backend, make_tiles
from .head import OUTPUTS, Head, Stats, Tiles, workspace_of


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: fp32, or fp64 where the head computes in that."""
    return torch.promote_types(dtype, torch.float32)


def names(outputs: str) -> tuple[str, ...]:
    """The optional outputs, which a schema takes as one string, comma between them."""
    return tuple(name for name in outputs.split(",") if name)


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """No rounding that is not asked for, on the device of a tensor."""
    device = tensor.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


@contextmanager
def inside_operator(tensor: Tensor) -> Iterator[None]:
    """The body of an operator rounds what it means to round, and Triton starts its kernels on the
    current device, which is not always that of the tensors.
    """
    with no_autocast(tensor), torch.cuda.device_of(tensor):
        yield


@dataclass(frozen=True)
class Call:
    """What the body of every operator begins with."""

    tiles: Tiles
    hidden: Tensor  # (t, H) scored tokens, in the dtype that the head computes in
    targets: Tensor  # (t,), -1 where ignored
    index: Tensor | None  # (t,) into all tokens, None if all are scored
    count: int  # T

    def take(self, values: Tensor) -> Tensor:
        """Those of all tokens' values (T, ...) that are scored, one after the other in memory."""
        if self.index is None:
            return values.contiguous()
        return values.index_select(0, self.index.to(values.device))

    def spread(self, values: Tensor) -> Tensor:
        """The values (t, ...) of scored tokens among zeros, (T, ...)."""
        if self.index is None:
            return values
        zeros = values.new_zeros((self.count, *values.shape[1:]))
        return zeros.index_copy_(0, self.index, values)

    def outputs(self, stats: Stats, wanted: str) -> list[Tensor]:
        """Every optional output in the order of `OUTPUTS`, empty where it is not asked for."""
        asked, like = names(wanted), stats["logprob"]
        return [
            self.spread(stats[name]) if name in asked else empty(like, name, like.dtype)
            for name in OUTPUTS
        ]


def empty(like: Tensor, name: str, dtype: torch.dtype, count: int = 0) -> Tensor:
    """Room (count,) for an output; none stands for one that is not asked for."""
    return like.new_empty(count, dtype=torch.bool if name == "is_top1" else dtype)


def begin(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    dtype: torch.dtype,
    backend: str,
    workspace_mib: int | None,
    outputs: tuple[str, ...] = (),
) -> Call:
    """Check, choose the engine, round to `dtype`, and leave out ignored tokens where that is cheap.

    Everything comes out laid out as engines read it (`Tiles`); a copy is made of what is not.
    """
    check_packed(hidden)
    check_head(hidden, weight, bias, targets, softcap, temperature)
    targets = scored_targets(targets, weight.shape[0], ignore_index).contiguous()
    head = Head(weight, bias, softcap, logit_scale, temperature).cast(dtype)
    engine = choose_backend(backend, hidden.device, dtype, hidden.shape[-1])
    tiles = make_tiles(engine, head, workspace_of(workspace_mib, hidden.device), outputs)
    index = None
    if engine == "torch":  # counting costs a GPU a synchronisation, and saves it whole products
        valid = targets >= 0
        index = None if bool(valid.all()) else valid.nonzero().squeeze(1)
    count = hidden.shape[0]
    if index is not None:
        hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
    hidden = hidden.to(dtype)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    return Call(tiles, hidden, targets, index, count)


class _Once(torch.autograd.Function):
    """Gradients that cannot be differentiated again: a clear error, never a missing term."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "linear_logprob and linear_dpo_loss can be differentiated once, not twice"
        )


def once(*gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients as a backward returns them, whether or not a graph is made of it."""
    if not torch.is_grad_enabled():
        return gradients
    return _Once.apply(torch.empty(0, requires_grad=True), *gradients)


def refuse(
    gradient: Tensor | None, others: Mapping[str, Tensor | None], *, scalar: bool = False
) -> Tensor | None:
    """The gradient of a result, given those of `others` by name, which have none.

    A compiler gives every result that leaves its graph a gradient, of zeros as a rule, and no error
    can depend on numbers there: one that is not 0 makes everything NaN.

    Raises:
        RuntimeError: a gradient is asked of one of the others.
    """
    for name, asked in others.items():
        if asked is None:
            continue
        if type(asked) is Tensor:
            if not asked.any():  # what a compiled part gives a result that it has only been handed
                continue
            raise RuntimeError(
                f"{name} has no gradient: use {name}.detach() in what is differentiated"
            )
        wrong = torch.where((asked != 0).any(), torch.nan, 0.0).to(asked.dtype)
        if gradient is None:
            gradient = wrong if scalar else wrong.expand_as(asked)
        else:
            gradient = gradient + wrong
    return gradient
