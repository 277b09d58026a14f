"""Tokenised rows to groups: rows of one prompt are merged, and equal responses kept once. All by
sorting of digests, in columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .digests import as_rows, find_rows, number_rows, response_digest
from .given import given_of_rows
from .groups import Group, Groups, Unit
from .ragged import Lists, Runs, ends_of


def make_groups(
    dataset: Any,
    *,
    group_prompts: bool = True,
    source: str = "dataset",
    unit: Unit = "comparison",
    max_length: int | None = None,
    scale_rewards: str = "group",
    mismatch: int | None = None,
) -> Groups:
    """Groups of a tokenised dataset (the columns of `fastdpo.data.tokenize`).

    With `group_prompts`, rows with equal prompt tokens are merged and equal responses within a
    group are kept once; groups stand in the order of their first row, units in the order of the
    rows.

    Args:
        unit: what the loss has one number for.
        max_length: tokens of a prompt and a response, to which labelled ones are still to be cut.
        scale_rewards: whether advantages are divided by their standard deviation ("group").
        mismatch: rows of a batch; each prompt of a batch also gets the completion of the row
            before it in the batch, the first one that of the last (KTO).

    Raises:
        DataError: no rows, or some with logps and others without.
    """
    if len(dataset) == 0:
        raise DataError(f"{source}: has no rows left to train on")
    if dataset._indices is not None:
        dataset = dataset.flatten_indices()
    rows = _Rows(dataset.data, max_length)
    if mismatch is not None:
        rows.add_mismatched(mismatch)
    group_of_row, first = np.arange(len(dataset)), np.arange(len(dataset))
    if group_prompts:
        group_of_row, first = number_rows(rows.prompt_digests)
    owners = group_of_row[rows.owners]
    merged = _merge(owners, rows.digests if group_prompts else None)
    given = {}
    if unit != "comparison":
        given = given_of_rows(rows.columns, rows.counts, scale_rewards, source)
    by_group = np.argsort(group_of_row, kind="stable")  # the rows of each group, in their order
    per_group = np.bincount(group_of_row, minlength=len(first))

    def of_groups(lists: Lists) -> Lists:
        taken, row_counts = lists.take(by_group), ends_of(per_group)
        return Lists(taken.values, taken.ends[row_counts])

    places, mismatched = merged.places[: rows.own], merged.places[rows.own :]
    items = Lists(places, ends_of(rows.counts))
    number = np.arange(len(dataset))
    stated = rows.columns["winners"]
    comparisons = np.stack(
        [
            places[items.ends[stated.owners()] + stated.values],
            places[items.ends[stated.owners()] + rows.columns["losers"].values],
            rows.columns["weights"].values,
        ],
        axis=1,
    ).astype(np.float64)
    units = stated if unit == "comparison" else items
    nothing = Lists(np.zeros(0, np.int64), np.zeros(len(first) + 1, np.int64))
    return Groups(
        unit,
        rows.prompts.take(first),
        rows.responses.take(merged.first, rows.lengths[merged.first]),
        merged.ends,
        of_groups(Lists(comparisons, stated.ends)),
        nothing if unit == "comparison" else of_groups(items),
        of_groups(Lists(np.repeat(number, units.lengths), units.ends)),
        nothing if mismatch is None else of_groups(Lists(mismatched, np.arange(len(number) + 1))),
        {name: of_groups(values) for name, values in given.items()},
        rows.digests[merged.first],
    )


class _Rows:
    """The columns of a tokenised data set; entries are its responses, row by row.

    Attributes:
        columns: what rows say of their responses, by name.
        prompts, responses: the tokens.
        counts: responses of each row.
        owners: the row of each entry.
        lengths: tokens of each entry, those of a labelled one cut to `max_length`.
        digests: of each entry, (N, 2); `prompt_digests` those of the prompts.
        own: entries without what `add_mismatched` adds.
    """

    def __init__(self, table: Any, max_length: int | None) -> None:
        names = ("winners", "losers", "weights", "labels", "scores", "ranks", "logps")
        self.columns = {name: Lists.of_column(table, name) for name in names}
        self.prompts, _ = Runs.of_column(table, "prompt_ids")
        self.responses, ends = Runs.of_column(table, "response_ids", nested=True)
        self.counts = np.diff(ends)
        self.owners = np.repeat(np.arange(len(self.counts)), self.counts)
        self.own = len(self.owners)
        digests = Lists.of_column(table, "digests")
        of_prompts = digests.ends[:-1] // 2
        pairs = digests.values.reshape(-1, 2)
        self.prompt_digests = pairs[of_prompts]
        self.digests = np.delete(pairs, of_prompts, axis=0)
        self._room = None if max_length is None else max_length - self.prompts.lengths
        self.lengths = self.responses.lengths.copy()
        labelled = self.columns["labels"].lengths > 0
        if self._room is not None and labelled.any():
            room = np.where(labelled, self._room, np.iinfo(np.int64).max)[self.owners]
            self.lengths = np.minimum(self.lengths, room)
            for entry in np.flatnonzero(self.lengths < self.responses.lengths).tolist():
                self.digests[entry] = self._digest(entry)

    def _digest(self, entry: int) -> np.ndarray:
        response = self.responses[entry][: self.lengths[entry]]
        return as_rows([response_digest(self.prompts[self.owners[entry]], response)])[0]

    def add_mismatched(self, size: int) -> None:
        """An entry more for each row, after all others: the response of the row before it in its
        batch of `size` rows, cut to what its own prompt leaves.
        """
        number = np.arange(len(self.counts))
        batch_ends = np.minimum(number // size * size + size, len(number)) - 1
        before = np.where(number % size == 0, batch_ends, number - 1)
        lengths = self.responses.lengths[before]
        if self._room is not None:
            lengths = np.minimum(lengths, self._room)
        self.responses = self.responses.take(np.append(number, before))
        self.owners, self.lengths = np.append(self.owners, number), np.append(self.lengths, lengths)
        made = np.stack([self._digest(entry) for entry in range(self.own, len(self.owners))])
        self.digests = np.concatenate([self.digests, made])


@dataclass(frozen=True)
class _Merged:
    """Entries as responses of groups.

    Attributes:
        places: of each entry, its response's number in the group.
        first: of each response, in the order of the groups, the first entry that is equal to it.
        ends: where the responses of each group begin and end.
    """

    places: np.ndarray
    first: np.ndarray
    ends: np.ndarray


def _merge(owners: np.ndarray, digests: np.ndarray | None) -> _Merged:
    """Responses of entries in the groups `owners`: one for equal digests, or one each."""
    numbers = first = np.arange(len(owners))
    if digests is not None:
        numbers, first = number_rows(digests)
    order = np.argsort(owners[first], kind="stable")
    ends = ends_of(np.bincount(owners[first]))
    places = np.empty(len(first), np.int64)
    places[order] = Lists(order, ends).positions()
    return _Merged(places[numbers], first[order], ends)


@dataclass(frozen=True)
class Agreement:
    """What comparisons say about each other, token for token.

    Attributes:
        repeated: comparisons that state again what another one has stated.
        contradicted: pairs of responses to one prompt of which each wins somewhere.
    """

    repeated: int
    contradicted: int

    def __str__(self) -> str:
        """What is to be added to a line that counts the comparisons: nothing where all is well."""
        repeated = f"; {self.repeated} comparisons repeat another one" if self.repeated else ""
        both = (
            f"; {self.contradicted} pairs are stated both ways round" if self.contradicted else ""
        )
        return repeated + both


def check_agreement(groups: Sequence[Group]) -> Agreement:
    """Count comparisons that are stated again, and those that are stated the other way round.

    Responses that are equal once they are cut to `max_length` say nothing about each other.
    """
    columns = Groups.of(groups)
    numbers, _ = number_rows(columns.digests)
    starts = columns.response_ends[columns.comparisons.owners()]
    named = columns.comparisons.values[:, :2].astype(np.int64)
    stated = numbers[starts[:, None] + named]
    stated = stated[stated[:, 0] != stated[:, 1]]
    _, first = number_rows(stated)
    distinct = stated[first]
    both = (find_rows(distinct[:, ::-1], distinct) >= 0).sum()
    return Agreement(len(stated) - len(distinct), int(both) // 2)
