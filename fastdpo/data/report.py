"""What became of the rows of a data set, as a run says it."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from .encode import BAD, IDENTICAL, KEPT, NO_COMPARISON, PROMPT_TOO_LONG
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
        dropped_no_comparison: groups whose scores are all equal or that state no comparison.
        skipped: rows that cannot be trained on, those with identical responses among them.
        identical_pairs: skipped rows that compare two identical responses.
        truncated: rows with a response cut to `max_length`.
        identical_after_truncation: rows kept although two compared responses differ only in what
            was cut off; they have no gradient.
        empty_prompt: rows whose prompt says nothing.
        empty_response: rows with a response that is nothing but its end.
        boundary_moved: rows whose tokenised prompt is not how the full sequence begins.
        prompt_repeated: rows whose responses begin with the prompt, which was taken once.
        prompt_twice: rows whose texts begin with the prompt, which was left there twice.
        prompt_as_message: rows whose prompt is text and was read as a user's message.
        unread_column: rows with text in a column that may belong to the prompt and is not read.
        not_the_assistant: rows with a response that begins or ends with another's message.
        tools_ignored: rows of whose tools nothing is rendered.
        content_dropped: rows of which the chat template drops or rewrites a part.
        double_bos: rows whose tokens begin with BOS twice.
        double_eos: rows with a response that ends with EOS twice.
        reasons: the first few reasons for skipping, each with its row.
    """

    source: str
    rows_in: int
    rows_out: int
    dropped_prompt_too_long: int = 0
    dropped_no_comparison: int = 0
    skipped: int = 0
    identical_pairs: int = 0
    truncated: int = 0
    identical_after_truncation: int = 0
    empty_prompt: int = 0
    empty_response: int = 0
    boundary_moved: int = 0
    prompt_repeated: int = 0
    prompt_twice: int = 0
    prompt_as_message: int = 0
    unread_column: int = 0
    not_the_assistant: int = 0
    tools_ignored: int = 0
    content_dropped: int = 0
    double_bos: int = 0
    double_eos: int = 0
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line that names only what happened."""
        counts = {
            "dropped, the prompt alone reaching max_length": self.dropped_prompt_too_long,
            "dropped without a comparison": self.dropped_no_comparison,
            "skipped as bad": self.skipped - self.identical_pairs,
            "skipped with identical responses": self.identical_pairs,
        }
        counts |= {what: getattr(self, note) for note, what in COUNTED.items()}
        notes = "".join(f"; {count} {what}" for what, count in counts.items() if count)
        return f"{self.source}: {self.rows_out} of {self.rows_in} rows kept{notes}"

    def warn(self, watched: Sequence[str]) -> None:
        """Log why rows were skipped, and a line for each kind of row that is not as it seems.

        Args:
            watched: the columns that are not read, but may hold a part of the prompt.
        """
        for reason in self.reasons:
            logger.warning("skipped: %s", reason)
        for note, text in WARNINGS.items():
            if count := getattr(self, note):
                names = f" ({', '.join(watched)})" if note == UNREAD_COLUMN else ""
                logger.warning(
                    "%s: in %d of %d rows %s%s", self.source, count, self.rows_in, text, names
                )


def make_report(encoded: datasets.Dataset, source: str) -> TokenizeReport:
    """Count what an `Encoder` noted of every row."""
    table: Mapping[str, Any] = encoded.data
    outcome = table["outcome"].to_numpy()
    counts = np.bincount(outcome, minlength=NO_COMPARISON + 1)
    reasons = []
    for index in np.flatnonzero((outcome == BAD) | (outcome == IDENTICAL))[:_REASONS].tolist():
        label = row_label(source, index, len(outcome), table["line"][index].as_py())
        reasons.append(f"{label}: {table['reason'][index].as_py()}")
    notes = Counter(note for chunk in table["notes"].chunks for note in chunk.flatten().to_pylist())
    return TokenizeReport(
        source=source,
        rows_in=len(outcome),
        rows_out=int(counts[KEPT]),
        dropped_prompt_too_long=int(counts[PROMPT_TOO_LONG]),
        dropped_no_comparison=int(counts[NO_COMPARISON]),
        skipped=int(counts[BAD] + counts[IDENTICAL]),
        identical_pairs=int(counts[IDENTICAL]),
        reasons=tuple(reasons),
        **notes,
    )
