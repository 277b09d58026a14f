"""The name of several data sets read as one, which knows whose each row is."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A data set within a mixture.

    Attributes:
        name: of the data set.
        num_rows: that it has.
        taken: the rows that are in the mixture; None for all of them.
    """

    name: str
    num_rows: int
    taken: Sequence[int] | None = None

    @property
    def length(self) -> int:
        """Rows in the mixture."""
        return self.num_rows if self.taken is None else len(self.taken)


class Mixture(str):
    """The name of a mixture of data sets, which knows whose each of its rows is."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "Mixture":
        """The name of these data sets, one after the other."""
        made = cls(" + ".join(part.name for part in parts))
        made.parts = tuple(parts)
        return made

    def locate(self, row: int) -> tuple[str, int, int]:
        """A row's data set, its index there, and how many rows that one has."""
        for part in self.parts:
            if row < part.length:
                return part.name, row if part.taken is None else part.taken[row], part.num_rows
            row -= part.length
        raise IndexError(row)
