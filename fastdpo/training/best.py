"""The best evaluation of a run, its checkpoint, and when to stop for want of a better one.

The numbers are those of transformers' `load_best_model_at_end` and `EarlyStoppingCallback`; what is
compared is the same on every rank, and goes with a checkpoint.
"""

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..model.shares import load_any_weights
from .checkpoint import checkpoints, damage, remove, step_of

logger = logging.getLogger(__name__)


class Best:
    """What evaluations are compared by, and what came of it so far.

    Attributes:
        value: of the best evaluation; None before the first.
        step: at which it was.
        waited: evaluations since one was better by more than the threshold.
        kept: the checkpoint that was evaluated best, where there is one.
        metrics: of the evaluation of `kept`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.wanted = config, config.finds_best
        self.metric, self.greater = config.best_metric
        self.value: float | None = None
        self.step = self.waited = 0
        self.kept: Path | None = None
        self.metrics: dict[str, float] = {}
        self._latest: tuple[int, dict[str, float]] = (0, {})

    @property
    def stops(self) -> bool:
        """Whether the run has waited long enough for a better evaluation."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.waited >= patience

    def require(self, names: Mapping[str, float]) -> None:
        """Raise ConfigError unless the metric is among those of evaluation."""
        if self.metric not in names:
            near = get_close_matches(self.metric, names, n=3, cutoff=0.0)
            raise self.config.error(
                "metric_for_best_model",
                f"{self.metric} is no metric of this evaluation; the nearest are {', '.join(near)}",
            )

    def saw(self, metrics: Mapping[str, float], step: int) -> bool:
        """Take an evaluation; whether it is the best so far."""
        self.require(metrics)
        value = metrics[self.metric]
        ahead = self._ahead(value, self.value)
        enough = self.value is None or abs(value - self.value) > (
            self.config.early_stopping_threshold
        )
        self.waited = 0 if ahead and enough else self.waited + 1
        self._latest = step, dict(metrics)
        if ahead:
            self.value, self.step = value, step
        return ahead

    def saved(self, path: Path) -> None:
        """Take a checkpoint, which is kept if it was evaluated and none was evaluated better."""
        step, metrics = self._latest
        if not self.wanted or step_of(path) != step or not metrics:
            return
        if self._ahead(metrics[self.metric], self.metrics.get(self.metric)):
            self.kept, self.metrics = path, metrics

    def _ahead(self, value: float, other: float | None) -> bool:
        """Whether a value is better than another one; what is not a number never is."""
        if other is None:
            return value == value
        return value > other if self.greater else value < other

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        if not self.wanted:
            return {}
        return {
            "metric": self.metric,
            "greater": self.greater,
            "value": self.value,
            "step": self.step,
            "waited": self.waited,
            "kept": None if self.kept is None else str(self.kept.absolute()),
            "metrics": self.metrics,
        }

    def resume(self, path: Path, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds; with another metric, from nothing."""
        if not self.wanted or not state:
            return
        compared = state["metric"], state["greater"]
        if compared != (self.metric, self.greater):
            logger.info(f"best: evaluations are compared by {self.metric} from here on, anew")
            return
        self.value, self.step, self.waited = state["value"], state["step"], state["waited"]
        if state["kept"] is None:
            return
        known = Path(state["kept"])
        found = [p for p in (path.parent / known.name, known) if damage(p) is None]
        if not found:
            logger.warning(f"best: {known.name}, evaluated best, is gone or damaged")
            return
        self.kept, self.metrics = found[0], state["metrics"]


def require_metric(trainer: Any) -> None:
    """Raise ConfigError if no evaluation will have the metric that says which is best, before a
    step is taken.
    """
    groups = trainer.data.evaluation
    if not trainer.best.wanted or not groups:
        return
    size = trainer.config.per_device_eval_batch_size
    evaluate = partial(trainer.objective.evaluate, max_tokens=trainer.max_tokens, batch_size=size)
    found = evaluate(groups[: 4 * trainer.world.data_size])
    if trainer.best.metric not in found:  # few rows may lack what all of them have
        found = evaluate(groups)
    trainer.best.require(found)


def compare(trainer: Any, found: dict[str, float]) -> None:
    """Hold an evaluation against those before it; a checkpoint follows a better one where
    `save_strategy` is best.
    """
    best, callbacks = trainer.best, trainer.callbacks
    if best.wanted:
        better = best.saw(trainer.world.share(found), trainer.step)
        if trainer.config.save_strategy == "best":
            callbacks.control.should_save = better
        callbacks.best(best.value, best.step, best.kept)
    callbacks.agree()
    if best.stops and trainer.step < trainer.total_steps:
        logger.info(
            f"stopped at step {trainer.step} of {trainer.total_steps}: in {best.waited} "
            f"evaluations {best.metric} has not been better than at step {best.step}"
        )


def take_best(trainer: Any) -> None:
    """Put the weights that were evaluated best into the model, where that is asked for."""
    if not trainer.config.load_best_model_at_end:
        return
    path, own = trainer.best.kept, trainer.output.path
    problem = "no checkpoint was evaluated"
    if path is not None:
        problem = trainer.world.share(damage(path) if trainer.world.first else None)
    if path is None or problem is not None:
        logger.warning(f"best: {problem}; the last weights stay")
        return
    same_folder = path.parent.resolve() == own.resolve()
    if step_of(path) != trainer.step or not same_folder:
        load_any_weights(trainer.model, trainer.config, path)
    if trainer.config.save_total_limit == 1 and same_folder and trainer.world.first:
        for other in checkpoints(own):  # as transformers: the best one alone
            if step_of(other) != step_of(path):
                remove(other)
    trainer.last |= trainer.best.metrics
    name, value = trainer.best.metric, trainer.best.metrics[trainer.best.metric]
    logger.info(f"best: the weights of step {step_of(path)}, {name} {value:.4g}")
