"""Tiles made by the fused kernels: what `regimes.py` calls on a GPU."""

import torch
from torch import Tensor

from ..head import Head, Stats, Tiles
from .exponential import exponentials, probabilities
from .score import score

_PITCH = 64
"""The rows of a tile begin at multiples of so many elements, whatever the vocabulary is."""


class TritonTiles(Tiles):
    """`Tiles` in Triton, for bf16, fp16 and fp32 heads; a tile has the head's dtype."""

    def __init__(self, head: Head, workspace_mib: int) -> None:
        if head.weight.dtype == torch.float64:
            raise ValueError('backend "triton" has no fp64; use "torch" or "reference"')
        self.head = head
        vocab = head.weight.shape[0]
        pitch = -(-vocab // _PITCH) * _PITCH
        self.rows = max(1, (workspace_mib << 20) // (pitch * head.weight.element_size()))
        self._pitch = pitch
        self._buffer: Tensor | None = None

    def score(self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Stats:
        return score(self.head, hidden, targets, outputs)

    def exponentials(
        self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Stats]:
        if self.head.weight.dtype == torch.float16:
            # fp16 cannot hold exp of more than 11 nats; the softmax itself, it can.
            stats = self.score(hidden, targets, outputs)
            return *self.probabilities(hidden, targets, stats), stats
        tile = self._tile(hidden.shape[0])
        row_scale, stats = exponentials(self.head, hidden, targets, tile, outputs)
        return tile, row_scale, stats

    def probabilities(self, hidden: Tensor, targets: Tensor, stats: Stats) -> tuple[Tensor, Tensor]:
        tile = self._tile(hidden.shape[0])
        return tile, probabilities(self.head, hidden, targets, tile, stats)

    def _tile(self, tokens: int) -> Tensor:
        if self._buffer is None or self._buffer.shape[0] < tokens:
            self._buffer = None
            weight = self.head.weight
            self._buffer = weight.new_empty((tokens, self._pitch))
        return self._buffer[:tokens, : self.head.weight.shape[0]]
