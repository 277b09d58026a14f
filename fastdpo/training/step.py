"""Scoring rows: the forward, the loss and its gradient for one packed row, and the mean over a
whole evaluation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from fastdpo_kernels import Comparisons
from torch import Tensor

from ..data.ahead import ahead
from ..data.batch import Batch, make_batch
from ..data.groups import Group, count_comparisons
from ..data.packing import PackedRow
from ..data.plan import Step, make_plan
from ..model.scorer import TOKEN_STATS, Scorer
from ..reference import OnlineReference
from .metrics import StepSums

_EVAL_WINDOW = 1024


@dataclass(frozen=True)
class StepBatches:
    """A step on the host: how many comparisons it holds, and its rows."""

    comparisons: int
    batches: list[Batch]


@dataclass
class Objective:
    """The policy, what it is compared with, and the loss of a comparison."""

    policy: Scorer
    loss_function: Callable[[Comparisons], Tensor]
    beta: float
    reference: OnlineReference | None = None  # None: precomputed, in the groups

    def batches(self, groups: Sequence[Group], step: Step) -> StepBatches:
        """The rows of a step, for one process."""
        return StepBatches(step.comparisons, [self.batch(groups, row) for row in step.ranks[0]])

    def batch(self, groups: Sequence[Group], row: PackedRow) -> Batch:
        """A row on the host, ready to be copied to the device."""
        batch = make_batch(groups, row, self.policy.layout.name)
        return batch.pin_memory() if self.policy.device.type == "cuda" else batch

    def score(self, batch: Batch, comparisons: int, sums: StepSums) -> Tensor:
        """One row's share of a mean loss over `comparisons`, differentiable; adds its metrics to
        `sums`.
        """
        batch = batch.to(self.policy.device)
        if self.reference is not None:
            ref = self.reference.response_logps(batch)
        elif batch.ref_logps is not None:
            ref = batch.ref_logps
        else:
            raise ValueError("the groups hold no reference log-probabilities: fill_reference first")
        loss, logps, stats = self.policy.loss(
            batch, ref, self.loss_function, comparisons, TOKEN_STATS
        )
        sums.add(batch, loss, logps, ref, stats, self.beta)
        return loss

    @torch.no_grad()
    def evaluate(self, groups: Sequence[Group], max_tokens: int) -> dict[str, float]:
        """Metrics named eval_*, each a mean over all comparisons; the model's mode is left as it
        was.
        """
        model = self.policy.model
        training = model.training
        model.eval()
        sums, total = StepSums(self.policy.device), count_comparisons(groups)
        plan = make_plan(
            groups,
            comparisons_per_step=_EVAL_WINDOW,
            max_tokens=max_tokens,
            layout=self.policy.layout.name,
            seed=None,
        )
        rows = (self.batch(groups, row) for step in plan for row in step.ranks[0])
        for batch in ahead(rows):
            self.score(batch, total, sums)
        model.train(training)
        return {f"eval_{name}": value for name, value in sums.means().items()}
