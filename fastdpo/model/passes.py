"""How often a row's scored tokens go through the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from fastdpo_kernels import head_passes
from fastdpo_kernels.cuts import token_cuts
from fastdpo_kernels.losses import Loss
from fastdpo_kernels.regimes import measured

from ..data.batch import Batch
from .scorer import TOKEN_STATS, Scorer


@dataclass(frozen=True)
class HeadCalls:
    """What decides how the tokens of a row go through a head that one device computes.

    Attributes:
        vocab, width: V and H.
        dtype: what the head computes in.
        trained: whether its weight or bias have a gradient.
        part: how many of so many tokens this device scores, where several share a row.
    """

    vocab: int
    width: int
    dtype: torch.dtype
    device: torch.device
    trained: bool
    workspace_mib: int | None = None
    part: Callable[[int], int] | None = None

    @classmethod
    def of(cls, scorer: Scorer) -> HeadCalls | None:
        """Those of a policy; None where devices score their tokens together."""
        if scorer.shares is not None:
            return None
        weight, context = scorer.head.weight, scorer.context
        vocab, width = weight.shape

        def part(count: int) -> int:
            assert context is not None
            own = context.part(count)
            return own.stop - own.start

        return cls(
            vocab,
            width,
            scorer.autocast or weight.dtype,
            weight.device,
            any(parameter.requires_grad for parameter in scorer.head.module.parameters()),
            scorer.workspace_mib,
            None if context is None else part,
        )

    def passes(self, batch: Batch, loss: Loss) -> float:
        """`fastdpo_kernels.head_passes` of a batch on the host."""
        count = len(batch.targets)
        cuts = [0, count]
        if self.part is not None:  # any gradient comes back
            cuts = [0, self.part(count)]
        elif loss.kind != "step":
            units = batch.units.unsqueeze(1) if batch.units.ndim == 1 else batch.units
            cuts, _ = token_cuts(count, len(batch.response_lengths), batch.response_ids, units)
        return head_passes(
            cuts,
            self.vocab,
            self.width,
            self.dtype,
            self.device,
            trained=self.trained,
            separable=self.part is None,
            workspace_mib=self.workspace_mib,
            outputs=measured(loss, TOKEN_STATS),
        )


def mean_passes(calls: HeadCalls | None, batches: Sequence[Batch], loss: Loss) -> float | None:
    """The passes of batches on the host, a mean over their scored tokens; None without any, and
    where devices score their tokens together.
    """
    batches = [batch for batch in batches if not batch.idle]
    tokens = sum(len(batch.targets) for batch in batches)
    if calls is None or not tokens:
        return None
    return sum(len(batch.targets) * calls.passes(batch, loss) for batch in batches) / tokens
