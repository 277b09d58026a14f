"""Which comparisons make an optimizer step, and how a step is packed into rows.

The plan of an epoch is a pure function of (groups, seed, epoch, step size, budget, world size). A
step holds exactly `comparisons_per_step` comparisons (the last one what is left). How they are
packed into rows of at most `max_tokens` changes neither which comparisons share a step nor, except
in rounding, any number that comes out.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from .groups import Group

LAYOUTS = ("shared", "packed", "padded")


@dataclass(frozen=True)
class Part:
    """Some responses of one group, computed together, and the comparisons among them."""

    group: int
    responses: tuple[int, ...]
    comparisons: tuple[int, ...] = ()


Row = tuple[Part, ...]


@dataclass(frozen=True)
class Step:
    """One optimizer step: for every rank its rows, as many on each, and the comparisons in all of
    them together.
    """

    ranks: tuple[tuple[Row, ...], ...]
    comparisons: int


def compare(index: int, group: Group, comparisons: Sequence[int]) -> Part:
    """The part of group number `index` that these comparisons need: the responses that they name,
    once each.
    """
    named = (r for c in comparisons for r in group.comparisons[c][:2])
    return Part(index, tuple(dict.fromkeys(named)), tuple(comparisons))


def part_tokens(group: Group, responses: Sequence[int], layout: str) -> int:
    """Tokens that a forward pass over these responses computes, without padding between parts."""
    lengths = [len(group.responses[r]) for r in responses]
    prompt = len(group.prompt)
    if layout == "shared":
        return prompt + sum(lengths)
    if layout == "packed":
        return prompt * len(lengths) + sum(lengths)
    return (prompt + max(lengths)) * len(lengths)


def make_plan(
    groups: Sequence[Group],
    *,
    comparisons_per_step: int,
    max_tokens: int,
    layout: str = "shared",
    seed: int | None = 0,
    epoch: int = 0,
    world_size: int = 1,
) -> list[Step]:
    """The steps of one epoch. `seed=None` keeps the order of the data.

    A group at the end of a step is split between two steps, and one that alone exceeds the budget
    between rows; its prompt is then computed in each. A single comparison is never split, so it may
    make a row longer than the budget.
    """
    order = np.arange(len(groups))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(len(groups))
    steps = []
    for cuts, count in _cut_into_steps(groups, order, comparisons_per_step):
        pieces = [
            piece
            for index, chosen in cuts
            for piece in _fit(groups[index], index, chosen, max_tokens, layout)
        ]
        rows = _pack(groups, pieces, max_tokens, layout, world_size)
        ranks = tuple(tuple(rows[rank::world_size]) for rank in range(world_size))
        steps.append(Step(ranks, count))
    return steps


def plan_digest(groups: Sequence[Group], steps: Sequence[Step]) -> str:
    """Names the tokens and which comparisons share which step: what a resumed run must find
    unchanged.

    How a step is packed into rows is left out, so a run may be resumed with another budget.
    """
    content = xxhash.xxh3_128()
    for group in groups:
        for response in range(len(group.responses)):
            content.update(group.digest(response))
    for step in steps:
        rows = (row for rank in step.ranks for row in rank)
        named = sorted((p.group, c) for row in rows for p in row for c in p.comparisons)
        content.update(np.array(named, np.int64).tobytes())
    return content.hexdigest()


def reference_rows(
    groups: Sequence[Group],
    wanted: Sequence[tuple[int, int]],
    *,
    max_tokens: int,
    layout: str = "shared",
    window: int = 2048,
    missing: Collection[tuple[int, int]] | None = None,
) -> Iterator[list[Row]]:
    """Rows that compute each wanted (group, response) once; packed best-fit within windows of so
    many parts.

    With `missing`, those of all that is wanted without what is not missing. So a pass that was
    broken off goes on with the rows that it would have had, which gives the same bits.
    """
    parts: list[Part] = []
    for index, response in wanted:
        last = parts[-1] if parts else None
        if last is not None and last.group == index:
            grown = (*last.responses, response)
            if part_tokens(groups[index], grown, layout) <= max_tokens:
                parts[-1] = Part(index, grown)
                continue
        parts.append(Part(index, (response,)))
    for start in range(0, len(parts), window):
        some = parts[start : start + window]
        if missing is None:
            yield _pack(groups, some, max_tokens, layout, 1)
        elif any(_only(part, missing) for part in some):
            packed = _pack(groups, some, max_tokens, layout, 1)
            rows = [tuple(left for p in row if (left := _only(p, missing))) for row in packed]
            yield [row for row in rows if row]


def _only(part: Part, missing: Collection[tuple[int, int]]) -> Part | None:
    """Those of a part's responses that are missing; None where none is."""
    left = tuple(r for r in part.responses if (part.group, r) in missing)
    return Part(part.group, left) if left else None


def _cut_into_steps(
    groups: Sequence[Group], order: np.ndarray, size: int
) -> Iterator[tuple[list[tuple[int, list[int]]], int]]:
    """Yields, for each step, (group, its comparisons) pairs and how many comparisons these are."""
    parts: list[tuple[int, list[int]]] = []
    count = 0
    for index in order.tolist():
        waiting = list(range(len(groups[index].comparisons)))
        while waiting:
            taken, waiting = waiting[: size - count], waiting[size - count :]
            parts.append((index, taken))
            count += len(taken)
            if count == size:
                yield parts, count
                parts, count = [], 0
    if parts:
        yield parts, count


def _fit(
    group: Group, index: int, chosen: Sequence[int], max_tokens: int, layout: str
) -> Iterator[Part]:
    """Split comparisons of one group so that no part exceeds the budget, as few parts as first-fit
    in order gives.
    """
    held = compare(index, group, chosen[:1])
    for comparison in chosen[1:]:
        grown = compare(index, group, (*held.comparisons, comparison))
        if part_tokens(group, grown.responses, layout) > max_tokens:
            yield held
            grown = compare(index, group, (comparison,))
        held = grown
    yield held


def _pack(
    groups: Sequence[Group], parts: list[Part], max_tokens: int, layout: str, multiple: int
) -> list[Row]:
    """Rows of at most `max_tokens`, as few as best-fit-decreasing needs, then evened out; a
    multiple of `multiple`.
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
