"""Raw rows to the groups that are scored: one prompt with its distinct responses, of as many rows
as stand near each other.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..config import TrainConfig
from ..data.columns import (
    LINE_COLUMN,
    PREFERENCES,
    PROBLEM_COLUMN,
    RESPONSES,
    RowKind,
    may_hold_prompt,
    other_texts,
    row_kinds,
)
from ..data.encode import KEPT, PROMPT_TOO_LONG, Encoder
from ..data.groups import Group
from ..data.mixture import each_once, load_mixture
from ..data.needs import NOTHING
from ..data.notes import TRUNCATED
from ..data.prompts import repeats_prompt

READERS_OWN = (LINE_COLUMN, PROBLEM_COLUMN)
WINDOW = 2048
"""Rows that are tokenised together; of those, the ones with the same prompt make one group."""


@dataclass(frozen=True)
class ScoredRow:
    """A row in a window of groups.

    Attributes:
        group: its group's number.
        places: each of its responses in that group.
        comparisons: (winner, loser) among its own responses, as the row states them.
        label: whether its response is a good one, where it says that.
        reason: why it cannot be scored; it has no responses then.
        too_long: whether that is a prompt of `max_length` tokens or more.
        cut: whether a response is scored up to `max_length` alone.
    """

    group: int = 0
    places: tuple[int, ...] = ()
    comparisons: tuple[tuple[int, int], ...] = ()
    label: bool | None = None
    reason: str | None = None
    too_long: bool = False
    cut: bool = False


def read_mixture(config: TrainConfig) -> tuple[datasets.Dataset, str]:
    """The rows of the key `datasets`, each once, and a name that knows whose they are.

    Raises:
        DataError: data sets that cannot be read, or not as one.
    """
    name, rows = load_mixture(
        each_once(config.datasets),
        seed=config.seed,
        num_proc=config.dataset_num_proc,
        skip_bad_rows=True,
        layout=config.layout,
        columns=config.columns,
    )
    return rows, name


def holds_responses(columns: Collection[str]) -> bool:
    """Whether these columns can be scored as they are: those of training, or responses of which
    nothing is said.
    """
    return bool(row_kinds(_completed(dict.fromkeys(columns, ()))))


def kind_of(dataset: datasets.Dataset, source: str) -> RowKind:
    """The layout that rows are scored in.

    Raises:
        DataError: where columns are missing.
    """
    return NOTHING.choose_kind(_completed(dict.fromkeys(dataset.column_names, ())), source)


def make_encoder(
    dataset: datasets.Dataset,
    tokenizer: Any,
    source: str,
    max_length: int | None,
    vocab_size: int | None,
) -> Encoder:
    """What tokenises the rows of a data set; a row that cannot be is left out, with a reason.

    Raises:
        DataError: where columns are missing.
    """
    kind = kind_of(dataset, source)
    return Encoder(
        tokenizer=tokenizer,
        kind=kind,
        num_rows=len(dataset),
        source=source,
        max_length=max_length,
        vocab_size=vocab_size,
        max_comparisons=None,
        seed=0,
        skip_bad_rows=True,
        needs=NOTHING,
        watched=tuple(filter(may_hold_prompt, other_texts(dataset))),
        repeated={*RESPONSES[kind]} <= {*dataset.column_names} and repeats_prompt(dataset, kind),
    )


def windows(
    dataset: datasets.Dataset, encoder: Encoder
) -> Iterator[tuple[list[Group], list[ScoredRow]]]:
    """The groups of each window of rows, and its rows, in the data set's order."""
    plain = dataset.with_format(None)
    for start in range(0, len(dataset), WINDOW):
        batch = _completed(plain[start : start + WINDOW])
        count = len(next(iter(batch.values())))
        yield _group(encoder.encode(batch, range(start, start + count)), encoder.max_length)


def _completed(batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Columns in which responses without preferences, or without a label, are groups that state no
    comparison.
    """
    columns = dict(batch)
    if "completion" in columns and "label" not in columns and "responses" not in columns:
        columns["responses"] = [[text] for text in columns.pop("completion")]
    if "responses" in columns and not any(name in columns for name in PREFERENCES):
        columns["comparisons"] = [[] for _ in columns["responses"]]
    return columns


def _group(
    encoded: Sequence[Mapping[str, Any]], max_length: int | None
) -> tuple[list[Group], list[ScoredRow]]:
    groups: list[Group] = []
    by_prompt: dict[bytes, tuple[int, dict[bytes, int]]] = {}
    rows = []
    for row in encoded:
        outcome = row["outcome"]
        if outcome != KEPT:
            long = f"the prompt alone reaches max_length, {max_length} tokens"
            reason = long if outcome == PROMPT_TOO_LONG else str(row["reason"])
            rows.append(ScoredRow(reason=reason, too_long=outcome == PROMPT_TOO_LONG))
            continue
        prompt = np.asarray(row["prompt_ids"], np.int32)
        index, known = by_prompt.setdefault(prompt.tobytes(), (len(groups), {}))
        if index == len(groups):
            groups.append(Group(prompt))
        places = []
        for ids in row["response_ids"]:
            response = np.asarray(ids, np.int32)
            place = known.setdefault(response.tobytes(), len(known))
            if place == len(groups[index].responses):
                groups[index].responses.append(response)
            places.append(place)
        pairs = zip(row["winners"], row["losers"], strict=True)
        label = next(iter(row["labels"]), None)
        cut = TRUNCATED in row["notes"]
        rows.append(ScoredRow(index, tuple(places), tuple(pairs), label, cut=cut))
    return groups, rows
