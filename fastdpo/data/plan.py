"""Which units make an optimizer step, and how a step is packed into rows.

The plan of an epoch is a pure function of (groups, seed, epoch, step size, budget, world size). A
step holds exactly `units_per_step` units (the last one what is left): comparisons, for a loss of
comparisons. How they are packed into rows of at most `max_tokens` changes neither which units share
a step nor, except in rounding, any number that comes out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import xxhash

from ..config import TrainConfig
from .groups import Group, Groups
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
) -> Plan:
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
) -> Plan:
    """The steps of one epoch. `seed=None` keeps the order of the data.

    Which units share a step depends on neither `world_size`, the budget, the layout, `work` nor
    `lockstep`: these decide who computes what, in which row (see `ranks.spread`).

    A group at the end of a step is split between two steps, and one that alone exceeds the budget
    between rows; its prompt is then computed in each. A single unit is never split, so it may make
    a row longer than the budget. Without a seed, units other than comparisons keep the order of the
    rows, and comparisons do so with `by_rows`; otherwise those of one prompt stay together.
    """

    columns = Groups.of(groups)
    taken = _in_order(columns, seed, epoch, by_rows)
    return Plan(groups, taken, units_per_step, max_tokens, layout, world_size, work, lockstep)


@dataclass(frozen=True, eq=False)
class Plan(Sequence[Step]):
    """The steps of an epoch, each of which is packed when it is asked for.

    Attributes:
        groups: what is trained on.
        taken: the group of each unit and the unit's number in it, (U, 2) int64, as the epoch takes
            them, `size` a step.
    """

    groups: Sequence[Group]
    taken: np.ndarray
    size: int
    max_tokens: int
    layout: str
    world_size: int
    work: Work
    lockstep: bool

    def __len__(self) -> int:
        return -(-len(self.taken) // self.size)

    @overload
    def __getitem__(self, place: int) -> Step: ...
    @overload
    def __getitem__(self, place: slice) -> list[Step]: ...
    def __getitem__(self, place: int | slice) -> Step | list[Step]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        start = range(len(self))[place] * self.size
        taken = self.taken[start : start + self.size].tolist()
        units: dict[int, list[Placed]] = {}
        for number, (index, unit) in enumerate(taken):
            units.setdefault(index, []).append((unit, number))
        first = self._packed(units, True) if self.groups[0].mismatched else ()
        return Step(self._packed(units, False), len(taken), first)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def _packed(
        self, units: Mapping[int, list[Placed]], mismatched: bool
    ) -> tuple[tuple[PackedRow, ...], ...]:
        groups, max_tokens, layout = self.groups, self.max_tokens, self.layout
        pieces = [
            piece
            for index, placed in units.items()
            for piece in split(groups[index], index, placed, max_tokens, layout, mismatched)
        ]
        if self.world_size == 1:
            return (tuple(pack(groups, pieces, max_tokens, layout)),)
        return spread(groups, pieces, max_tokens, layout, self.world_size, self.work, self.lockstep)

    def units_by_step(self) -> np.ndarray:
        """The group and the number of every unit, in order within each step: (U, 2) int64."""
        step = np.arange(len(self.taken)) // self.size
        return self.taken[np.lexsort((self.taken[:, 1], self.taken[:, 0], step))]


def plan_digest(groups: Sequence[Group], plan: Plan | None = None) -> str:
    """Names the tokens and which units share which step: what a resumed run must find unchanged.

    How a step is packed into rows is left out, so a run may be resumed with another budget.
    """
    content = xxhash.xxh3_128(Groups.of(groups).digests.tobytes())
    if plan is not None:
        content.update(plan.units_by_step().tobytes())
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


def _in_order(groups: Groups, seed: int | None, epoch: int, by_rows: bool) -> np.ndarray:
    """The group of every unit and its number there, (U, 2), as an epoch takes them."""
    units = groups.units
    if seed is not None:
        rank = np.empty(len(groups), np.int64)
        rank[np.random.default_rng([seed, epoch]).permutation(len(groups))] = np.arange(len(groups))
        order = np.argsort(rank[units.groups], kind="stable")
    elif by_rows or groups.unit != "comparison":
        order = np.argsort(units.rows, kind="stable")
    else:
        order = np.arange(len(units))
    return np.stack([units.groups[order], units.numbers[order]], axis=1)
