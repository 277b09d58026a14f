"""Which parts of a step share a row: as few rows as the budget allows, of equal work.

A part is some responses of one group. A single unit is never split, so it may make a row longer
than the budget.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .groups import Group

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
    return max(
        part_tokens(group, part_of(0, group, [(number, 0)], mismatched).responses, layout)
        for group in groups
        for mismatched in ((False, True) if group.mismatched else (False,))
        for number in range(group.units)
    )


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
    groups: Sequence[Group], parts: list[Part], max_tokens: int, layout: str, multiple: int
) -> list[PackedRow]:
    """Rows of at most `max_tokens`, as few as best-fit-decreasing needs, then evened out; their
    number is a multiple of `multiple`.
    """
    costs = [part_tokens(groups[p.group], p.responses, layout) for p in parts]
    if layout == "padded":
        bins = _by_length(groups, parts, max_tokens)
    else:
        bins = best_fit_decreasing(costs, max_tokens)
    number = -(-len(bins) // multiple) * multiple
    if layout != "padded":
        work = [_attention_and_linear(groups[p.group], p, layout) for p in parts]
        bins = balance(costs, work, number, max_tokens) or bins
    bins += [[] for _ in range(number - len(bins))]
    return [tuple(parts[i] for i in sorted(members)) for members in bins]


def best_fit_decreasing(costs: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `costs` in bins of `capacity`: each, largest first, goes where it leaves the least
    room.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        fitting = [b for b, left in enumerate(room) if left >= costs[index]]
        if fitting:
            best = min(fitting, key=lambda b: (room[b], b))
        else:
            best = len(bins)
            bins.append([])
            room.append(max(capacity, costs[index]))
        bins[best].append(index)
        room[best] -= costs[index]
    return bins


def balance(
    costs: Sequence[int], work: Sequence[float], number: int, capacity: int
) -> list[list[int]] | None:
    """Longest-processing-time-first: `number` bins of equal work within `capacity`, or None where
    that fails.
    """
    bins: list[list[int]] = [[] for _ in range(number)]
    load, room = [0.0] * number, [capacity] * number
    for index in sorted(range(len(costs)), key=lambda i: (-work[i], i)):
        fitting = [b for b in range(number) if room[b] >= costs[index] or not bins[b]]
        if not fitting:
            return None
        best = min(fitting, key=lambda b: (load[b], b))
        bins[best].append(index)
        load[best] += work[index]
        room[best] -= costs[index]
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
