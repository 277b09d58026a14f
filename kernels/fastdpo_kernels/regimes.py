"""What is computed when: the regimes of a head, in terms of `Tiles`.

The gradient of `c_t·logp_t` with respect to the logits is `c_t·(onehot(y_t) − softmax(z_t))`: one
scalar per token times something the forward knows already. Hence:

- no gradient: `Tiles.score`, one product (2TVH operations);
- frozen head: E·W is formed with the forward and scaled by whatever c_t arrives later (4TVH);
- units (comparisons, responses, groups) that are whole inside a tile: c_t follows at once, so both
  gradients are formed from the tile while it exists (6TVH); of a unit longer than a tile, and of a
  loss of a whole step, all but the last tile are projected twice (up to 8TVH);
- any other gradient: the backward projects again (8TVH).

Nothing here waits for a device, but for the plan of tokens that do not fit one tile, which is made
on the host, and for losses of tokens, which ask how many tokens their units have.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .head import Stats, Tiles, transposed
from .problem import Problem, Selection, whole_units
from .products import addmm_, mm


class Needs(NamedTuple):
    """Of which tensors a gradient is wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        """Whether the head is trained."""
        return self.weight or self.bias


class Dtypes(NamedTuple):
    """In which dtypes gradients are wanted."""

    hidden: torch.dtype
    weight: torch.dtype
    bias: torch.dtype


class Gradients:
    """Accumulates the gradients of `Σ c_t·logp_t` from tiles, the coefficients kept off the tile.

    The weight's is fp32 (fp64 for fp64) while tiles are added up; a single tile's is rounded once.
    """

    def __init__(self, tiles: Tiles, hidden: Tensor, needs: Needs, dtypes: Dtypes) -> None:
        self._tiles, self._x, self._needs, self._dtypes = tiles, hidden, needs, dtypes
        self._wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden: Tensor | None = None
        if needs.hidden:
            self.hidden = hidden.new_empty(hidden.shape, dtype=dtypes.hidden)
        self._weight: Tensor | None = None  # (V, H), but (H, V) of a transposed weight
        self._bias: Tensor | None = None
        # fp16 rounds a small coefficient to 0: the sums are kept in units of the largest so far.
        self._unit: Tensor | None = None

    def add(self, rows: slice, tile: Tensor, scale: Tensor) -> None:
        """Add the contribution of `rows`: tile (t, V), and row_scale times c_t, (t,)."""
        scale = scale * -self._tiles.head.gradient_scale
        if self.hidden is not None:
            self._put_hidden(rows, tile, scale)
        if not self._needs.head:
            return
        if tile.dtype == torch.float16:
            scale = self._in_units(scale)
        if self._needs.weight:
            self._add_weight(rows, tile, scale)
        if self._needs.bias:
            row = scale.unsqueeze(0).to(tile.dtype)
            part = mm(row, tile, self._wide, operands=tile.dtype).squeeze(0)
            self._bias = part if self._bias is None else self._bias.add_(part)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients that were wanted, in `dtypes`."""
        head, weight, bias = self._tiles.head, None, None
        if self._needs.weight:
            columns = transposed(head.weight)
            like = head.weight.T if columns else head.weight
            weight = self._finished(self._weight, like, self._dtypes.weight)
            weight = weight.T if columns else weight
        if self._needs.bias and head.bias is not None:
            bias = self._finished(self._bias, head.bias, self._dtypes.bias)
        return self.hidden, weight, bias

    def _put_hidden(self, rows: slice, tile: Tensor, scale: Tensor) -> None:
        assert self.hidden is not None
        out = self.hidden[rows]
        weight, operands = self._tiles.head.weight, self._x.dtype
        in_place = out if out.dtype == self._wide else None
        product = mm(tile, weight, self._wide, operands=operands, out=in_place)
        torch.mul(product, scale.unsqueeze(1), out=out)

    def _add_weight(self, rows: slice, tile: Tensor, scale: Tensor) -> None:
        x = (self._x[rows] * scale.unsqueeze(1)).to(tile.dtype)
        operands = self._x.dtype
        a, b = (x.T, tile) if transposed(self._tiles.head.weight) else (tile.T, x)
        if self._weight is not None:
            addmm_(self._weight, a, b, operands=operands)
            return
        single = x.shape[0] == self._x.shape[0] and self._unit is None
        dtype = self._dtypes.weight if single else self._wide
        self._weight = mm(a, b, dtype, operands=operands)

    def _in_units(self, scale: Tensor) -> Tensor:
        """Coefficients in units of the largest so far, which the sums are brought to as well."""
        smallest = torch.finfo(scale.dtype).tiny
        unit = scale.abs().amax().clamp(min=smallest)
        if self._unit is not None:
            unit = torch.maximum(unit, self._unit)
            for total in (self._weight, self._bias):
                if total is not None:
                    total.mul_(self._unit / unit)
        self._unit = unit
        return scale / unit

    def _finished(self, total: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
        if total is None:
            return like.new_zeros(like.shape, dtype=dtype)
        if self._unit is not None:
            total.mul_(self._unit)
        return total.to(dtype)


def _ranges(start: int, stop: int, rows: int) -> Iterator[slice]:
    """The tokens of each tile in turn."""
    for first in range(start, stop, rows):
        yield slice(first, min(first + rows, stop))


def _part(stats: Stats, rows: slice) -> Stats:
    return {name: value[rows] for name, value in stats.items()}


def _join(parts: list[Stats]) -> Stats:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def score_with_gradient(
    tiles: Tiles, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...], dtype: torch.dtype
) -> tuple[Stats, Tensor]:
    """What `Tiles.score` gives, and ∂logp_t/∂x_t (T, H) as `dtype`, of a head without gradient."""
    none = Dtypes(dtype, dtype, dtype)
    grads = Gradients(tiles, hidden, Needs(True, False, False), none)
    parts = []
    for rows in _ranges(0, targets.shape[0], tiles.rows):
        tile, row_scale, stats = tiles.exponentials(hidden[rows], targets[rows], outputs)
        grads.add(rows, tile, row_scale)
        parts.append(stats)
    assert grads.hidden is not None
    return _join(parts) if parts else tiles.score(hidden, targets, outputs), grads.hidden


def logprob_gradients(
    tiles: Tiles,
    hidden: Tensor,
    targets: Tensor,
    stats: Stats,
    coefficients: Tensor,
    needs: Needs,
    dtypes: Dtypes,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ c_t·logp_t for any coefficients (T,), from the statistics of the forward."""
    grads = Gradients(tiles, hidden, needs, dtypes)
    for rows in _ranges(0, targets.shape[0], tiles.rows):
        tile, row_scale = tiles.probabilities(hidden[rows], targets[rows], _part(stats, rows))
        grads.add(rows, tile, row_scale * coefficients[rows])
    return grads.result()


@dataclass
class LossResult:
    """Loss () fp64, response log-probabilities (R,) fp64, per-token statistics, gradients."""

    loss: Tensor
    logps: Tensor
    stats: Stats
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)


def preference_loss(
    tiles: Tiles,
    hidden: Tensor,
    problem: Problem,
    outputs: tuple[str, ...],
    needs: Needs,
    dtypes: Dtypes,
) -> LossResult:
    """The loss of packed units with the gradients that are wanted."""
    everything = slice(0, hidden.shape[0])
    if problem.loss.use_weighting:
        outputs = tuple(dict.fromkeys((*outputs, "log_sum_sq_prob")))
    host, problem = problem, problem.to(hidden.device)
    logps = hidden.new_zeros(problem.ref_logps.shape[0], dtype=torch.float64)
    one_tile = 0 < hidden.shape[0] <= tiles.rows
    if not any(needs) or not (one_tile or needs.head):
        return _frozen_head(tiles, hidden, problem, outputs, needs.hidden, dtypes.hidden, logps)
    pieces: Iterable[tuple[slice, Selection]] = [(everything, slice(None))]
    if not one_tile:
        pieces = whole_units(host, tiles.rows)
    grads = Gradients(tiles, hidden, needs, dtypes)
    loss, parts = logps.new_zeros(()), []
    for piece, selected in pieces:
        part, stats = _piece(tiles, hidden, problem, piece, selected, outputs, logps, grads)
        loss = loss + part
        parts.append(stats)
    return LossResult(loss, logps, _join(parts), grads.result())


def _frozen_head(
    tiles: Tiles,
    hidden: Tensor,
    problem: Problem,
    outputs: tuple[str, ...],
    differentiate: bool,
    dtype: torch.dtype,
    logps: Tensor,
) -> LossResult:
    """A head without gradient: no unit is cut, because its coefficients may come last."""
    gradient = None
    if differentiate:
        stats, gradient = score_with_gradient(tiles, hidden, problem.targets, outputs, dtype)
    else:
        stats = tiles.score(hidden, problem.targets, outputs)
    everything = slice(0, hidden.shape[0])
    loss, coefficients = tiles.loss_and_coefficients(
        problem, everything, stats, logps, slice(None), differentiate
    )
    if gradient is not None and coefficients is not None:
        gradient.mul_(coefficients.unsqueeze(1))
    return LossResult(loss, logps, stats, (gradient, None, None))


def _piece(
    tiles: Tiles,
    hidden: Tensor,
    problem: Problem,
    piece: slice,
    selected: Selection,
    outputs: tuple[str, ...],
    logps: Tensor,
    grads: Gradients,
) -> tuple[Tensor, Stats]:
    """One token range that holds whole units; its last tile is not projected twice."""
    targets = problem.targets
    if piece.start == piece.stop:
        stats = tiles.score(hidden[piece], targets[piece], outputs)
        loss, _ = tiles.loss_and_coefficients(problem, piece, stats, logps, selected, False)
        return loss, stats
    *earlier, last = _ranges(piece.start, piece.stop, tiles.rows)
    before = slice(piece.start, last.start)
    parts = [tiles.score(hidden[before], targets[before], outputs)] if earlier else []
    tile, row_scale, stats = tiles.exponentials(hidden[last], targets[last], outputs)
    stats = _join([*parts, stats])
    loss, coefficients = tiles.loss_and_coefficients(
        problem, piece, stats, logps, selected, differentiate=True
    )
    assert coefficients is not None
    grads.add(last, tile, row_scale * coefficients[before.stop - before.start :])
    for rows in earlier:
        inside = slice(rows.start - piece.start, rows.stop - piece.start)
        tile, row_scale = tiles.probabilities(hidden[rows], targets[rows], _part(stats, inside))
        grads.add(rows, tile, row_scale * coefficients[inside])
    return loss, stats
