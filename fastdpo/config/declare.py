"""How one configuration key is declared: its default, what it does, and which values it takes.

A key's type is its annotation, its rule a predicate with the words that describe it, so that the
error message, the help text and the check all come from the same place.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from typing_extensions import dataclass_transform

T = TypeVar("T")

GROUPS = {
    "model": "Model",
    "data": "Data",
    "reference": "Reference",
    "loss": "Loss",
    "own": "fastdpo's own (no such key in TRL)",
    "adapters": "Adapters",
    "memory": "Memory",
    "parallel": "Many devices",
    "training": "Training",
    "evaluation": "Evaluation",
    "logging": "Logging",
    "saving": "Saving",
    "hub": "Hub",
    "rounds": "Rounds (of `fastdpo rounds` alone)",
}
"""Section names in the order in which help, YAML and tables show them, with their headings."""


@dataclass(frozen=True)
class Rule:
    """A condition on one value (on each item, for a list), with the words an error uses for it.

    Attributes:
        expected: what was expected, where the value is another one.
        holds: the condition, on a value of the right type.
        choices: the texts that fulfil it; None where it is about numbers, or any text may.
    """

    expected: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] | None = None


def one_of(*choices: str, unset: str | None = None) -> Rule:
    """The rule of a key that takes one of these texts; `unset` says what it is left out for."""
    expected = f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    expected += f", or nothing {unset}" if unset else ""
    return Rule(expected, choices.__contains__, choices)


POSITIVE = Rule("a number greater than 0", lambda v: v > 0)
NOT_NEGATIVE = Rule("a number of at least 0", lambda v: v >= 0)
AT_LEAST_ONE = Rule("a whole number of at least 1", lambda v: v >= 1 and v == int(v))
AT_LEAST_TWO = Rule("a whole number of at least 2", lambda v: v >= 2)
SHARE = Rule("a number of at least 0 and less than 1", lambda v: 0 <= v < 1)
FRACTION = Rule("a number from 0 to 1", lambda v: 0 <= v <= 1)
BELOW_HALF = Rule("a number of at least 0 and less than 0.5", lambda v: 0 <= v < 0.5)
SEED = Rule("a whole number from 0 to 4294967295", lambda v: 0 <= v < 2**32)
STEPS_OR_UNSET = Rule(
    "a whole number of at least 1, or -1 for no limit", lambda v: v == -1 or v >= 1
)
EPOCHS = Rule("a number greater than 0 and at most 1e9", lambda v: 0 < v <= 1e9)
NOT_BLANK = Rule("a text that is not empty", lambda v: bool(v.strip()))
INTERVAL = Rule(
    "a whole number of steps of at least 1, or a share of the run between 0 and 1",
    lambda v: 0 < v < 1 or (v >= 1 and v == int(v)),
)
WARMUP = Rule(
    "a whole number of steps, or a share of the run of at least 0 and less than 1",
    lambda v: 0 <= v < 1 or (v >= 1 and v == int(v)),
)


def key(
    default: T,
    help: str,
    rule: Rule | None = None,
    *,
    path: bool = False,
    prepare: Callable[[Any], Any] | None = None,
    secret: bool = False,
) -> T:
    """Declare a key in a class that `section` decorates.

    Args:
        default: its default.
        help: one or two sentences for `--help` and the documentation.
        rule: a condition on the converted value (on each item of a list).
        path: whether a leading `~` stands for the home directory.
        prepare: applied to the raw value before its type is checked.
        secret: whether its value is neither shown nor written.
    """
    choices = rule.choices if rule else None
    about = {"help": help, "rule": rule, "choices": choices, "path": path, "prepare": prepare}
    about["secret"] = secret
    if not isinstance(default, list):
        return field(default=default, metadata=about, repr=not secret)
    made: Any = field(default_factory=default.copy, metadata=about)
    return made


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(group: str) -> Callable[[type[T]], type[T]]:
    """Make a class of keys a dataclass whose keys are shown in this section, one of `GROUPS`."""

    def declare(keys: type[T]) -> type[T]:
        for declared in vars(keys).values():
            if isinstance(declared, Field):
                declared.metadata = MappingProxyType({**declared.metadata, "group": group})
        return dataclass(frozen=True, kw_only=True)(keys)

    return declare


def default_of(declared: "Field[Any]") -> Any:
    """The default of a dataclass field, whether it is a value or made by a factory."""
    if callable(declared.default_factory):
        return declared.default_factory()
    return declared.default
