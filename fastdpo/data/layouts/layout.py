"""What a layout is, and what was found of one in a data set."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .asking import Names
from .sample import Sample


@dataclass(frozen=True)
class Reading:
    """How the rows of a data set are read.

    Attributes:
        layout: the name of the layout.
        names: the column of each part, and settings of `function`.
        function: makes the canonical fields of a row; None where they stand there already.
        hint: what else is to be said of it.
        plain: columns whose texts are no JSON, whatever they look like.
    """

    layout: str
    names: Names
    function: Callable[[Mapping[str, Any], Names], dict[str, Any]] | None = None
    hint: str = ""
    plain: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        listed: list[str] = []
        for part, name in self.names.items():
            if part == "wins":
                listed += name.split()
            elif part not in ("way", "as", "text", "said"):
                listed += map(str, name) if isinstance(name, list) else [name]
        return list(dict.fromkeys(listed))


@dataclass(frozen=True)
class Ambiguous:
    """Two readings that the columns allow.

    Attributes:
        problem: what cannot be told.
        readings: what the rows may mean, each with what to write for it.
    """

    problem: str
    readings: tuple[tuple[str, str], tuple[str, str]]


Found = Reading | Ambiguous | None


@dataclass(frozen=True)
class Layout:
    """One way in which data sets of preferences are laid out.

    Attributes:
        name: that the key `layout` takes.
        origin: whose it is.
        columns: that it has, for the documentation; those in brackets may be missing.
        find: tells whether a data set has it; the second argument is whether `layout` names it.
        example: a row.
    """

    name: str
    origin: str
    columns: str
    find: Callable[[Sample, bool], Found]
    example: Mapping[str, Any]
