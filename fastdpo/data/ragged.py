"""Lists of different lengths as flat arrays, so that nothing is held or made a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def ends_of(lengths: np.ndarray) -> np.ndarray:
    """Where lists of these lengths (N,) begin and end when they are joined: (N + 1,) int64."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices of lists that begin at `starts` (N,) and have `lengths` (N,), joined."""
    ends = ends_of(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)


@dataclass(frozen=True)
class Lists:
    """N lists of numbers: that of `i` is `values[ends[i]:ends[i + 1]]`."""

    values: np.ndarray
    ends: np.ndarray

    @classmethod
    def of_column(cls, table: Any, name: str) -> Lists:
        """A column of lists of a data set's table, copied into one piece."""
        chunks = table.column(name).chunks
        if not chunks:
            return cls(np.zeros(0), np.zeros(1, np.int64))
        pieces = [_flat(chunk) for chunk in chunks]
        values = np.concatenate([values[ends[0] : ends[-1]] for values, ends in pieces])
        return cls(values, ends_of(np.concatenate([np.diff(ends) for _, ends in pieces])))

    @property
    def lengths(self) -> np.ndarray:
        """Of each list, (N,)."""
        return np.diff(self.ends)

    def owners(self) -> np.ndarray:
        """The number of the list that each value is in."""
        return np.repeat(np.arange(len(self.ends) - 1), self.lengths)

    def positions(self) -> np.ndarray:
        """Where each value stands in its list."""
        return np.arange(len(self.values)) - np.repeat(self.ends[:-1], self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.ends[index] : self.ends[index + 1]]

    def __add__(self, other: Lists) -> Lists:
        ends = np.append(self.ends, other.ends[1:] + self.ends[-1])
        return Lists(np.concatenate([self.values, other.values]), ends)

    def take(self, index: np.ndarray) -> Lists:
        """These lists, in this order."""
        lengths = self.lengths[index]
        return Lists(self.values[positions(self.ends[index], lengths)], ends_of(lengths))


def _flat(chunk: Any) -> tuple[np.ndarray, np.ndarray]:
    """The values of an Arrow array of lists and where in them each list begins and ends."""
    ends = chunk.offsets.to_numpy().astype(np.int64)
    return chunk.values.to_numpy(zero_copy_only=False), ends


@dataclass(frozen=True)
class Runs:
    """N runs of token ids, int32, in buffers that stay where they are: in a file, most of them.

    Attributes:
        buffers: of tokens.
        buffer: the number of each run's buffer, (N,).
        starts: where in it each begins, (N,).
        lengths: of each, (N,).
    """

    buffers: Sequence[np.ndarray]
    buffer: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, arrays: Iterable[np.ndarray]) -> Runs:
        """A run for each array, which is a buffer of its own."""
        buffers = list(arrays)
        lengths = np.array([len(ids) for ids in buffers], np.int64)
        return cls(buffers, np.arange(len(buffers)), np.zeros_like(lengths), lengths)

    @classmethod
    def of_column(cls, table: Any, name: str, *, nested: bool = False) -> tuple[Runs, np.ndarray]:
        """The lists of tokens in a column of a data set's table, and where those of each row begin
        and end: a list a row, or `nested` a list of lists.
        """
        chunks = table.column(name).chunks
        rows = [
            np.diff(chunk.offsets.to_numpy()) if nested else np.ones(len(chunk)) for chunk in chunks
        ]
        if nested:  # a slice's lists alone
            chunks = [chunk.flatten() for chunk in chunks]
        pieces = [_flat(chunk) for chunk in chunks]
        counts = [len(ends) - 1 for _, ends in pieces]
        runs = cls(
            [values for values, _ in pieces],
            np.repeat(np.arange(len(pieces), dtype=np.int32), counts),
            np.concatenate([ends[:-1] for _, ends in pieces] or [np.zeros(0, np.int64)]),
            np.concatenate([np.diff(ends) for _, ends in pieces] or [np.zeros(0, np.int64)]),
        )
        return runs, ends_of(np.concatenate(rows or [np.zeros(0)]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.starts[index]
        return self.buffers[self.buffer[index]][start : start + self.lengths[index]]

    def take(self, index: np.ndarray, lengths: np.ndarray | None = None) -> Runs:
        """These runs, in this order; of each its first `lengths` tokens."""
        kept = self.lengths[index] if lengths is None else lengths
        return Runs(self.buffers, self.buffer[index], self.starts[index], kept)

    def __add__(self, other: Runs) -> Runs:
        return Runs(
            [*self.buffers, *other.buffers],
            np.concatenate([self.buffer, other.buffer + len(self.buffers)]),
            np.concatenate([self.starts, other.starts]),
            np.concatenate([self.lengths, other.lengths]),
        )
