"""How one configuration key is declared: its default, what it does, and which values it takes.

A key's type is its annotation, its rule a predicate with the words that describe it, so that the
error message, the help text and the check all come from the same place.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass
from typing import Any

GROUPS = {
    "model": "Model",
    "data": "Data",
    "reference": "Reference",
    "loss": "Loss",
    "own": "fastdpo's own (no such key in TRL)",
    "adapters": "Adapters",
    "memory": "Memory",
    "training": "Training",
    "evaluation": "Evaluation",
    "logging": "Logging",
    "saving": "Saving",
}
"""Section names in the order in which help, YAML and tables show them, with their headings."""


@dataclass(frozen=True)
class Rule:
    """A condition on one value (on each item, for a list), with the words an error uses for it."""

    expected: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("a number greater than 0", lambda v: v > 0)
NOT_NEGATIVE = Rule("a number of at least 0", lambda v: v >= 0)
AT_LEAST_ONE = Rule("a whole number of at least 1", lambda v: v >= 1)
AT_LEAST_TWO = Rule("a whole number of at least 2", lambda v: v >= 2)
SHARE = Rule("a number of at least 0 and less than 1", lambda v: 0 <= v < 1)
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
    group: str,
    help: str,
    *,
    rule: Rule | None = None,
    choices: tuple[str, ...] | None = None,
    path: bool = False,
    prepare: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """The metadata of a dataclass field that makes it a configuration key.

    Args:
        group: the section it is shown in, one of `GROUPS`.
        help: one or two sentences for `--help`.
        rule: a condition on the converted value (on each item of a list); None is never checked.
        choices: the texts it may take.
        path: whether a leading `~` stands for the home directory.
        prepare: applied to the raw value before its type is checked.
    """
    return {
        "group": group,
        "help": help,
        "rule": rule,
        "choices": choices,
        "path": path,
        "prepare": prepare,
    }


def default_of(declared: "Field[Any]") -> Any:
    """The default of a dataclass field, whether it is a value or made by a factory."""
    if callable(declared.default_factory):
        return declared.default_factory()
    return declared.default


def yaml_no(value: Any) -> Any:
    """Give a strategy its word back: a bare `no` in YAML 1.1 arrives as False."""
    return "no" if value is False else value


def trackers(value: Any) -> Any:
    """The spellings of "report nowhere" (null, `none`, an empty list) as an empty list."""
    return [] if value in (None, "none", "None", ["none"]) else value
