"""One run's configuration: read from YAML and flags, checked as a whole, written back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import Self

from ..errors import ConfigError
from .checks import check_together, idle_settings
from .files import Given, read_yaml
from .keys import IN_PYTHON, Keys
from .loss_checks import how_loss_was_read
from .losses import CPO_KEYS, CPO_ORIGIN, KTO_KEYS, KTO_ORIGIN, as_cpo
from .source import check_foreign_key, read_flags, with_peers
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
        made = super().__new__(cls)
        if "origins" not in values:
            named = [name for name in ("loss_type", *CPO_KEYS) if name in values]
            object.__setattr__(made, "_named", named)
        return made

    def __post_init__(self) -> None:
        # That a default was written down matters for these keys, in Python too.
        named = vars(self).get("_named", ())
        self._set(origins={**dict.fromkeys(named, IN_PYTHON), **self.origins})
        for name, declared in self.key_fields().items():
            self._set(**{name: self._checked(name, declared)})
        self._read_as_cpo()
        self._read_as_kto()
        check_together(self)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _read_as_cpo(self) -> None:
        """Rename the loss where the other keys are those of TRL's CPO trainer."""
        given = [name for name in CPO_KEYS if name in self.origins]
        if "cpo_alpha" in given and self.cpo_alpha is None:  # as in what `save` writes
            given = []
        if changed := as_cpo(self.loss_type, given):
            self._set(**changed, origins={**self.origins, **dict.fromkeys(changed, CPO_ORIGIN)})

    def _read_as_kto(self) -> None:
        """Name the loss where none is named and the other keys are those of TRL's KTO trainer."""
        if "loss_type" not in self.origins and any(name in self.origins for name in KTO_KEYS):
            self._set(loss_type=["kto"], origins={**self.origins, "loss_type": KTO_ORIGIN})

    @classmethod
    def parse(cls, arguments: Sequence[str], flags: Iterable[str] = ()) -> Self:
        """Read `config.yaml --beta 0.2 --max_steps 50`; the file is optional and flags win over it.

        Args:
            arguments: the command line, without the command and its own flags.
            flags: those, which an unknown key may have meant.

        Raises:
            ConfigError: see the class, and for keys that are unknown, gone or not honoured.
        """
        words, given = read_flags(arguments, cls.key_fields())
        if "config" in given:
            words.append(given.pop("config").value)
        if len(words) > 1:
            found = f"{len(words)}: {' '.join(words)}"
            raise ConfigError(f"expected one configuration file, got {found}")
        return cls._build({**(read_yaml(words[0]) if words else {}), **given}, flags)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file, such as one that `save` wrote."""
        return cls._build(read_yaml(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], place: str = "configuration") -> Self:
        """Check `values` as `parse` does, unknown keys included; `place` names them in errors."""
        return cls._build({name: Given(value, place) for name, value in values.items()})

    @classmethod
    def _build(cls, given: Mapping[str, Given], flags: Iterable[str] = ()) -> Self:
        own = cls.key_fields()
        for name, entry in given.items():
            if name not in own:
                check_foreign_key(name, entry, [*own, *flags])
        given = with_peers(given)
        values = {name: entry.value for name, entry in given.items() if name in own}
        return cls(**values, origins={name: given[name].place for name in values})

    def _checked(self, name: str, declared: "Field[Any]") -> Any:
        """The value of `name`, of its declared type and within its rule."""
        raw, about, rule = getattr(self, name), declared.metadata, declared.metadata["rule"]

        def unfit(expected: object, value: Any) -> ConfigError:
            got = "another value" if about["secret"] else show_short(value)
            return self.error(name, f"expected {expected}, got {got}")

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

    def choose(self, reason: str, **values: Any) -> Self:
        """A copy with `values` that were decided at start-up; `reason` becomes their origin."""
        return replace(self, **values, origins={**self.origins, **dict.fromkeys(values, reason)})

    def for_layout(self, kinds: Sequence[str]) -> "TrainConfig":
        """This configuration for the rows that were found: labelled ones are for kto where no
        `loss_type` was given.

        Args:
            kinds: the layouts that the rows hold: "pair", "group", "label".
        """
        converted = {"unpair": ("label",), "pair": ("group",)}
        labelled = tuple(converted.get(self.convert or "", kinds)) == ("label",)
        if not labelled or "loss_type" in self.origins:
            return self
        return self.choose("the data's layout", loss_type=["kto"])

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

    def notes(self) -> list[str]:
        """What a run says first: how the loss was read, and the keys that have no effect."""
        return [*how_loss_was_read(self), *self.idle_settings()]
