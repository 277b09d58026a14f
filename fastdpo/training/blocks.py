"""torchao's 8-bit moments as plain tensors, whole or in stretches of ranks, and back.

A block of 256 elements that follow each other shares a scale. Blocks are counted from the first
element that a rank holds: with another number of shares they may lie otherwise.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..extras import need
from ..parallel.shares import Stored, start_of

_PLAIN = "plain"


def pieces_of(value: Tensor) -> dict[str, Tensor] | None:
    """The tensors that make up a moment, by name, with the number of the first element of a rank's
    stretch; None for a whole tensor that is plain. A rank's stretch may be.
    """
    share = isinstance(value, DTensor)
    local: Any = value.to_local() if isinstance(value, DTensor) else value
    if not local.numel():
        return {} if share else None
    at = f"@{start_of(value)}" if isinstance(value, DTensor) else ""
    if hasattr(local, "codes"):
        return {f"{name}{at}": getattr(local, name) for name in local.__tensor_flatten__()[0]}
    return {f"{_PLAIN}{at}": local.reshape(-1)} if share else None


@dataclass
class Blocks:
    """A moment of one weight, from the pieces that are stored of it.

    Attributes:
        exact: whether `join` gave exactly what was stored.
    """

    optimizer: Optimizer
    weight: Tensor
    stored: Stored
    exact: bool = True
    _keys: dict[int, dict[str, str]] = field(default_factory=dict)

    def add(self, piece: str, key: str) -> None:
        """A piece, as `pieces_of` names it, and its name in the files."""
        name, _, start = piece.partition("@")
        self._keys.setdefault(int(start or 0), {})[name] = key

    @torch.no_grad()
    def join(self, signed: bool) -> Tensor:
        """The moment that this rank holds, made as the optimizer makes it.

        Raises:
            ValueError: the optimizer has no moments in 8 bits.
        """
        if not hasattr(self.optimizer, "_new_buffer"):
            raise ValueError("its moments are in 8 bits")
        moment: Tensor = self.optimizer._new_buffer(self.weight, signed)
        local = moment.to_local() if isinstance(moment, DTensor) else moment
        if local.numel():
            start = start_of(moment) if isinstance(moment, DTensor) else 0
            parts = [
                _Part(at, {name: self.stored.whole(key) for name, key in keys.items()}, signed)
                for at, keys in sorted(self._keys.items())
                if at < start + local.numel()
            ]
            self.exact &= _fill(local, start, [part for part in parts if part.end > start])
        return moment


@dataclass
class _Part:
    """A stretch of a moment from `start` on, as it was stored."""

    start: int
    pieces: dict[str, Tensor]
    signed: bool

    @property
    def end(self) -> int:
        """The element after the last one."""
        return self.start + self.pieces["codes" if self.coded else _PLAIN].numel()

    @property
    def coded(self) -> bool:
        """Whether it is in 8 bits."""
        return "codes" in self.pieces

    def values(self) -> Tensor:
        """What it stands for, flat."""
        if not self.coded:
            return self.pieces[_PLAIN]
        kind = need("torchao.optim.subclass_8bit", "resume_from_checkpoint").OptimState8bit
        pieces = [self.pieces[name] for name in kind.tensor_attrs]
        return kind(*pieces, self.signed, dtype=torch.float32).dequantize().reshape(-1)


def _fill(local: Any, start: int, parts: list[_Part]) -> bool:
    """Fill what a rank holds of a moment, from `start` on; whether that is what was stored."""
    end = start + local.numel()
    spans = [(max(start, part.start), min(end, part.end), part) for part in parts]
    if hasattr(local, "codes") and all(part.coded for part in parts):
        size = local.block_size
        cuts = {at - s for lo, hi, part in spans for at in (lo, hi) for s in (start, part.start)}
        if not any(cut % size for cut in cuts):
            for low, high, part in spans:
                own, theirs = (slice(low - s, high - s) for s in (start, part.start))
                local.codes.view(-1)[own].copy_(part.pieces["codes"].reshape(-1)[theirs])
                own, theirs = (slice(s.start // size, s.stop // size) for s in (own, theirs))
                local.scale[own].copy_(part.pieces["scale"][theirs])
            return True
    values = [part.values()[low - part.start : high - part.start] for low, high, part in spans]
    local.copy_(torch.cat(values).view(local.shape).to(local.device))
    return not hasattr(local, "codes") and not any(part.coded for part in parts)
