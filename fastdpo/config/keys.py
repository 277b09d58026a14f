"""All keys with their values, and what follows from them for a run."""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from ..errors import ConfigError
from .adapters import AdapterKeys
from .declare import default_of
from .hub import HubKeys
from .inputs import DataKeys, ModelKeys, OwnKeys
from .losses import traits_of
from .memory import MemoryKeys
from .objective import LossKeys, ReferenceKeys
from .optimizer import OptimizerKeys
from .parallel import ParallelKeys
from .schedule import EvaluationKeys, LoggingKeys, SavingKeys, TrainingKeys

ONE_FILE = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".gz", ".zst")
"""How the name of a data set ends that is one file; all its rows are the split "train"."""

IN_PYTHON = "given"
"""The origin of a key that was given to `TrainConfig` itself, which has no place to name."""


@dataclass(frozen=True, kw_only=True)
class Keys(
    # Dataclasses take inherited fields from the last base first: the sections stand in reverse.
    HubKeys,
    SavingKeys,
    LoggingKeys,
    EvaluationKeys,
    OptimizerKeys,
    TrainingKeys,
    ParallelKeys,
    MemoryKeys,
    AdapterKeys,
    OwnKeys,
    LossKeys,
    ReferenceKeys,
    DataKeys,
    ModelKeys,
):
    """The keys of all sections, as they were given: `TrainConfig` is the same, checked.

    Attributes:
        origins: where each key that was given stood (`config.yaml, line 3`, `--beta`); every other
            key has its default.
    """

    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def key_fields(cls) -> "dict[str, Field[Any]]":
        """Every key with its declaration, in the order of the sections in `GROUPS`."""
        return {item.name: item for item in fields(cls) if "group" in item.metadata}

    def error(self, name: str, problem: str) -> ConfigError:
        """A `ConfigError` about one key, which says where the key was given."""
        place = self.origins.get(name, "").replace(IN_PYTHON, "")
        if place == f"--{name}":
            return ConfigError(f"{place}: {problem}")
        return ConfigError(f"{place}: {name}: {problem}" if place else f"{name}: {problem}")

    def require(self, *names: str) -> None:
        """Raise `ConfigError` unless each of these keys has a value; `datasets` is one for
        `dataset_name`.
        """
        for name in names:
            if name == "dataset_name" and self.datasets:
                continue
            if getattr(self, name) is None:
                what = self.key_fields()[name].metadata["help"].split(". ")[0]
                expected = f"expected a value (--{name}, or {name}: in the file)"
                raise self.error(name, f"{expected}. {what}")

    def check_contexts(self, devices: int) -> None:
        """Raise `ConfigError` where so many devices do not divide into groups of `cp_size`."""
        if devices % self.cp_size:
            raise self.error(
                "cp_size",
                f"{self.cp_size} devices share each row, and the run has {devices}; set devices to "
                "a multiple of it, or start the run with torchrun",
            )

    @property
    def needs_reference(self) -> bool:
        """Whether a loss of the run compares with a reference; true of a loss nobody knows."""
        losses = [traits_of(name) for name in self.loss_type]
        return any(loss is None or loss.reference for loss in losses)

    @property
    def precomputes(self) -> bool:
        """Whether the log-probabilities of a reference are computed before training."""
        if self.precompute_ref_log_probs is None:
            return not self.sync_ref_model
        return self.precompute_ref_log_probs

    @property
    def shuffles(self) -> bool:
        """Whether the groups are shuffled at each epoch."""
        if self.shuffle is None:
            return not (self.mismatched_losses or "apo_zero_unpaired" in self.loss_type)
        return self.shuffle

    @property
    def mismatched_losses(self) -> list[str]:
        """The losses that pair prompts with completions of other rows, in the file's order."""
        losses = {name: traits_of(name) for name in self.loss_type}
        return [name for name, loss in losses.items() if loss is not None and loss.mismatched]

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates at all."""
        return self.do_eval or bool(self.eval_on_start) or self.eval_strategy != "no"

    @property
    def finds_best(self) -> bool:
        """Whether evaluations are compared, to find the best one."""
        if self.metric_for_best_model is not None and self.eval_strategy != "no":
            return True
        stops = self.early_stopping_patience is not None
        return stops or self.load_best_model_at_end or self.save_strategy == "best"

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The metric that says which evaluation is best, under the name that it has in the log, and
        whether more of it is better.
        """
        name = (self.metric_for_best_model or "loss").removeprefix("eval_")
        greater = self.greater_is_better
        return f"eval_{name}", not name.endswith("loss") if greater is None else greater

    @property
    def eval_source(self) -> tuple[str, str] | None:
        """The data set and the split to evaluate on; None where nothing is evaluated.

        A file of `eval_dataset_name` is evaluated whole unless `dataset_test_split` names a part.
        """
        name = self.eval_dataset_name or self.dataset_name
        if not self.evaluates or name is None:
            return None
        split = self.dataset_test_split
        if self.eval_dataset_name and name.endswith(ONE_FILE) and split == "test":
            split = "train"
        return name, split

    def interval(self, name: str, total_steps: int) -> int:
        """`logging_steps`, `save_steps` or `eval_steps` in steps; a share is of `total_steps`.

        An unset `eval_steps` is `logging_steps`, as in transformers.
        """
        value = getattr(self, name)
        if value is None:
            value = self.logging_steps
        return max(1, math.ceil(total_steps * value)) if value < 1 else int(value)

    def warmup(self, total_steps: int) -> int:
        """`warmup_steps` in steps; a share is of `total_steps`."""
        value = self.warmup_steps
        return math.ceil(total_steps * value) if value < 1 else int(value)

    def changed(self) -> dict[str, Any]:
        """The keys whose value is not the default."""
        return {
            name: getattr(self, name)
            for name, declared in self.key_fields().items()
            if getattr(self, name) != default_of(declared)
        }

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as plain types; of a secret, its name in place of it."""
        return {name: self._shown(name) for name in self.key_fields()}

    def _shown(self, name: str) -> Any:
        value = getattr(self, name)
        if value is None or not self.key_fields()[name].metadata["secret"]:
            return value
        return f"<{name.upper()}>"
