"""Scoring rows: the forward, the loss and its gradient for one packed row, and the mean over a
whole evaluation.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from fastdpo_kernels.losses import Scored
from fastdpo_kernels.problem import Problem, scored_units
from torch import Tensor

from ..data.ahead import ahead
from ..data.batch import Batch, idle_batch, make_batch
from ..data.given import step_constants
from ..data.groups import Group, count_units
from ..data.packing import PackedRow, row_tokens, sequence_tokens
from ..data.plan import Step, make_plan
from ..losses import TrainingLoss
from ..model.passes import HeadCalls, mean_passes
from ..model.scorer import TOKEN_STATS, Scorer
from ..parallel.world import ALONE, World
from .accuracy import GroupRewards
from .metrics import StepSums
from .online import OnlineReference
from .terms import StepTerms, gather_rows, pass_before

_EVAL_WINDOW = 1024


@dataclass(frozen=True)
class StepBatches:
    """A step on the host.

    Attributes:
        units: how many it holds, over all ranks.
        batches: the rows that this rank trains on.
        first: the rows that are scored before them; None where that are the same ones.
        pair_tokens, computed_tokens: of the rows of all ranks, as `Batch` counts them.
        head_passes: see `mean_passes`, of this rank's rows.
    """

    units: int
    batches: list[Batch]
    first: list[Batch] | None = None
    pair_tokens: int = 0
    computed_tokens: int = 0
    head_passes: float | None = None


@dataclass
class Objective:
    """The policy, what it is compared with, and the loss.

    Attributes:
        batch_size: units of a batch, see `fastdpo.losses`.
        reference: evaluated at every step; None where its log-probabilities are in the groups, or
            none are needed.
        compares: whether reference log-probabilities are read.
        world: the ranks that the rows of a step are dealt to.
        running: means over all batches so far, with their number, of what the loss wants so.
    """

    policy: Scorer
    loss: TrainingLoss
    batch_size: int
    reference: OnlineReference | None = None
    compares: bool = True
    world: World = ALONE
    running: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    _next_running: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    _eval_names: list[str] = field(default_factory=list)

    def batches(
        self, groups: Sequence[Group], step: Step, batch_size: int | None = None
    ) -> StepBatches:
        """The rows of a step, for this rank."""
        constants = step_constants(groups, step.placed(), batch_size or self.batch_size)
        rows = [row for rank in step.ranks for row in rank]
        first = None
        if self.loss.mismatched:
            first = self._dealt(groups, step.first_of_ranks, constants, mismatched=True)
        batches = self._dealt(groups, step.ranks, constants)
        return StepBatches(
            step.units,
            batches,
            first,
            sum(sequence_tokens(groups, row) for row in rows),
            sum(row_tokens(groups, row, self.policy.layout.name) for row in rows),
            mean_passes(HeadCalls.of(self.policy), batches, self.loss.loss),
        )

    def _dealt(
        self,
        groups: Sequence[Group],
        ranks: Sequence[Sequence[PackedRow]],
        constants: Mapping[str, np.ndarray],
        mismatched: bool = False,
    ) -> list[Batch]:
        """This rank's rows. Ranks that hold shares of the weights run every forward together: where
        others have a row and this one has none, it runs one of two tokens.
        """
        made = []
        for rows in itertools.zip_longest(*ranks, fillvalue=()):
            row = rows[self.world.data_rank]
            if row:
                made.append(self.batch(groups, row, constants, mismatched))
            elif self.world.sharded and any(rows):
                made.append(idle_batch(self.policy.layout.name))
        return made

    def batch(
        self,
        groups: Sequence[Group],
        row: PackedRow,
        constants: Mapping[str, np.ndarray],
        mismatched: bool = False,
    ) -> Batch:
        """A row on the host, ready to be copied to the device."""
        batch = make_batch(
            groups,
            row,
            self.policy.layout.name,
            constants=constants,
            prompt=self.loss.prompt,
            mismatched=mismatched,
        )
        return batch.pin_memory() if self.policy.device.type == "cuda" else batch

    def terms(self, step: StepBatches, eval_batch: int | None = None) -> StepTerms | None:
        """What has to be known of the whole step before its rows: a pass that scores it; None where
        nothing has. An evaluation has batches of its own, and changes no running mean.
        """
        training, size = eval_batch is None, eval_batch or self.batch_size
        if not self.loss.scores_first:
            return None
        mode = self.policy.model.training
        self.policy.model.eval()  # what dropout draws here would not be what it draws for the rows
        batches = step.batches if step.first is None else step.first
        rows = [scored for batch in batches if (scored := self._scored(batch))]
        rows = gather_rows(rows, self.world, self.policy.device)
        terms = pass_before(self.loss, rows, step.units, size, self.running, updates=training)
        self.policy.model.train(mode)
        self._next_running = terms.running
        return terms

    def keep_running(self) -> None:
        """Keep the running means that the last step came to, now that it has been taken."""
        self.running = self._next_running or self.running

    def running_state(self) -> dict[str, list[float]]:
        """The running means and their numbers of batches, as a checkpoint keeps them."""
        return {name: [mean.item(), count] for name, (mean, count) in self.running.items()}

    def resume_running(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from what `running_state` gave."""
        for name, (mean, count) in state.items():
            value = torch.tensor(mean, dtype=torch.float64, device=self.policy.device)
            self.running[name] = value, int(count)

    def score(
        self,
        batch: Batch,
        units: int,
        sums: StepSums,
        terms: StepTerms | None = None,
        rewards: GroupRewards | None = None,
    ) -> Tensor:
        """One row's share of a mean loss over `units`, differentiable; adds its metrics to `sums`.

        `terms` are those of the step; `rewards` collects what accuracy is measured by.
        """
        batch = batch.to(self.policy.device)
        given, loss = dict(batch.given), self.loss.loss
        if batch.idle:
            self._idle_reference(batch)
            return self.policy.idle_loss(batch, loss, TOKEN_STATS)
        if terms is not None:
            given |= terms.given(batch.places)
            loss = terms.loss or loss
        ref, ref_tokens = self._reference(batch)
        result = self.policy.loss(batch, loss, ref, ref_tokens, given, units, TOKEN_STATS)
        with torch.no_grad():
            scored = self._view(batch, result.token_logps, ref, ref_tokens, given)
            found = self.loss.measure(scored)
            sums.add(batch, result.loss, found, given, result.stats)
            if rewards is not None and "rewards" in found:
                rewards.add(batch, found["rewards"])
        return result.loss

    @torch.no_grad()
    def _scored(self, batch: Batch) -> tuple[Tensor, Scored] | None:
        """The places of a batch's units in the step, and what they are seen as; no gradient."""
        batch = batch.to(self.policy.device)
        if batch.idle:
            self._idle_reference(batch)
            self.policy.token_logps(batch)
            return None
        ref, ref_tokens = self._reference(batch)
        token_logps = self.policy.token_logps(batch)
        return batch.places, self._view(batch, token_logps, ref, ref_tokens, batch.given)

    def _view(
        self,
        batch: Batch,
        token_logps: Tensor,
        ref_logps: Tensor | None,
        ref_token_logps: Tensor | None,
        given: Mapping[str, Tensor],
    ) -> Scored:
        units = batch.units.unsqueeze(1) if batch.units.ndim == 1 else batch.units
        if ref_logps is None:
            ref_logps = torch.zeros_like(batch.response_lengths, dtype=torch.float64)
            if ref_token_logps is not None:
                ref_logps.index_add_(0, batch.response_ids, ref_token_logps)
        problem = Problem.build(
            batch.targets,
            batch.response_ids,
            units,
            ref_logps,
            batch.weights,
            batch.response_lengths,
            self.loss.loss,
            ref_token_logps,
            given,
        )
        return scored_units(problem, token_logps)

    def _idle_reference(self, batch: Batch) -> None:
        """Run what `_reference` runs on other ranks."""
        if self.compares and self.reference is not None:
            self.reference.token_logps(batch)

    def _reference(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The reference's log-probabilities of responses (R,), or of tokens (T,) where the loss
        asks for those.
        """
        if not self.compares:
            return None, None
        if self.reference is not None:
            if self.loss.by_tokens:
                return None, self.reference.token_logps(batch).double()
            return self.reference.response_logps(batch), None
        known = batch.ref_token_logps if self.loss.by_tokens else batch.ref_logps
        if known is None:
            raise ValueError("the groups hold no reference log-probabilities: fill_reference first")
        return (None, known) if self.loss.by_tokens else (known, None)

    @torch.no_grad()
    def evaluate(
        self, groups: Sequence[Group], max_tokens: int, batch_size: int
    ) -> dict[str, float]:
        """Metrics named eval_*, each a mean over all units; batch terms are over batches of
        `batch_size` units in the order of the rows. The model's mode is left as it was.
        """
        model = self.policy.model
        training = model.training
        model.eval()
        sums, total = StepSums(self.policy.device), count_units(groups)
        rewards = None if self.loss.unit == "comparison" else GroupRewards(groups)
        plan = make_plan(
            groups,
            units_per_step=max(1, _EVAL_WINDOW // batch_size) * batch_size,
            max_tokens=max_tokens,
            layout=self.policy.layout.name,
            seed=None,
            world_size=self.world.data_size,
            lockstep=self.world.sharded,
            by_rows=True,
        )
        for step, parts in self._windows(groups, plan, batch_size):
            terms = self.terms(step, batch_size)
            if rewards is not None:
                for row in parts:
                    rewards.row(row)
            for batch in step.batches:
                self.score(batch, total, sums, terms, rewards)
        model.train(training)
        sums.over(self.world, self._eval_names)
        found = sums.means()
        if rewards is not None:
            found |= rewards.accuracy(self.world)
        return {f"eval_{name}": value for name, value in found.items()}

    def _windows(
        self, groups: Sequence[Group], plan: Sequence[Step], batch_size: int
    ) -> Iterator[tuple[StepBatches, Sequence[PackedRow]]]:
        rank = self.world.data_rank
        made = ((self.batches(groups, step, batch_size), step.ranks[rank]) for step in plan)
        yield from ahead(made, depth=1)
