"""How often a row's scored tokens go through the head."""

from collections.abc import Sequence

from fastdpo_kernels import head_passes
from fastdpo_kernels.cuts import token_cuts
from fastdpo_kernels.losses import Loss
from fastdpo_kernels.regimes import measured

from ..data.batch import Batch
from .scorer import TOKEN_STATS, Scorer


def mean_passes(scorer: Scorer, batches: Sequence[Batch], loss: Loss) -> float | None:
    """`fastdpo_kernels.head_passes` of batches on the host, a mean over their scored tokens; None
    without any, and where ranks score their tokens together.
    """
    batches = [batch for batch in batches if not batch.idle]
    tokens = sum(len(batch.targets) for batch in batches)
    if scorer.shares is not None or not tokens:
        return None
    weight = scorer.head.weight
    vocab, width = weight.shape
    trained = any(parameter.requires_grad for parameter in scorer.head.module.parameters())
    total = 0.0
    for batch in batches:
        count = len(batch.targets)
        cuts = [0, count]
        if scorer.context is not None:  # each rank has a part, and any gradient comes back
            part = scorer.context.part(count)
            cuts = [0, part.stop - part.start]
        elif loss.kind != "step":
            units = batch.units.unsqueeze(1) if batch.units.ndim == 1 else batch.units
            cuts, _ = token_cuts(count, len(batch.response_lengths), batch.response_ids, units)
        total += count * head_passes(
            cuts,
            vocab,
            width,
            scorer.autocast or weight.dtype,
            weight.device,
            trained=trained,
            separable=scorer.context is None,
            workspace_mib=scorer.workspace_mib,
            outputs=measured(loss, TOKEN_STATS),
        )
    return total / tokens
