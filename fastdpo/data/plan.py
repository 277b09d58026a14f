"""Which units make an optimizer step, and how a step is packed into rows.

The plan of an epoch is a pure function of (groups, seed, epoch, step size, budget, world size). A
step holds exactly `units_per_step` units (the last one what is left): comparisons, for a loss of
comparisons. How they are packed into rows of at most `max_tokens` changes neither which units share
a step nor, except in rounding, any number that comes out.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from ..config import TrainConfig
from .groups import Group
from .packing import PackedRow, Part, Placed, pack, part_tokens, split
from .ranks import TYPICAL, Work, spread

TOKENS_PER_ROW = {"cuda": 16384, "cpu": 1024}
"""The budget of a row where `max_tokens_per_batch` is unset: on a CPU longer rows cost memory and
save no time, shorter ones split groups."""

REFERENCE_ROWS = {"cuda": 4, "cpu": 1}
"""How many times as long the rows of the reference pass are: a GPU has room for more without
activations for a backward."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: for every rank its rows, as many on each, and the units in all of them
    together. A row may be empty where there are many ranks.

    Attributes:
        first_of_ranks: likewise the rows that are scored before the others, for what the loss has
            to know of the whole step: KTO's mismatched responses. No ranks where it needs none.
    """

    ranks: tuple[tuple[PackedRow, ...], ...]
    units: int
    first_of_ranks: tuple[tuple[PackedRow, ...], ...] = ()

    @property
    def first(self) -> tuple[PackedRow, ...]:
        """The rows of all ranks that are scored before the others."""
        return tuple(row for rank in self.first_of_ranks for row in rank if row)

    def placed(self) -> list[tuple[int, int]]:
        """The group and the number of every unit, in the order of their places."""
        parts = [part for rank in self.ranks for row in rank for part in row]
        found = {
            place: (part.group, unit)
            for part in parts
            for unit, place in zip(part.units, part.places, strict=True)
        }
        return [found[place] for place in range(self.units)]


def row_budget(config: TrainConfig, device: str) -> int:
    """Tokens of a row at most, on a kind of device ("cuda" or "cpu")."""
    return config.max_tokens_per_batch or TOKENS_PER_ROW[device]


def reference_budget(max_tokens: int, device: str) -> int:
    """Tokens of a row of the reference pass at most, beside training in rows of `max_tokens`."""
    return max_tokens * REFERENCE_ROWS[device]


def units_per_step(config: TrainConfig, ranks: int = 1) -> int:
    """How many units an optimizer step holds, over so many ranks with rows of their own."""
    if config.global_batch_size is not None:
        return config.global_batch_size
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks


def epoch_plan(
    config: TrainConfig,
    groups: Sequence[Group],
    *,
    layout: str,
    max_tokens: int,
    epoch: int = 0,
    ranks: int = 1,
    units: int | None = None,
    work: Work = TYPICAL,
    lockstep: bool = True,
) -> list[Step]:
    """The steps of an epoch of a run, of `units` (default: as the configuration says) each: the
    same for the same data, seed and step size.
    """
    seed = config.seed if config.data_seed is None else config.data_seed
    return make_plan(
        groups,
        units_per_step=units or units_per_step(config, ranks),
        max_tokens=max_tokens,
        layout=layout,
        seed=seed if config.shuffles else None,
        epoch=epoch,
        by_rows=True,
        world_size=ranks,
        work=work,
        lockstep=lockstep,
    )


def make_plan(
    groups: Sequence[Group],
    *,
    units_per_step: int,
    max_tokens: int,
    layout: str = "shared",
    seed: int | None = 0,
    epoch: int = 0,
    world_size: int = 1,
    by_rows: bool = False,
    work: Work = TYPICAL,
    lockstep: bool = True,
) -> list[Step]:
    """The steps of one epoch. `seed=None` keeps the order of the data.

    Which units share a step depends on neither `world_size`, the budget, the layout, `work` nor
    `lockstep`: these decide who computes what, in which row (see `ranks.spread`).

    A group at the end of a step is split between two steps, and one that alone exceeds the budget
    between rows; its prompt is then computed in each. A single unit is never split, so it may make
    a row longer than the budget. Without a seed, units other than comparisons keep the order of the
    rows, and comparisons do so with `by_rows`; otherwise those of one prompt stay together.
    """

    def packed(
        units: Mapping[int, list[Placed]], mismatched: bool
    ) -> tuple[tuple[PackedRow, ...], ...]:
        pieces = [
            piece
            for index, placed in units.items()
            for piece in split(groups[index], index, placed, max_tokens, layout, mismatched)
        ]
        if world_size == 1:
            return (tuple(pack(groups, pieces, max_tokens, layout)),)
        return spread(groups, pieces, max_tokens, layout, world_size, work, lockstep)

    steps = []
    for units, count in _cut_into_steps(_in_order(groups, seed, epoch, by_rows), units_per_step):
        first = packed(units, True) if groups[0].mismatched else ()
        steps.append(Step(packed(units, False), count, first))
    return steps


def plan_digest(groups: Sequence[Group], steps: Sequence[Step]) -> str:
    """Names the tokens and which units share which step: what a resumed run must find unchanged.

    How a step is packed into rows is left out, so a run may be resumed with another budget.
    """
    content = xxhash.xxh3_128()
    for group in groups:
        for response in range(len(group.responses)):
            content.update(group.digest(response))
    for step in steps:
        rows = (row for rank in step.ranks for row in rank)
        named = sorted((p.group, u) for row in rows for p in row for u in p.units)
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
) -> Iterator[list[PackedRow]]:
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
            yield pack(groups, some, max_tokens, layout)
        elif any(_only(part, missing) for part in some):
            packed = pack(groups, some, max_tokens, layout)
            rows = [tuple(left for p in row if (left := _only(p, missing))) for row in packed]
            yield [row for row in rows if row]


def _only(part: Part, missing: Collection[tuple[int, int]]) -> Part | None:
    """Those of a part's responses that are missing; None where none is."""
    left = tuple(r for r in part.responses if (part.group, r) in missing)
    return Part(part.group, left) if left else None


def _in_order(
    groups: Sequence[Group], seed: int | None, epoch: int, by_rows: bool
) -> Iterator[tuple[int, int]]:
    """The group and the number of every unit, as an epoch takes them."""
    if seed is None and groups and (by_rows or groups[0].unit != "comparison"):
        for _, index, unit in sorted(
            (row, index, unit)
            for index, group in enumerate(groups)
            for unit, row in enumerate(group.rows_of_units())
        ):
            yield index, unit
        return
    order = np.arange(len(groups))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(len(groups))
    for index in order.tolist():
        yield from ((index, unit) for unit in range(groups[index].units))


def _cut_into_steps(
    units: Iterator[tuple[int, int]], size: int
) -> Iterator[tuple[dict[int, list[Placed]], int]]:
    """Yields, for each step, the units of each group with their places, and how many these are."""
    while taken := list(itertools.islice(units, size)):
        of_groups: dict[int, list[Placed]] = {}
        for place, (index, unit) in enumerate(taken):
            of_groups.setdefault(index, []).append((unit, place))
        yield of_groups, len(taken)
