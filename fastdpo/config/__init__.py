"""The configuration: typed keys, read from YAML and flags, checked before anything is loaded.

The keys, their meanings and their defaults are those of TRL's `DPOConfig`, `ModelConfig` and
`ScriptArguments` wherever the meaning is the same, so a TRL user's YAML works. Nothing is ignored:
an unknown key, a key of TRL's that is not honoured and a value of the wrong type are errors that
name the file and the line. Importing this module imports neither torch nor transformers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_origin

from ..errors import ConfigError
from .adapters import AdapterKeys
from .checks import ONE_FILE, check_together
from .declare import GROUPS, default_of
from .inputs import DataKeys, LossKeys, ModelKeys, OwnKeys, ReferenceKeys
from .memory import MemoryKeys
from .optimizer import OptimizerKeys
from .peers import PEER_KEYS
from .schedule import EvaluationKeys, LoggingKeys, SavingKeys, TrainingKeys
from .source import Given, check_foreign_key, read_flags, read_yaml
from .text import as_yaml, table
from .values import convert, limits, members_of, show_short

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    # Dataclasses take inherited fields from the last base first: the sections stand in reverse.
    SavingKeys,
    LoggingKeys,
    EvaluationKeys,
    OptimizerKeys,
    TrainingKeys,
    MemoryKeys,
    AdapterKeys,
    OwnKeys,
    LossKeys,
    ReferenceKeys,
    DataKeys,
    ModelKeys,
):
    """One run's configuration, complete and checked; `fastdpo train --help` explains the keys.

    Attributes:
        origins: where each key that was given stood (`config.yaml, line 3`, `--beta`); every other
            key has its default.

    Raises:
        ConfigError: a value of the wrong type, out of range, or at odds with another one.
    """

    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, declared in self.key_fields().items():
            object.__setattr__(self, name, self._checked(name, declared))
        check_together(self)

    @classmethod
    def key_fields(cls) -> "dict[str, Field[Any]]":
        """Every key with its declaration, in the order of the sections in `GROUPS`."""
        declared = [item for item in fields(cls) if "group" in item.metadata]
        order = list(GROUPS)
        declared.sort(key=lambda item: order.index(item.metadata["group"]))
        return {item.name: item for item in declared}

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "TrainConfig":
        """Read `config.yaml --beta 0.2 --max_steps 50`; the file is optional and flags win over it.

        Raises:
            ConfigError: see the class, and for keys that are unknown, gone or not honoured.
        """
        own = cls.key_fields()
        flags = {name for name, item in own.items() if bool in members_of(item.type)}
        flags |= {name for name, peer in PEER_KEYS.items() if isinstance(peer.default, bool)}
        lists = {
            name
            for name, item in own.items()
            if any(get_origin(member) is list for member in members_of(item.type))
        }
        valued = {*own, *PEER_KEYS, "config"} - flags
        words, given = read_flags(arguments, flags, lists, valued)
        if "config" in given:
            words.append(given.pop("config").value)
        if len(words) > 1:
            raise ConfigError(
                f"expected one configuration file, got {len(words)}: {' '.join(words)}"
            )
        return cls._build({**(read_yaml(words[0]) if words else {}), **given})

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """Read a YAML file, such as one that `save` wrote."""
        return cls._build(read_yaml(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], place: str = "configuration") -> "TrainConfig":
        """Check `values` as `parse` does, unknown keys included; `place` names them in errors."""
        return cls._build({name: Given(value, place) for name, value in values.items()})

    @classmethod
    def _build(cls, given: Mapping[str, Given]) -> "TrainConfig":
        own = cls.key_fields()
        for name, entry in given.items():
            if name not in own:
                check_foreign_key(name, entry, own)
        mine = {name: entry for name, entry in given.items() if name in own}
        origins = {name: entry.place for name, entry in mine.items()}
        return cls(**{name: entry.value for name, entry in mine.items()}, origins=origins)

    def _checked(self, name: str, declared: "Field[Any]") -> Any:
        """The value of `name`, of its declared type, within its rule and its choices."""
        raw, about = getattr(self, name), declared.metadata
        value = about["prepare"](raw) if about["prepare"] else raw
        try:
            value = convert(value, declared.type)
        except ValueError as error:
            raise self.error(name, f"expected {error}, got {show_short(raw)}") from None
        if about["path"] and isinstance(value, str) and value.startswith("~"):
            try:
                value = str(Path(value).expanduser())
            except RuntimeError:
                expected = f"a path, since {value.split('/')[0]} is nobody's home directory here"
                raise self.error(name, f"expected {expected}, got {show_short(raw)}") from None
        for item in value if isinstance(value, list) else [value]:
            if item is None or isinstance(item, dict):
                continue
            if limit := limits(item, about["path"]):
                raise self.error(name, f"expected {limit}, got {show_short(item)}")
            if about["choices"] and item not in about["choices"]:
                known = ", ".join(about["choices"])
                one_of = "one of " if len(about["choices"]) > 1 else ""
                raise self.error(name, f"expected {one_of}{known}, got {show_short(item)}")
            if about["rule"] and not about["rule"].holds(item):
                raise self.error(name, f"expected {about['rule'].expected}, got {show_short(item)}")
        return value

    def error(self, name: str, problem: str) -> ConfigError:
        """A `ConfigError` about one key, which says where the key was given."""
        place = self.origins.get(name, "")
        if place == f"--{name}":
            return ConfigError(f"{place}: {problem}")
        return ConfigError(f"{place}: {name}: {problem}" if place else f"{name}: {problem}")

    def require(self, *names: str) -> None:
        """Raise `ConfigError` unless each of these keys has a value."""
        for name in names:
            if getattr(self, name) is None:
                what = self.key_fields()[name].metadata["help"].split(". ")[0]
                raise self.error(
                    name, f"expected a value (--{name}, or {name}: in the file). {what}"
                )

    def choose(self, reason: str, **values: Any) -> "TrainConfig":
        """A copy with `values` that were decided at start-up; `reason` becomes their origin."""
        return replace(self, **values, origins={**self.origins, **dict.fromkeys(values, reason)})

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates at all."""
        return self.do_eval or self.eval_on_start or self.eval_strategy != "no"

    @property
    def eval_source(self) -> tuple[str, str] | None:
        """The data set and the split to evaluate on; None where nothing is evaluated.

        A file of `eval_dataset_name` is evaluated whole unless `dataset_test_split` names a part.
        """
        name = self.eval_dataset_name or self.dataset_name
        if not self.evaluates or name is None:
            return None
        whole = self.eval_dataset_name is not None and name.endswith(ONE_FILE)
        return (
            name,
            "train" if whole and self.dataset_test_split == "test" else self.dataset_test_split,
        )

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
        """Every key with its value, as plain types."""
        return {name: getattr(self, name) for name in self.key_fields()}

    def to_yaml(self) -> str:
        """The whole configuration, by sections; reading it gives an equal one."""
        return as_yaml(self)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml()` to `path`."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def describe(self, defaults: bool = True) -> str:
        """A table of keys, values and origins, those that are not the default first.

        Settings that have no effect in this combination follow, one line each.

        Args:
            defaults: whether to list the keys that have their default too.
        """
        return table(self, defaults)
