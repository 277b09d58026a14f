"""What a check found."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

LEVELS = ("error", "warning", "note")
Level = Literal["error", "warning", "note"]
EXAMPLES = 5
_SHOWN = 160


@dataclass(frozen=True)
class Finding:
    """One thing that was found in a data set.

    Attributes:
        name: of the check, in snake_case.
        level: "error" for rows that are surely wrong, "warning" for what often spoils a model,
            "note" for what is good to know.
        count: how many there are.
        of: of how many.
        text: a sentence.
        examples: rows from 1, each with a text.
        rows: all rows, from 1, where single rows are meant.
    """

    name: str
    level: Level
    count: int
    of: int
    text: str
    examples: tuple[tuple[int, str], ...] = ()
    rows: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "level": self.level,
            "count": self.count,
            "share": round(self.count / self.of, 6) if self.of else 0.0,
            "text": self.text,
            "examples": [{"row": row, "text": text} for row, text in self.examples],
            "rows": list(self.rows),
        }


def shown(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 4]} ..."


def of_rows(
    name: str, level: Level, found: Sequence[tuple[int, str]], of: int, text: str
) -> Iterable[Finding]:
    """A finding about these rows, each with a text that shows it; none where there are none."""
    if found:
        rows = tuple(dict.fromkeys(row for row, _ in found))
        examples = tuple((row, shown(example)) for row, example in found[:EXAMPLES])
        yield Finding(name, level, len(rows), of, text, examples, rows)
