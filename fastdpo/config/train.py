"""One run's configuration: read from YAML and flags, checked as a whole, written back."""

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .checks import check_together, idle_settings
from .keys import Keys
from .source import Given, check_foreign_key, read_flags, read_yaml
from .text import as_yaml, table
from .values import convert, limits, show_short


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Keys):
    """One run's configuration, complete and checked; `fastdpo train --help` explains the keys.

    Raises:
        ConfigError: a value of the wrong type, out of range, or at odds with another one.
    """

    def __new__(cls, **values: Any) -> "TrainConfig":
        """Refuse keys that are not ours as `parse` does; `dataclass` would raise a TypeError."""
        own = cls.key_fields()
        for name in values.keys() - {*own, "origins"}:
            check_foreign_key(name, Given(values[name], cls.__name__), own)
            raise ConfigError(f"{cls.__name__}: {name} does nothing here; leave it out")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, declared in self.key_fields().items():
            object.__setattr__(self, name, self._checked(name, declared))
        check_together(self)

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "TrainConfig":
        """Read `config.yaml --beta 0.2 --max_steps 50`; the file is optional and flags win over it.

        Raises:
            ConfigError: see the class, and for keys that are unknown, gone or not honoured.
        """
        words, given = read_flags(arguments, cls.key_fields())
        if "config" in given:
            words.append(given.pop("config").value)
        if len(words) > 1:
            found = f"{len(words)}: {' '.join(words)}"
            raise ConfigError(f"expected one configuration file, got {found}")
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
        values = {name: entry.value for name, entry in given.items() if name in own}
        return cls(**values, origins={name: given[name].place for name in values})

    def _checked(self, name: str, declared: "Field[Any]") -> Any:
        """The value of `name`, of its declared type and within its rule."""
        raw, about, rule = getattr(self, name), declared.metadata, declared.metadata["rule"]

        def unfit(expected: object, value: Any) -> ConfigError:
            return self.error(name, f"expected {expected}, got {show_short(value)}")

        value = about["prepare"](raw) if about["prepare"] else raw
        try:
            value = convert(value, declared.type)
        except ValueError as error:
            raise unfit(error, raw) from None
        if about["path"] and isinstance(value, str) and value.startswith("~"):
            try:
                value = str(Path(value).expanduser())
            except RuntimeError:
                home = value.split("/")[0]
                raise unfit(f"a path, since {home} is nobody's home directory here", raw) from None
        for item in value if isinstance(value, list) else [value]:
            if item is None or isinstance(item, dict):
                continue
            if limit := limits(item, about["path"]):
                raise unfit(limit, item)
            if rule and not rule.holds(item):
                raise unfit(rule.expected, item)
        return value

    def choose(self, reason: str, **values: Any) -> "TrainConfig":
        """A copy with `values` that were decided at start-up; `reason` becomes their origin."""
        return replace(self, **values, origins={**self.origins, **dict.fromkeys(values, reason)})

    def to_yaml(self) -> str:
        """The whole configuration, by sections; reading it gives an equal one."""
        return as_yaml(self)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml()` to `path`."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def describe(self, defaults: bool = True) -> str:
        """A table of keys, values and origins, those that are not the default first.

        Args:
            defaults: whether to list the keys that have their default too.
        """
        return table(self, defaults)

    def idle_settings(self) -> list[str]:
        """One line for each key that was set and has no effect in this combination."""
        return idle_settings(self)
