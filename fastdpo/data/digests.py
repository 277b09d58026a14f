"""Digests of tokens, 128 bits each, as rows of two int64: equal ones are found by sorting."""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import ArrayLike


def response_digest(prompt: ArrayLike, response: ArrayLike) -> bytes:
    """16 bytes that name a prompt and a response to it, ids of any integer type."""
    return responses_digests(prompt, [response])[1]


def responses_digests(prompt: ArrayLike, responses: Sequence[ArrayLike]) -> list[bytes]:
    """16 bytes that name a prompt, and 16 for each response to it."""
    ids = np.ascontiguousarray(prompt, np.int32)
    content = xxhash.xxh3_128(np.int64(len(ids)).tobytes())
    content.update(ids.tobytes())
    found = [content.digest()]
    for response in responses:
        whole = content.copy()
        whole.update(np.ascontiguousarray(response, np.int32).tobytes())
        found.append(whole.digest())
    return found


def as_rows(digests: list[bytes]) -> np.ndarray:
    """Digests as (N, 2) int64, whose bytes they are."""
    return np.frombuffer(b"".join(digests), np.int64).reshape(-1, 2)


def number_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct rows of (N, 2) in the order in which they come first.

    Returns:
        The number of each row, (N,), and of each number the first row, (D,) ascending.
    """
    order, opens = _sorted_runs(rows)
    first = order[opens]  # of equal rows the sort keeps the order
    rank = np.empty(len(first), np.int64)
    by_place = np.argsort(first)
    rank[by_place] = np.arange(len(first))
    numbers = np.empty(len(rows), np.int64)
    numbers[order] = rank[np.cumsum(opens) - 1]
    return numbers, first[by_place]


def find_rows(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where each of the rows (N, 2) stands among the known ones (M, 2), the last of equal ones;
    -1 where it does not.
    """
    order, opens = _sorted_runs(np.concatenate([known, rows]))
    place = np.where(order < len(known), order, -1)
    run = np.cumsum(opens) - 1
    last = np.maximum.reduceat(place, np.flatnonzero(opens)) if len(place) else place
    found = np.empty(len(order), np.int64)
    found[order] = last[run]
    return found[len(known) :]


def _sorted_runs(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order that brings equal rows together, a stable one, and where each run of them opens."""
    order = np.lexsort((rows[:, 1], rows[:, 0]))
    ordered = rows[order]
    opens = np.ones(len(rows), bool)
    opens[1:] = (ordered[1:] != ordered[:-1]).any(1)
    return order, opens
