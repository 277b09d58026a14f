"""Long contexts over devices: a row's tokens over a context-parallel group of N ranks.

Every rank is given the whole row and keeps one stretch of `ceil(S / N)` tokens of it: embedding,
norms, MLPs and projections see no others. Attention brings what a query has to see together
(`context_attention`), and the head does so with the log-probabilities of the scored tokens
(`context_loss`). Each rank ends with the loss of the whole row and with its tokens' share of every
weight's gradient: the gradient is the sum over the group.

A row is filled up to N equal stretches with copies of its last token, in a segment of their own
that nothing reads, so that every collective has the same sizes on all ranks, and takes place
whatever the row holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..data.batch import Batch
from ..data.segments import Segments
from ..errors import ConfigError

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""One function under its newer name, where torch has that."""


class Stretch(NamedTuple):
    """A rank's tokens of a row, W of them, and the row that they are from."""

    input_ids: Tensor
    """(1, W) int64."""
    position_ids: Tensor
    """(1, W) int64."""
    segments: Segments
    """Of the whole row, filled up to N·W tokens."""


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that compute each row together. All of them are given the same rows, in the same
    order.
    """

    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        """N, the number of ranks."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This process's place among them."""
        return self.group.rank()

    def width(self, count: int) -> int:
        """How many of `count` tokens a rank has, but for the last ones, which may have fewer."""
        return -(-count // self.size)

    def part(self, count: int) -> slice:
        """Which of `count` tokens are this rank's; none where the others have them all."""
        width = self.width(count)
        return slice(min(count, self.rank * width), min(count, (self.rank + 1) * width))

    def stretch(self, batch: Batch) -> Stretch:
        """This rank's tokens of a shared or packed row.

        Raises ConfigError for a padded batch.
        """
        if batch.segments is None or batch.position_ids is None:
            raise padded_context()
        length = batch.segments.length
        width = self.width(length)
        first = self.rank * width
        mine = torch.arange(first, first + width, device=batch.input_ids.device).clamp_(
            max=length - 1
        )
        return Stretch(
            batch.input_ids[:, mine],
            batch.position_ids[:, mine],
            batch.segments.filled(self.size * width),
        )

    def exchange(
        self,
        x: Tensor,
        sent: Sequence[int] | None = None,
        received: Sequence[int] | None = None,
    ) -> Tensor:
        """The pieces of x (n, …) that the ranks have for this one, in the order of the ranks.

        `sent` and `received` are the lengths of the pieces to and from each rank, on the host; None
        for N equal ones. Differentiable once: gradients go the way back.
        """
        return _Exchange.apply(x, self.group, sent, received)

    def gather(self, x: Tensor) -> Tensor:
        """x (n, …) of all ranks, (N·n, …). Differentiable once: a rank's gradient is the sum of
        what it gets from all of them, added up in fp32 at least and in the order of the ranks.
        """
        return _Gather.apply(x, self.group)


def padded_context(reason: str | None = None) -> ConfigError:
    """The error of a padded layout, taken for this `reason`, whose tokens cannot be spread."""
    why = f" ({reason})" if reason else ""
    return ConfigError(
        "cp_size: expected shared or packed rows, whose tokens meet in fastdpo's attention alone; "
        f"this model's are padded{why}, and its own attention needs all of a sequence on one "
        "device; set cp_size to 1"
    )


class _Exchange(torch.autograd.Function):
    """all-to-all, which is its own transpose once the lengths are swapped."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: dist.ProcessGroup,
        sent: Sequence[int] | None,
        received: Sequence[int] | None,
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _all_to_all(x, group, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.group, ctx.received, ctx.sent), None, None, None


def _all_to_all(
    x: Tensor,
    group: dist.ProcessGroup,
    sent: Sequence[int] | None,
    received: Sequence[int] | None,
) -> Tensor:
    output = x.new_empty((x.shape[0] if received is None else sum(received), *x.shape[1:]))
    into, out_of = (None if counts is None else list(counts) for counts in (received, sent))
    dist.all_to_all_single(output, x.contiguous(), into, out_of, group=group)
    return output


class _Gather(torch.autograd.Function):
    """all-gather; the reduce-scatter of its gradients sums without rounding to their dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        output = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        _all_gather(output, x.contiguous(), group=group)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = _all_to_all(grad, ctx.group, None, None).unflatten(0, (ctx.group.size(), -1))
        wide = torch.promote_types(grad.dtype, torch.float32)
        return parts.sum(0, dtype=wide).to(grad.dtype), None
