"""Which rows of a head each rank of a group holds."""

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Shards:
    """Rows of the weight, which are columns of the logits, of every rank, one after the other."""

    columns: list[int]

    @property
    def starts(self) -> list[int]:
        """The first token of each rank's."""
        return [0, *accumulate(self.columns)][:-1]

    @property
    def vocab(self) -> int:
        """V."""
        return sum(self.columns)

    def without_padding(self, vocab: int) -> "Shards":
        """The same with nothing from token `vocab` on."""
        pairs = zip(self.starts, self.columns, strict=True)
        return Shards([max(0, min(count, vocab - start)) for start, count in pairs])
