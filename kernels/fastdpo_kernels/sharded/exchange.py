"""What the ranks of a group send each other: rows of matrices, sums, and a few integers.

Every rank calls the same functions in the same order. Sums are the same bits on all ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_HIGHEST = 2.0**15
"""What the largest entry of a row becomes in fp16, which then holds a row down to 2⁻²⁹ of it."""


class Exchange:
    """Collectives over rows of a group; `counts` are the rows of every rank, in its order."""

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def integers(self, values: list[int], device: torch.device) -> list[list[int]]:
        """Those of every rank, as many on each.

        They stay on the host where the group has a backend for it, as groups have that are made
        without naming a backend; else they make the host wait for `device`.
        """
        if "cpu:" in str(dist.get_backend_config(self.group)):
            device = torch.device("cpu")
        mine = torch.tensor(values, dtype=torch.int64, device=device)
        every = mine.new_empty((self.size, len(values)))
        _gather_equal(every.view(-1), mine, group=self.group)
        return every.tolist()

    def ragged(self, values: list[int], device: torch.device) -> list[list[int]]:
        """Integers of every rank, however many each has."""
        longest = max(count for (count,) in self.integers([len(values)], device))
        padded = self.integers([len(values), *values, *[0] * (longest - len(values))], device)
        return [row[1 : 1 + row[0]] for row in padded]

    def gather(self, mine: Tensor, counts: list[int]) -> Tensor:
        """The rows of all ranks one after the other, (Σ counts, ...); no gradient."""
        every = mine.new_empty((sum(counts), *mine.shape[1:]))
        if not every.numel():
            return every
        parts = list(every.split(counts))
        if len(set(counts)) == 1:
            _gather_equal(every, mine.contiguous(), group=self.group)
            return every
        if not self._is_gloo(mine):
            dist.all_gather(parts, mine.contiguous(), group=self.group)
            return every
        parts[self.rank].copy_(mine)  # gloo has no all-gather of them
        sent = [
            dist.broadcast(part, group=self.group, group_src=rank, async_op=True)
            for rank, part in enumerate(parts)
            if len(part)
        ]
        for work in sent:
            work.wait()
        return every

    def total(self, values: Tensor) -> Tensor:
        """Σ over ranks, in place."""
        if values.numel():
            dist.all_reduce(values, group=self.group)
        return values

    def highest(self, values: Tensor) -> Tensor:
        """The maximum over ranks, in place."""
        if values.numel():
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def reduce(self, partial: Tensor, counts: list[int], narrow: bool) -> Tensor:
        """Σ over ranks of partial (Σ counts, H), the rows of this rank, (counts[rank], H).

        Rows are sent to whom they belong and added there, in the order of ranks: partial sums
        cancel, so to round them as what they add up to would lose several times as much. With
        `narrow` they travel in 2 bytes an entry: fp16 in units of each row's largest entry, which
        travels beside them. That rounds 8 times finer than bf16.
        """
        if not partial.numel():
            return partial
        sent = _packed(partial) if narrow else partial.contiguous()
        own = counts[self.rank]
        got = sent.new_empty((self.size * own, sent.shape[1]))
        dist.all_to_all_single(got, sent, [own] * self.size, counts, group=self.group)
        parts = got.view(self.size, own, sent.shape[1])
        if not narrow:
            return parts.sum(0)
        return sum((_unpacked(part, partial.dtype) for part in parts), partial.new_zeros(()))

    def _is_gloo(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" or dist.get_backend(self.group) == "gloo"


def _gather_equal(every: Tensor, mine: Tensor, **options: Any) -> None:
    if hasattr(dist, "all_gather_single"):  # since torch 2.13
        dist.all_gather_single(every, mine, **options)
    else:
        dist.all_gather_into_tensor(every, mine, **options)


def _packed(rows: Tensor) -> Tensor:
    """Rows (t, H) in fp32 as (t, H + 2) in fp16; the last two columns are the bits of the units."""
    tiny = torch.finfo(torch.float32).tiny
    unit = rows.abs().amax(1, keepdim=True).clamp(min=tiny * _HIGHEST).div_(_HIGHEST)
    packed = rows.new_empty((rows.shape[0], rows.shape[1] + 2), dtype=torch.float16)
    packed[:, :-2] = rows / unit
    packed[:, -2:] = unit.view(torch.float16)
    return packed


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    unit = packed[:, -2:].contiguous().view(torch.float32)
    return packed[:, :-2].to(dtype) * unit
