"""What became of the rows of a data set, as a run says it."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from .encode import (
    BAD,
    IDENTICAL,
    KEPT,
    NO_COMPARISON,
    ONE_RESPONSE,
    PROMPT_TOO_LONG,
    SAME_RANKS,
)
from .notes import COUNTED, UNREAD_COLUMN, WARNINGS
from .readers import row_label

logger = logging.getLogger(__name__)

_REASONS = 5


@dataclass(frozen=True)
class TokenizeReport:
    """What became of the rows; `rows_in` is the sum of `rows_out`, the dropped and the skipped.

    Attributes:
        source: what the rows came from.
        rows_in: rows before.
        rows_out: rows after.
        dropped_prompt_too_long: rows whose prompt alone reaches `max_length`.
        dropped_no_comparison: groups whose scores are all equal or that state no comparison, where
            the loss is one of comparisons.
        dropped_one_response: groups of one response, where the loss weighs it against others.
        dropped_same_ranks: groups whose responses all share one rank, where it is one of rankings.
        skipped: rows that cannot be trained on, those with identical responses among them.
        identical_pairs: skipped rows that compare two identical responses.
        noted: rows of which there is something to say, by what that is (`fastdpo.data.notes`).
        reasons: the first few reasons for skipping, each with its row.
        conversion: what `convert` made of the rows that were there before `rows_in`.
    """

    source: str
    rows_in: int
    rows_out: int
    dropped_prompt_too_long: int = 0
    dropped_no_comparison: int = 0
    dropped_one_response: int = 0
    dropped_same_ranks: int = 0
    skipped: int = 0
    identical_pairs: int = 0
    noted: Counter[str] = field(default_factory=Counter)
    reasons: tuple[str, ...] = ()
    conversion: str = ""

    def __str__(self) -> str:
        """One line that names only what happened."""
        counts = {
            "dropped, the prompt alone reaching max_length": self.dropped_prompt_too_long,
            "dropped without a comparison": self.dropped_no_comparison,
            "dropped, one response only": self.dropped_one_response,
            "dropped, all ranks equal": self.dropped_same_ranks,
            "skipped as bad": self.skipped - self.identical_pairs,
            "skipped with identical responses": self.identical_pairs,
        }
        counts |= {what: self.noted[note] for note, what in COUNTED.items()}
        notes = "".join(f"; {count} {what}" for what, count in counts.items() if count)
        made = f"{self.conversion}; " if self.conversion else ""
        return f"{self.source}: {made}{self.rows_out} of {self.rows_in} rows kept{notes}"

    def warn(self, watched: Sequence[str]) -> None:
        """Log why rows were skipped, and a line for each kind of row that is not as it seems.

        Args:
            watched: the columns that are not read, but may hold a part of the prompt.
        """
        for reason in self.reasons:
            logger.warning("skipped: %s", reason)
        for note, text in WARNINGS.items():
            if count := self.noted[note]:
                names = f" ({', '.join(watched)})" if note == UNREAD_COLUMN else ""
                logger.warning(
                    "%s: in %d of %d rows %s%s", self.source, count, self.rows_in, text, names
                )


def make_report(
    encoded: datasets.Dataset, source: str, num_rows: int, conversion: str = ""
) -> TokenizeReport:
    """Count what an `Encoder` noted of every row.

    Args:
        encoded: what it made.
        source: what to call the data.
        num_rows: rows of the whole data set before a conversion.
        conversion: see `TokenizeReport`.
    """
    table: Mapping[str, Any] = encoded.data
    outcome = table["outcome"].to_numpy()
    counts = np.bincount(outcome, minlength=SAME_RANKS + 1)
    reasons = []
    for index in np.flatnonzero((outcome == BAD) | (outcome == IDENTICAL))[:_REASONS].tolist():
        row, line = (table[name][index].as_py() for name in ("row", "line"))
        label = row_label(source, row, num_rows, line)
        reasons.append(f"{label}: {table['reason'][index].as_py()}")
    notes = (note for chunk in table["notes"].chunks for note in chunk.flatten().to_pylist())
    return TokenizeReport(
        source=source,
        rows_in=len(outcome),
        rows_out=int(counts[KEPT]),
        dropped_prompt_too_long=int(counts[PROMPT_TOO_LONG]),
        dropped_no_comparison=int(counts[NO_COMPARISON]),
        dropped_one_response=int(counts[ONE_RESPONSE]),
        dropped_same_ranks=int(counts[SAME_RANKS]),
        skipped=int(counts[BAD] + counts[IDENTICAL]),
        identical_pairs=int(counts[IDENTICAL]),
        noted=Counter(notes),
        reasons=tuple(reasons),
        conversion=conversion,
    )
