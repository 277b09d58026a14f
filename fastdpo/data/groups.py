"""Groups: one prompt, its responses, and what is said about them. The unit of everything that
follows.

A plain pair is a group of two responses and one comparison. Rows that share a prompt, token for
token, become one group in which the prompt and every distinct response are computed once, however
many comparisons, labels or scores name them.

A loss gives one number a unit, and a step holds so many units: comparisons, single responses (with
a label or a score), or all responses of a row.

A data set of groups is columns: `Groups`. A `Group` is made of it where one is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, overload

import numpy as np

from .digests import as_rows, number_rows, response_digest, responses_digests
from .ragged import Lists, Runs, ends_of

Unit = Literal["comparison", "response", "group"]


@dataclass
class Group:
    """One prompt (P,) with R responses, each (n_r,) completion tokens; ids are int32.

    Attributes:
        comparisons: (winner, loser, weight), responses by their numbers.
        ref_logps: (R,) fp64, nats.
        ref_token_logps: of each response, its scored tokens', fp32, nats.
        unit: what the loss has one number for.
        items: the response of each labelled or scored one; one that was given twice is there twice.
        given: constants of each item, by name.
        rows: the row that each item, or each comparison, stood in.
        mismatched: of each item, the response that the row before it had to its own prompt (KTO);
            empty where the loss asks for none.
    """

    prompt: np.ndarray
    responses: list[np.ndarray] = field(default_factory=list)
    comparisons: list[tuple[int, int, float]] = field(default_factory=list)
    ref_logps: np.ndarray | None = None
    ref_token_logps: list[np.ndarray] | None = None
    unit: Unit = "comparison"
    items: list[int] = field(default_factory=list)
    given: dict[str, list[float]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    mismatched: list[int] = field(default_factory=list)

    @property
    def units(self) -> int:
        """How many units there are."""
        if self.unit == "comparison":
            return len(self.comparisons)
        return len(self.items) if self.unit == "response" else len(self.lists)

    @property
    def lists(self) -> list[list[int]]:
        """The items of each row."""
        found: dict[int, list[int]] = {}
        for item, row in enumerate(self.rows):
            found.setdefault(row, []).append(item)
        return list(found.values())

    def responses_of(self, unit: int, mismatched: bool = False) -> tuple[int, ...]:
        """The responses that a unit consists of."""
        if self.unit == "comparison":
            return self.comparisons[unit][:2]
        if self.unit == "response":
            return ((self.mismatched if mismatched else self.items)[unit],)
        return tuple(self.items[item] for item in self.lists[unit])

    def rows_of_units(self) -> list[int]:
        """The row that each unit stood in; 0 where no rows are known."""
        rows = self.rows or [0] * self.units
        return list(dict.fromkeys(rows)) if self.unit == "group" else rows

    def weight(self, unit: int) -> float:
        """What a unit counts in the loss."""
        return self.comparisons[unit][2] if self.unit == "comparison" else 1.0

    def scored_tokens(self, response: int) -> int:
        """Tokens of a response that something precedes."""
        return len(self.responses[response]) - (0 if len(self.prompt) else 1)

    def digest(self, response: int) -> bytes:
        """16 bytes that name the prompt and one response: what its reference log-probability
        depends on.
        """
        return response_digest(self.prompt, self.responses[response])


_VIEWS = 4096
"""So many groups are kept as they were made, since a step looks at each of its own many times."""


@dataclass(eq=False)
class Groups(Sequence[Group]):
    """G groups with R responses in all, in columns; a group is made when it is asked for.

    Attributes:
        unit: what the loss has one number for.
        prompts: one a group.
        responses: of all groups, one after the other.
        response_ends: where those of each group begin and end, (G + 1,).
        comparisons: of each group, (C, 3) of winner, loser and weight.
        items, rows, mismatched: as in `Group`, a list a group.
        given: likewise, by name.
        known_digests: see `digests`; None where they are still to be made.
    """

    unit: Unit
    prompts: Runs
    responses: Runs
    response_ends: np.ndarray
    comparisons: Lists
    items: Lists
    rows: Lists
    mismatched: Lists
    given: dict[str, Lists]
    known_digests: np.ndarray | None = None
    _logps: Lists | None = field(default=None, init=False)
    _by_tokens: bool = field(default=False, init=False)
    _views: dict[int, Group] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Groups:
        """Groups that are made already, as columns; those that are columns as they are."""
        if isinstance(groups, Groups):
            return groups
        names = [
            n for n in (groups[0].given if groups else ()) if all(n in g.given for g in groups)
        ]
        known = [group.ref_logps for group in groups if group.ref_logps is not None]
        made = cls(
            groups[0].unit if groups else "comparison",
            Runs.of(group.prompt for group in groups),
            Runs.of(response for group in groups for response in group.responses),
            ends_of(np.array([len(group.responses) for group in groups], np.int64)),
            _lists([group.comparisons for group in groups], np.float64, (-1, 3)),
            _lists([group.items for group in groups], np.int64),
            _lists([group.rows for group in groups], np.int64),
            _lists([group.mismatched for group in groups], np.int64),
            {name: _lists([group.given[name] for group in groups], np.float64) for name in names},
        )
        if groups and len(known) == len(groups):
            made.set_references(Lists(np.concatenate(known), np.arange(len(made.responses) + 1)))
        tokens = [each for group in groups for each in group.ref_token_logps or ()]
        if len(tokens) == len(made.responses) > 0:
            ends = ends_of(np.array([len(values) for values in tokens]))
            made.set_references(Lists(np.concatenate(tokens), ends), by_tokens=True)
        return made

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if (view := self._views.get(number)) is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            view = self._views[number] = self._group(number)
        return view

    def _group(self, number: int) -> Group:
        first, end = self.response_ends[number : number + 2].tolist()
        group = Group(
            self.prompts[number],
            [self.responses[r] for r in range(first, end)],
            [(int(w), int(loser), x) for w, loser, x in self.comparisons[number].tolist()],
            unit=self.unit,
            items=self.items[number].tolist(),
            given={name: values[number].tolist() for name, values in self.given.items()},
            rows=self.rows[number].tolist(),
            mismatched=self.mismatched[number].tolist(),
        )
        if self._logps is not None and self._by_tokens:
            group.ref_token_logps = [self._logps[r] for r in range(first, end)]
        elif self._logps is not None:
            group.ref_logps = self._logps.values[first:end]
        return group

    def __add__(self, other: Groups) -> Groups:
        """All groups of both, without reference log-probabilities."""
        if not len(self) or not len(other):
            return self if len(self) else other
        return Groups(
            self.unit,
            self.prompts + other.prompts,
            self.responses + other.responses,
            np.append(self.response_ends, other.response_ends[1:] + len(self.responses)),
            self.comparisons + other.comparisons,
            self.items + other.items,
            self.rows + other.rows,
            self.mismatched + other.mismatched,
            {n: self.given[n] + other.given[n] for n in self.given if n in other.given},
            np.concatenate([self.digests, other.digests]),
        )

    def set_references(self, logps: Lists, *, by_tokens: bool = False) -> None:
        """Give every response, in the order of `responses`, its reference log-probability, or
        `by_tokens` those of its scored tokens, nats.
        """
        self._logps, self._by_tokens = logps, by_tokens
        self._views.clear()

    def hand_references(self, *parts: Groups) -> None:
        """Give the groups that these are the sum of their own of the log-probabilities."""
        assert self._logps is not None
        first = 0
        for part in parts:
            own = np.arange(first, first + len(part.responses))
            part.set_references(self._logps.take(own), by_tokens=self._by_tokens)
            first += len(own)

    @cached_property
    def digests(self) -> np.ndarray:
        """What `Group.digest` gives for each response, as rows of two int64: (R, 2)."""
        if self.known_digests is not None:
            return self.known_digests
        found = [
            digest
            for number, (first, end) in enumerate(
                zip(self.response_ends, self.response_ends[1:], strict=False)
            )
            for digest in responses_digests(
                self.prompts[number], [self.responses[r] for r in range(first, end)]
            )[1:]
        ]
        return as_rows(found)

    @cached_property
    def units(self) -> Units:
        """All units, in the order of the groups."""
        if self.unit == "comparison" or self.unit == "response":
            stated = self.comparisons if self.unit == "comparison" else self.items
            rows = self.rows.values if len(self.rows.values) else np.zeros(stated.ends[-1], int)
            return Units(stated.owners(), stated.positions(), rows, np.arange(len(rows)))
        owners, rows = self.rows.owners(), self.rows.values
        numbers, first = number_rows(np.stack([owners, rows], 1))
        counts = Lists(first, ends_of(np.bincount(owners[first], minlength=len(self))))
        return Units(owners[first], counts.positions(), rows[first], numbers)

    def responses_of_units(self, mismatched: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a unit and a response, by their numbers among all, that the unit consists of:
        each pair once.
        """
        if self.unit == "comparison":
            named = self.comparisons.values[:, :2].astype(np.int64).reshape(-1)
            units, owners = np.arange(len(named)) // 2, np.repeat(self.comparisons.owners(), 2)
        else:
            listed = self.mismatched if mismatched else self.items
            named, units, owners = listed.values, self.units.of_items, listed.owners()
        every = max(1, len(self.responses))
        pairs = np.unique(units * every + self.response_ends[owners] + named)
        return pairs // every, pairs % every

    def places(self, responses: np.ndarray) -> list[tuple[int, int]]:
        """The group and the number in it of these of all responses."""
        groups = np.searchsorted(self.response_ends, responses, side="right") - 1
        numbers = responses - self.response_ends[groups]
        return list(zip(groups.tolist(), numbers.tolist(), strict=True))

    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each response with its prompt, (R,)."""
        counts = np.diff(self.response_ends)
        return np.repeat(self.prompts.lengths, counts) + self.responses.lengths


@dataclass(frozen=True)
class Units:
    """The units of all groups.

    Attributes:
        groups: the group of each, (U,).
        numbers: its number in its group.
        rows: the row that it stood in; 0 where no rows are known.
        of_items: the unit that each item, or each comparison, belongs to.
    """

    groups: np.ndarray
    numbers: np.ndarray
    rows: np.ndarray
    of_items: np.ndarray

    def __len__(self) -> int:
        return len(self.groups)


def _lists(lists: Sequence[Iterable], dtype: type, shape: tuple[int, ...] = (-1,)) -> Lists:
    values = [value for each in lists for value in each]
    lengths = np.array([len(list(each)) for each in lists], np.int64)
    return Lists(np.array(values, dtype).reshape(shape), ends_of(lengths))


def count_units(groups: Sequence[Group]) -> int:
    """Number of units in all groups."""
    return len(Groups.of(groups).units)


def describe_units(groups: Sequence[Group]) -> str:
    """How many units of which kind: "24 comparisons"."""
    return f"{count_units(groups)} {groups[0].unit}s"
