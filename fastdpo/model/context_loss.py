"""Head and loss of a row whose tokens lie on the ranks of a context-parallel group.

The scored tokens of a row are its responses, which may all lie on the last rank. So the T hidden
states that are scored change hands first, and each rank scores `ceil(T / N)` of them; what it costs
is T·H values on the wire in each direction, beside T·V·H products of the head. The
log-probabilities of all ranks, T numbers, then come together on each of them, where the loss is
computed; a gradient flows into a rank's own ones.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from fastdpo_kernels import linear_logprob
from fastdpo_kernels.losses import Loss
from fastdpo_kernels.ops import LinearLoss
from fastdpo_kernels.problem import Problem, add_sums
from torch import Tensor

from ..data.batch import Batch
from .context import ContextGroup


def scored_part(states: Tensor, batch: Batch, context: ContextGroup) -> Tensor:
    """Hidden states (W, H) of this rank's stretch → those that predict this rank's part of the
    scored tokens, (t, H), in the order of the batch.
    """
    index = (batch.host or batch).score_index.cpu()
    owners = torch.div(index, len(states), rounding_mode="floor")
    scorers = torch.arange(len(index)) // max(1, context.width(len(index)))
    ranks = range(context.size)
    leaving = owners == context.rank
    # A stable sort by the receiver: the tokens are in their order, and so are the receivers.
    sent = [int((leaving & (scorers == rank)).sum()) for rank in ranks]
    wanted = owners[context.part(len(index))]
    received = [int((wanted == rank).sum()) for rank in ranks]
    own = (index[leaving] - context.rank * len(states)).to(states.device)
    arrived = context.exchange(states.index_select(0, own), sent, received)
    places = wanted.argsort(stable=True).argsort().to(states.device)
    return arrived.index_select(0, places)


def together(values: Tensor, count: int, context: ContextGroup) -> Tensor:
    """Each rank's part of numbers (k, t) of `count` tokens → those of all ranks (k, count); no
    gradient.
    """
    width = max(1, context.width(count))
    filled = torch.nn.functional.pad(values.detach(), (0, width - values.shape[1]))
    return context.gather(filled.T.contiguous()).T[:, :count]


def context_loss(
    states: Tensor,
    weight: Tensor,
    batch: Batch,
    context: ContextGroup,
    loss: Loss,
    ref_logps: Tensor | None,
    ref_token_logps: Tensor | None,
    given: dict[str, Tensor],
    unit_weights: Tensor,
    outputs: tuple[str, ...],
    **head: Any,
) -> LinearLoss:
    """`linear_loss` of a batch, of whose scored tokens this rank has the hidden states (t, H) of
    its part. All results are those of the whole batch.
    """
    part, count = context.part(len(batch.targets)), len(batch.targets)
    names = tuple(dict.fromkeys((*outputs, *(("log_sum_sq_prob",) if loss.use_weighting else ()))))
    found = linear_logprob(states, weight, batch.targets[part], outputs=names, **head)
    mine = dict(zip(("logprob", *names), found if names else (found,), strict=True))
    logprob = mine["logprob"]
    values = torch.stack([value.to(logprob.dtype) for value in mine.values()])
    everyone = together(values, count, context)
    stats = {n: row.to(mine[n].dtype) for n, row in zip(mine, everyone, strict=True)}
    before, after = stats["logprob"][: part.start], stats["logprob"][part.stop :]
    exact = stats | {"logprob": torch.cat([before, logprob, after]).double()}
    problem = _problem(batch, loss, ref_logps, ref_token_logps, given, unit_weights)
    logps = torch.zeros_like(problem.ref_logps)
    add_sums(logps, exact["logprob"], problem.response_ids)
    value = problem.total(logps, slice(None), slice(0, count), exact)
    return LinearLoss(
        value.to(logprob.dtype),
        logps.detach().to(logprob.dtype),
        stats["logprob"],
        namedtuple("TokenStats", outputs)(*(stats[name] for name in outputs)),
    )


def _problem(
    batch: Batch,
    loss: Loss,
    ref_logps: Tensor | None,
    ref_token_logps: Tensor | None,
    given: dict[str, Tensor],
    unit_weights: Tensor,
) -> Problem:
    if ref_logps is None:
        ref_logps = torch.zeros_like(batch.response_lengths, dtype=torch.float64)
        if ref_token_logps is not None:
            add_sums(ref_logps, ref_token_logps.double(), batch.response_ids)
    return Problem.build(
        batch.targets,
        batch.response_ids,
        batch.units.unsqueeze(1) if batch.units.ndim == 1 else batch.units,
        ref_logps,
        unit_weights,
        batch.response_lengths,
        loss,
        ref_token_logps,
        given,
    )
