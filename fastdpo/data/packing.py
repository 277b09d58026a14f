"""Which parts of a step share a row: as few rows as the budget allows, of equal work.

A part is some responses of one group. A single unit is never split, so it may make a row longer
than the budget.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

import numpy as np

from .groups import Group, Groups

LAYOUTS = ("shared", "packed", "padded")
"""How a row lays its tokens out, from cheap to dear (see `batch`)."""


@dataclass(frozen=True)
class Part:
    """Some responses of one group, computed together, the units that they make, and the places of
    those in the step.
    """

    group: int
    responses: tuple[int, ...]
    units: tuple[int, ...] = ()
    places: tuple[int, ...] = ()


PackedRow = tuple[Part, ...]
"""Parts that one forward pass computes together."""


Placed = tuple[int, int]
"""A unit of a group, and its place in the step."""


def part_of(index: int, group: Group, placed: Sequence[Placed], mismatched: bool = False) -> Part:
    """The part of group number `index` that these units need: the responses that they name, once
    each; with `mismatched`, those of KTO's estimate.
    """
    units = tuple(unit for unit, _ in placed)
    named = (r for unit in units for r in group.responses_of(unit, mismatched))
    return Part(index, tuple(dict.fromkeys(named)), units, tuple(place for _, place in placed))


def part_tokens(group: Group, responses: Sequence[int], layout: str) -> int:
    """Tokens that a forward pass over these responses computes, without padding between parts."""
    lengths = [len(group.responses[r]) for r in responses]
    prompt = len(group.prompt)
    if layout == "shared":
        return prompt + sum(lengths)
    if layout == "packed":
        return prompt * len(lengths) + sum(lengths)
    return (prompt + max(lengths)) * len(lengths)


def row_tokens(groups: Sequence[Group], row: PackedRow, layout: str) -> int:
    """Tokens that a forward pass over a row computes, padding included."""
    if layout != "padded" or not row:
        return sum(part_tokens(groups[part.group], part.responses, layout) for part in row)
    lengths = [
        len(groups[part.group].prompt) + len(groups[part.group].responses[r])
        for part in row
        for r in part.responses
    ]
    return len(lengths) * max(lengths)


def sequence_tokens(groups: Sequence[Group], row: PackedRow) -> int:
    """Tokens that an unpadded sequence for each response of each unit would hold."""
    return sum(
        len(group.prompt) + len(group.responses[r])
        for part in row
        for group in [groups[part.group]]
        for unit in part.units
        for r in group.responses_of(unit)
    )


def longest_unit(groups: Sequence[Group], layout: str) -> int:
    """Tokens of the longest unit, which is never split."""
    columns, longest = Groups.of(groups), 0
    for mismatched in (False, True) if len(columns.mismatched.values) else (False,):
        units, responses = columns.responses_of_units(mismatched)
        opens = np.flatnonzero(np.diff(units, prepend=-1))
        prompts = columns.prompts.lengths[columns.units.groups]
        counts = np.bincount(units)
        tokens = np.add.reduceat(columns.responses.lengths[responses], opens)
        if layout == "shared":
            tokens = prompts + tokens
        elif layout == "packed":
            tokens = prompts * counts + tokens
        else:
            most = np.maximum.reduceat(columns.responses.lengths[responses], opens)
            tokens = (prompts + most) * counts
        longest = max(longest, int(tokens.max()))
    return longest


def split(
    group: Group,
    index: int,
    placed: Sequence[Placed],
    max_tokens: int,
    layout: str,
    mismatched: bool = False,
) -> Iterator[Part]:
    """Split units of one group so that no part exceeds the budget, as few parts as first-fit in
    order gives.
    """
    held: list[Placed] = []
    for one in placed:
        grown = part_of(index, group, [*held, one], mismatched)
        if held and part_tokens(group, grown.responses, layout) > max_tokens:
            yield part_of(index, group, held, mismatched)
            held = []
        held.append(one)
    yield part_of(index, group, held, mismatched)


def pack(
    groups: Sequence[Group], parts: list[Part], max_tokens: int, layout: str
) -> list[PackedRow]:
    """Rows of one rank of at most `max_tokens`, as few as best-fit-decreasing needs, then evened
    out.
    """
    costs = [part_tokens(groups[p.group], p.responses, layout) for p in parts]
    if layout == "padded":
        bins = _by_length(groups, parts, max_tokens)
    else:
        bins = best_fit_decreasing(costs, max_tokens)
    if layout != "padded":
        work = [_attention_and_linear(groups[p.group], p, layout) for p in parts]
        bins = balance(costs, work, len(bins), max_tokens) or bins
    return [tuple(parts[i] for i in sorted(members)) for members in bins]


def best_fit_decreasing(costs: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `costs` in bins of `capacity`: each, largest first, goes where it leaves the least
    room.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of every bin, the least first
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        at = bisect_left(rooms, (costs[index], -1))
        if at < len(rooms):
            room, best = rooms.pop(at)
        else:
            room, best = max(capacity, costs[index]), len(bins)
            bins.append([])
        bins[best].append(index)
        insort(rooms, (room - costs[index], best))
    return bins


def balance(
    costs: Sequence[int], work: Sequence[float], number: int, capacity: int
) -> list[list[int]] | None:
    """Longest-processing-time-first: `number` bins of equal work within `capacity`, or None where
    that fails.
    """
    bins: list[list[int]] = [[] for _ in range(number)]
    room, smallest = [capacity] * number, min(costs, default=0)
    loads = [(0.0, b) for b in range(number)]  # a heap: the least loaded first
    for index in sorted(range(len(costs)), key=lambda i: (-work[i], i)):
        full = []
        while loads and room[loads[0][1]] < costs[index] and bins[loads[0][1]]:
            passed = heappop(loads)
            if room[passed[1]] >= smallest:  # otherwise nothing fits there any more
                full.append(passed)
        if not loads:
            return None
        load, best = loads[0]
        bins[best].append(index)
        room[best] -= costs[index]
        heapreplace(loads, (load + work[index], best))
        for other in full:
            heappush(loads, other)
    return bins


def _attention_and_linear(group: Group, part: Part, layout: str) -> float:
    """Relative work of a part: tokens, plus attended token pairs at a weight typical of a 1B
    model's width.
    """
    prompt = len(group.prompt)
    tokens = part_tokens(group, part.responses, layout)
    pairs = prompt * prompt / 2.0
    for r in part.responses:
        n = len(group.responses[r])
        pairs += n * (prompt + n / 2.0)
    return tokens + pairs / 8192.0


def _by_length(groups: Sequence[Group], parts: list[Part], max_tokens: int) -> list[list[int]]:
    """For padded rows: sequences of similar length together, so that a row pads little."""

    def shape(part: Part) -> tuple[int, int]:
        group = groups[part.group]
        longest = max(len(group.responses[r]) for r in part.responses)
        return len(part.responses), len(group.prompt) + longest

    shapes = [shape(part) for part in parts]
    bins: list[list[int]] = []
    count = longest = 0
    for index in sorted(range(len(parts)), key=lambda i: (-shapes[i][1], i)):
        sequences, length = shapes[index]
        if bins and (count + sequences) * longest <= max_tokens:
            bins[-1].append(index)
            count += sequences
        else:
            bins.append([index])
            count, longest = sequences, length
    return bins
