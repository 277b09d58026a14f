"""How many optimizer steps a run has, and what is due after each."""

import math
from collections.abc import Sequence

from ..config import TrainConfig
from ..data.groups import Group, count_units
from ..data.plan import units_per_step

_CHEAP = 0.1
"""An evaluation of at most this share of what is trained on is cheap: some 3 % of the time."""


class Schedule:
    """The steps of a run, from its configuration and its training data.

    Attributes:
        units: how many a step holds; the last one of an epoch holds what is left.
        steps_per_epoch: optimizer steps of one pass over the data.
        steps: optimizer steps of the whole run.
    """

    def __init__(
        self, config: TrainConfig, groups: Sequence[Group], units: int | None = None
    ) -> None:
        self.config = config
        self.units = units or units_per_step(config)
        self.steps_per_epoch = math.ceil(count_units(groups) / self.units)
        epochs = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        self.steps = config.max_steps if config.max_steps > 0 else epochs

    @property
    def epochs(self) -> int:
        """Epochs that the run begins."""
        return math.ceil(self.steps / self.steps_per_epoch)

    def logs(self, step: int) -> bool:
        """Whether metrics are logged after a step."""
        first = self.config.logging_first_step and step == 1
        return first or self._due("steps", "logging_steps", step)

    def evaluates(self, step: int) -> bool:
        """Whether the policy is evaluated after a step, if there is data for it."""
        last = self.config.do_eval and step == self.steps
        return last or self._due(self.config.eval_strategy, "eval_steps", step)

    def begins_with_evaluation(self, groups: Sequence[Group] | None) -> bool:
        """Whether the policy is evaluated before the first step, on these groups. Where the key
        leaves it open it is if that costs little beside the run.
        """
        if not groups:
            return False
        if self.config.eval_on_start is not None:
            return self.config.eval_on_start
        return count_units(groups) <= _CHEAP * self.units * self.steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""
        return self._due(self.config.save_strategy, "save_steps", step)

    def _due(self, strategy: str, key: str, step: int) -> bool:
        if strategy in ("no", "best"):
            return False
        every = self.steps_per_epoch
        if strategy == "steps":
            every = self.config.interval(key, self.steps)
        return step == self.steps or step % every == 0
