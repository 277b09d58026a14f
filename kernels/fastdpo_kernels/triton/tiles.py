"""Tiles made by the fused kernels: what `regimes.py` calls on a GPU."""

import torch
from torch import Tensor

from ..head import OUTPUTS, Head, Stats, Tiles
from ..kept import give_up
from ..losses import Loss
from ..problem import Problem, Selection
from . import exponential
from .coefficients import DERIVATIVES, add_response_sums, loss_and_coefficients
from .layout import TritonLayout, block_columns
from .score import score


def knows(loss: Loss) -> bool:
    """Whether the kernels of `coefficients` compute a loss."""
    # Smoothing from a half on is for the loss itself to refuse.
    other = loss.by_tokens or loss.use_weighting or not 0 <= loss.label_smoothing < 0.5
    return loss.name in DERIVATIVES and not other


class TritonTiles(Tiles):
    """`Tiles` in Triton, for heads in bf16, fp16 and fp32; a tile has the head's dtype."""

    def __init__(self, head: Head, workspace_mib: int, outputs: tuple[str, ...] = OUTPUTS) -> None:
        weight = head.weight
        if weight.dtype == torch.float64:
            raise ValueError('backend "triton" has no fp64; use "torch" or "naive"')
        self.head = head.cast(weight.dtype)
        vocab, width = weight.shape
        sizes = (vocab, width, weight.dtype, weight.device.type)
        block_v = block_columns(self.head, outputs)
        layout = TritonLayout(*sizes, workspace_mib, outputs, block_v)
        self.rows, self._pitch = layout.rows, layout.pitch
        self.projects_once = layout.projects_once
        self._buffer: Tensor | None = None

    def empty_tile(self, tokens: int) -> Tensor:
        give_up(self.head.weight.device)
        if self._buffer is None or self._buffer.shape[0] < tokens:
            self._buffer = None
            self._buffer = self.head.weight.new_empty((tokens, self._pitch))
        return self._buffer[:tokens, : self.head.weight.shape[0]]

    def score(self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Stats:
        return score(self.head, hidden, targets, outputs)

    def exponentials(
        self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Stats]:
        if self.head.weight.dtype == torch.float16:
            # fp16 ends at exp(11); a softmax it can hold.
            stats = self.score(hidden, targets, outputs)
            return *self.probabilities(hidden, targets, stats), stats
        tile = self.empty_tile(hidden.shape[0])
        row_scale, stats = exponential.exponentials(self.head, hidden, targets, tile, outputs)
        return tile, row_scale, stats

    def probabilities(self, hidden: Tensor, targets: Tensor, stats: Stats) -> tuple[Tensor, Tensor]:
        tile = self.empty_tile(hidden.shape[0])
        return tile, exponential.probabilities(self.head, hidden, targets, tile, stats)

    def loss_and_coefficients(
        self,
        problem: Problem,
        tokens: slice,
        stats: Stats,
        logps: Tensor,
        selected: Selection,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor | None]:
        loss = problem.loss
        if not knows(loss):
            return super().loss_and_coefficients(
                problem, tokens, stats, logps, selected, differentiate
            )
        ids, token_logps = problem.response_ids[tokens], stats["logprob"]
        add_response_sums(logps, token_logps, ids)
        value, gradient = loss_and_coefficients(
            logps,
            problem.ref_logps,
            problem.response_lengths,
            problem.units[selected][:, :2],
            problem.weights[selected],
            loss_type=str(loss.name),
            beta=loss.beta,
            label_smoothing=loss.label_smoothing,
        )
        return value, gradient.to(token_logps.dtype)[ids] if differentiate else None
