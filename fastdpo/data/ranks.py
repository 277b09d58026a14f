"""Which rank computes what of a step, so that no rank waits for another.

All ranks have as many rows, computed in rounds: the first row of each, then the second. Under FSDP
ranks wait for each other in every layer, so a round takes as long as its dearest row; where the
model is replicated they wait once a step, and the dearest sum counts. Rows of equal work serve
both. There are as few rounds as the budget allows, and a round that is needed at all is used by
every rank: half a row on each of two ranks is done sooner than a whole one on one of them. No group
is cut for the sake of balance, since its prompt would then be computed twice.

Work is counted in whole numbers, so that all hosts make the same plan, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .groups import Group
from .packing import PackedRow, Part, balance, best_fit_decreasing, pack, part_tokens

_TOKEN = 1 << 20
"""A token's work: fine enough for that of a query and a key, and sums of a step fit in int64."""

_SWEEPS = 256
"""Exchanges between rows are given up after so many; a few do where a row holds ten parts."""

_NEAR = 1000
"""Rows are even enough when the dearest exceeds the mean by a thousandth."""

_IDLE = 32
"""So many sweeps without an exchange are the end, each with other pairs of rows."""

_AT_ONCE = 1 << 21
"""Exchanges that are weighed at once: bounds the memory."""


@dataclass(frozen=True)
class Work:
    """What a step computes, in tokens through the layers of the model.

    Attributes:
        pair: a query and a key in attention, 14·d·L operations beside 6·N; typical of 1B.
        scored: a token in the head, 6·V·H operations beside 6·N; typical of 1B.
    """

    pair: float = 1 / 8192
    scored: float = 1 / 6

    def of(self, tokens: int, pairs: int, scored: int) -> int:
        """Work in units of 2⁻²⁰ tokens."""
        return round(_TOKEN * (tokens + self.pair * pairs + self.scored * scored))


TYPICAL = Work()


def part_work(group: Group, part: Part, layout: str, work: Work = TYPICAL) -> int:
    """Work of a part of a shared or packed row, in units of 2⁻²⁰ tokens."""
    prompt = len(group.prompt)
    lengths = [len(group.responses[r]) for r in part.responses]
    pairs = sum(n * prompt + n * (n + 1) // 2 for n in lengths)
    pairs += (len(lengths) if layout == "packed" else 1) * prompt * (prompt + 1) // 2
    scored = sum(group.scored_tokens(r) for r in part.responses)
    return work.of(part_tokens(group, part.responses, layout), pairs, scored)


def row_work(groups: Sequence[Group], row: PackedRow, layout: str, work: Work = TYPICAL) -> int:
    """Work of a row in units of 2⁻²⁰ tokens; that of a padded one with its padding."""
    if layout != "padded":
        return sum(part_work(groups[part.group], part, layout, work) for part in row)
    lines = [_lines(groups[part.group], part) for part in row]
    longest = max((line.longest for line in lines), default=0)
    return _padded_work(
        sum(line.sequences for line in lines), longest, sum(line.scored for line in lines), work
    )


def spread(
    groups: Sequence[Group],
    parts: Sequence[Part],
    max_tokens: int,
    layout: str,
    ranks: int,
    work: Work = TYPICAL,
    lockstep: bool = True,
) -> tuple[tuple[PackedRow, ...], ...]:
    """The rows of every rank, as many on each and as few as the budget allows; some may be empty.

    The rows of a round are of similar work, and so are the sums of all ranks. Where units fill a
    row, both cannot be had: without `lockstep`, which FSDP asks for, the sums then count alone, and
    ranks may have more rows.
    """
    if layout == "padded":
        lines = [_lines(groups[part.group], part) for part in parts]
        bins = _even_padded_rows(lines, max_tokens, ranks, work)
    else:
        costs = [part_tokens(groups[p.group], p.responses, layout) for p in parts]
        works = [part_work(groups[p.group], p, layout, work) for p in parts]
        bins = even_rows(costs, works, max_tokens, ranks)
        if not lockstep and not _sums_are_even(bins, works, ranks):
            return _sums_first(
                groups, parts, max_tokens, layout, even_rows(costs, works, sum(costs), ranks)
            )
    rows = [tuple(parts[i] for i in sorted(members)) for members in bins]
    loads = [row_work(groups, row, layout, work) for row in rows]
    return tuple(tuple(rows[b] for b in chosen) for chosen in in_rounds(loads, ranks))


def even_rows(
    costs: Sequence[int], work: Sequence[int], capacity: int, multiple: int
) -> list[list[int]]:
    """Indices in rows of equal work and at most `capacity` tokens; as few rows as best-fit needs,
    rounded up to a multiple of `multiple`. An index that alone exceeds the capacity has a row of
    its own.
    """
    fewest = best_fit_decreasing(costs, capacity)
    number = -(-len(fewest) // multiple) * multiple
    # Rows that are nearly full leave no choice but by tokens, or that of best-fit itself.
    bins = (
        balance(costs, work, number, capacity)
        or balance(costs, costs, number, capacity)
        or fewest + [[] for _ in range(number - len(fewest))]
    )
    return _exchanged(bins, np.array(costs), np.array(work), capacity)


def in_rounds(loads: Sequence[int], ranks: int) -> list[list[int]]:
    """The bins of each rank, one a round: similar loads in a round, the dearest of a round where
    the sum of the rounds before is least.
    """
    order = sorted(range(len(loads)), key=lambda b: (-loads[b], b))
    sums = [0] * ranks
    chosen: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(order), ranks):
        by_sum = sorted(range(ranks), key=lambda rank: (sums[rank], rank))
        for rank, b in zip(by_sum, order[start : start + ranks], strict=True):
            chosen[rank].append(b)
            sums[rank] += loads[b]
    return chosen


def _sums_are_even(bins: Sequence[Sequence[int]], work: Sequence[int], ranks: int) -> bool:
    loads = [sum(work[i] for i in members) for members in bins]
    dearest = max(sum(loads[b] for b in chosen) for chosen in in_rounds(loads, ranks))
    return dearest <= max(1.01 * sum(loads) / ranks, max(work))


def _sums_first(
    groups: Sequence[Group],
    parts: Sequence[Part],
    max_tokens: int,
    layout: str,
    of_ranks: Sequence[Sequence[int]],
) -> tuple[tuple[PackedRow, ...], ...]:
    """Rows of each rank's own parts, padded with empty ones to as many on each."""
    rows = [pack(groups, [parts[i] for i in sorted(held)], max_tokens, layout) for held in of_ranks]
    rounds = max(map(len, rows))
    return tuple((*own, *[()] * (rounds - len(own))) for own in rows)


def _exchanged(
    bins: Sequence[Sequence[int]], costs: np.ndarray, work: np.ndarray, capacity: int
) -> list[list[int]]:
    """Bins evened out: again and again the dearest gives an index to the cheapest for a lighter one
    or for none, the second dearest to the second cheapest, and so on, all at once.
    """
    costs, work = np.append(costs, 0), np.append(work, 0)  # what -1 names: nothing
    half, idle = len(bins) // 2, 0
    members = np.full((len(bins), max(map(len, bins))), -1)
    for row, held in zip(members, bins, strict=True):
        row[: len(held)] = held
    mean = int(work.sum()) // len(bins)
    goal = max(mean + mean // _NEAR, int(work.max()))
    for _ in range(_SWEEPS):
        members = -np.sort(-members, axis=1)
        width = int((members >= 0).sum(1).max()) + 1  # a place for what is given for nothing
        members = np.pad(members, ((0, 0), (0, 1)), constant_values=-1)[:, :width]
        loads = work[members].sum(1)
        if loads.max() <= goal or idle == min(_IDLE, half):
            break
        # Where the cheapest has nothing for the dearest, the one after it may have.
        order = np.argsort(-loads, kind="stable")
        dear, cheap = order[:half], np.roll(order[::-1][:half], -idle)
        changed = _exchange(members, dear, cheap, costs, work, capacity)
        idle = 0 if changed else idle + 1
    return [row[row >= 0].tolist() for row in members]


def _exchange(
    members: np.ndarray,
    dear: np.ndarray,
    cheap: np.ndarray,
    costs: np.ndarray,
    work: np.ndarray,
    capacity: int,
) -> bool:
    """Make, in place, the exchange that evens out each pair of a dear and a cheap bin best; whether
    there was any.
    """
    width, changed = members.shape[1], False
    size = max(1, _AT_ONCE // width**2)
    for start in range(0, len(dear), size):
        pair = dear[start : start + size], cheap[start : start + size]
        ours, theirs = (members[bins] for bins in pair)
        gap = work[ours].sum(1) - work[theirs].sum(1)
        left = np.abs(gap[:, None] - 2 * _differences(work, ours, theirs))
        # Whoever has more tokens than before must have had room for them.
        tokens = _differences(costs, ours, theirs)
        room, their_room = (
            np.maximum(capacity - costs[held].sum(1), 0)[:, None] for held in (ours, theirs)
        )
        left[(tokens > their_room) | (-tokens > room)] = np.iinfo(np.int64).max
        best = left.argmin(1)
        better = np.flatnonzero(left[np.arange(len(best)), best] < gap)
        give, take = np.divmod(best[better], width)
        one, other = (bins[better] for bins in pair)
        given = members[one, give]
        members[one, give] = members[other, take]
        members[other, take] = given
        changed = changed or len(better) > 0
    return changed


def _differences(values: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """By how much each of P bins' members (P, K) exceed those of another bin: (P, K·K)."""
    return (values[ours][:, :, None] - values[theirs][:, None, :]).reshape(len(ours), -1)


class _Lines(NamedTuple):
    """Sequences, the length to which they are padded, and their scored tokens."""

    sequences: int
    longest: int
    scored: int


def _lines(group: Group, part: Part) -> _Lines:
    longest = max(len(group.responses[r]) for r in part.responses)
    scored = sum(group.scored_tokens(r) for r in part.responses)
    return _Lines(len(part.responses), len(group.prompt) + longest, scored)


def _padded_work(count: int, longest: int, scored: int, work: Work) -> int:
    """Under a mask every query meets every key."""
    return work.of(count * longest, count * longest**2, scored)


def _even_padded_rows(
    lines: Sequence[_Lines], max_tokens: int, multiple: int, work: Work
) -> list[list[int]]:
    """Indices in padded rows: similar lengths together, so that a row pads little; as few rows as
    the budget then allows, rounded up to a multiple of `multiple`, and of so many rows those of
    which the dearest is cheapest, to a thousandth.
    """
    order = sorted(range(len(lines)), key=lambda i: (-lines[i].longest, i))

    def within(limit: float) -> list[list[int]]:
        bins: list[list[int]] = []
        count = longest = scored = 0
        for index in order:
            line = lines[index]
            count, scored = count + line.sequences, scored + line.scored
            if (
                not bins
                or count * longest > max_tokens
                or _padded_work(count, longest, scored, work) > limit
            ):
                bins.append([])
                count, longest, scored = line
            bins[-1].append(index)
        return bins

    bins = within(float("inf"))
    number = -(-len(bins) // multiple) * multiple
    most = sum(_padded_work(*line, work) for line in lines)
    least = most // number
    while most - least > least // _NEAR:
        limit = (least + most) // 2
        found = within(limit)
        if len(found) <= number:
            bins, most = found, limit
        else:
            least = limit
    return bins + [[] for _ in range(number - len(bins))]
