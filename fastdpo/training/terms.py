"""What the rows of a step are given that only a pass over the whole step can tell.

The batch of a term is a property of data and configuration, so neither packing nor row budgets
change a number. Of a loss of kind "step" the pass gives the value and the slopes themselves; the
rows then have a loss that is linear in their log-probabilities.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from fastdpo_kernels.losses import Comparisons, Loss, Scored
from torch import Tensor

from ..losses import TrainingLoss
from ..parallel.world import World

Running = dict[str, tuple[Tensor, int]]
_LEAVES = ("chosen_logps", "rejected_logps", "chosen_sums", "prompt_logps")


@dataclass(frozen=True)
class StepTerms:
    """Constants of every unit of a step.

    Attributes:
        by_place: (N,) each, by name.
        loss: of the rows, in the place of the run's; None where that one stays.
        running: running means with the number of batches, this step's included.
    """

    by_place: dict[str, Tensor]
    loss: Loss | None = None
    running: Running = field(default_factory=dict)

    def given(self, places: Tensor) -> dict[str, Tensor]:
        """The constants of the units at these places."""
        return {name: values[places] for name, values in self.by_place.items()}


@torch.no_grad()
def pass_before(
    loss: TrainingLoss,
    rows: Iterable[tuple[Tensor, Scored]],
    units: int,
    size: int,
    running: Running,
    updates: bool = True,
) -> StepTerms:
    """The terms of a step of `units` in batches of `size`, from its scored rows: the places of
    their units, and what those are seen as. Where nothing `updates` them, running means stay.
    """
    step = _whole(rows, units)
    batches = [_part(step, slice(i, i + size)) for i in range(0, units, size)]
    counts = [min(size, units - i) for i in range(0, units, size)]
    if loss.whole_step:
        found = [_slopes(loss.loss, batch) for batch in batches]
        linear = Loss(_linear, ld_alpha=loss.loss.ld_alpha)
        return StepTerms({name: torch.cat([f[name] for f in found]) for name in found[0]}, linear)
    registered = loss.terms
    assert registered is not None
    running, values = dict(running), []
    for batch in batches:
        terms = _if_finite(batch, registered.batch_terms(batch, **loss.options))
        for name in registered.running:
            mean, count = running.get(name, (terms[name], 0))
            if updates or count == 0:
                mean = (mean * count + terms[name]) / (count + 1)
            if updates:
                running[name] = (mean, count + 1)
            terms[name] = mean
        values.append(terms)
    by_place = {
        name: torch.cat([v[name].expand(n) for v, n in zip(values, counts, strict=True)])
        for name in values[0]
    }
    return StepTerms(by_place, None, running)


def _whole(rows: Iterable[tuple[Tensor, Scored]], units: int) -> Scored:
    """All units of a step in the order of their places."""
    parts = list(rows)
    order = torch.cat([places for places, _ in parts]).argsort()
    assert len(order) == units

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)[order]
        if isinstance(values[0], Mapping):
            return {name: join([value[name] for value in values]) for name in values[0]}
        return values[0]

    seen = [scored for _, scored in parts]
    names = [f.name for f in fields(seen[0])]
    return replace(seen[0], **{name: join([getattr(s, name) for s in seen]) for name in names})


def _part(scored: Scored, some: slice) -> Scored:
    """Some of the units."""
    return _each(scored, lambda value: value[some])


def _each(scored: Scored, function: Callable[[Tensor], Tensor]) -> Scored:
    """The function of every tensor."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        if isinstance(value, Mapping):
            return {name: of(one) for name, one in value.items()}
        return value

    return replace(scored, **{f.name: of(getattr(scored, f.name)) for f in fields(scored)})


def gather_rows(
    rows: list[tuple[Tensor, Scored]], world: World, device: torch.device
) -> list[tuple[Tensor, Scored]]:
    """The scored rows of all ranks, on this one's device."""
    if world.data_size == 1:
        return rows

    def moved(rows: list[tuple[Tensor, Scored]], to: str | torch.device) -> list[Any]:
        return [(places.to(to), _each(seen, lambda t: t.to(to))) for places, seen in rows]

    gathered = world.gather(moved(rows, "cpu"))
    return moved([row for rank in gathered for row in rank], device)


def _if_finite(batch: Any, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The terms, or NaN where a log-probability is not finite: a bound such as that of KTO's
    estimate would hide it, and the loss is to show it.
    """
    names = ("logps", "chosen_logps", "rejected_logps")
    found = [getattr(batch, name) for name in names if hasattr(batch, name)]
    bad = ~torch.stack([value.isfinite().all() for value in found]).all()
    return {name: value.masked_fill(bad, math.nan) for name, value in terms.items()}


def _slopes(loss: Loss, batch: Scored) -> dict[str, Tensor]:
    """The losses of a batch, and their sum's derivatives by each log-probability."""
    found = {name: getattr(batch, name, None) for name in _LEAVES}
    with torch.enable_grad():
        leaves = {n: v.detach().requires_grad_() for n, v in found.items() if v is not None}
        value = loss(replace(batch, **leaves))
        slopes = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
    result = {"value": value.detach()}
    for name, leaf, slope in zip(leaves, leaves.values(), slopes, strict=True):
        result[f"slope of {name}"] = torch.zeros_like(leaf) if slope is None else slope
    return result


def _linear(pairs: Comparisons) -> Tensor:
    """A loss of known values and slopes, where they were taken."""
    total = pairs.given["value"]
    for name in _LEAVES:
        value = getattr(pairs, name)
        if value is not None:
            total = total + pairs.given[f"slope of {name}"] * (value - value.detach())
    return total
