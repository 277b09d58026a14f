"""What is computed when: the regimes of a head, in terms of `Tiles`.

The gradient of `c_t·logp_t` with respect to the logits is `c_t·(onehot(y_t) − softmax(z_t))`: one
scalar per token times something the forward knows already. Hence:

- no gradient: `Tiles.score`, one product (2TVH operations);
- frozen head: E·W is formed with the forward and scaled by whatever c_t arrives later (4TVH);
- units (comparisons, responses, groups) that are whole inside a tile: c_t follows at once, so both
  gradients are formed from the tile while it exists (6TVH); of a unit longer than a tile, and of a
  loss of a whole step, all but the last tile are projected twice (up to 8TVH);
- any other gradient: the backward projects again (8TVH), but where all tokens fit one tile, which
  is kept (6TVH, `one_tile`).

Nothing here waits for a device, but for the plan of tokens that do not fit one tile, which is made
on the host, and for losses of tokens, which ask how many tokens their units have.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .cuts import whole_units
from .gradients import Dtypes, Gradients, Needs, with_lse
from .head import Stats, Tiles
from .losses import Loss
from .problem import Problem, Selection


def ranges(start: int, stop: int, rows: int) -> Iterator[slice]:
    """The tokens of each tile in turn."""
    for first in range(start, stop, rows):
        yield slice(first, min(first + rows, stop))


def part_of(stats: Stats, rows: slice) -> Stats:
    return {name: value[rows] for name, value in stats.items()}


def join(parts: list[Stats]) -> Stats:
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
    for rows in ranges(0, targets.shape[0], tiles.rows):
        tile, row_scale, stats = tiles.exponentials(hidden[rows], targets[rows], outputs)
        grads.add(rows, tile, row_scale)
        parts.append(stats)
    assert grads.hidden is not None
    return join(parts) if parts else tiles.score(hidden, targets, outputs), grads.hidden


def logprob_gradients(
    tiles: Tiles,
    hidden: Tensor,
    targets: Tensor,
    stats: Stats,
    coefficients: Tensor,
    needs: Needs,
    dtypes: Dtypes,
    of_lse: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ c_t·logp_t + d_t·lse_t for any coefficients (T,), d `of_lse`, from the
    statistics of the forward.
    """
    grads = Gradients(tiles, hidden, needs, dtypes)
    for rows in ranges(0, targets.shape[0], tiles.rows):
        some, c = part_of(stats, rows), coefficients[rows]
        tile, row_scale = tiles.probabilities(hidden[rows], targets[rows], some)
        if of_lse is not None:
            logit = some["logprob"] + some["lse"]
            known = (row_scale, targets[rows], some["logprob"], logit)
            c = with_lse(tiles, tile, *known, c, of_lse[rows])
        grads.add(rows, tile, row_scale * c)
    return grads.result()


def measured(loss: Loss, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """What is measured of every token for a loss, and because it is asked for."""
    weighting = ("log_sum_sq_prob",) if loss.use_weighting else ()
    return tuple(dict.fromkeys((*outputs, *weighting)))


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
    """The loss of packed units with the gradients that are wanted; `outputs` are those `measured`
    for it.
    """
    everything = slice(0, hidden.shape[0])
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
    return LossResult(loss, logps, join(parts), grads.result())


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

    def answer(stats: Stats) -> tuple[Tensor, Tensor | None]:
        return tiles.loss_and_coefficients(problem, piece, stats, logps, selected, True)

    return piece_gradients(tiles, hidden, targets, piece, outputs, grads, answer)


def piece_gradients(
    tiles: Tiles,
    hidden: Tensor,
    targets: Tensor,
    piece: slice,
    outputs: tuple[str, ...],
    grads: Gradients,
    answer: Callable[[Stats], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Stats]:
    """Score a range of tokens, ask for its loss and the coefficient of every token in it (t,), and
    add its gradients. Returns the loss and the statistics.

    The last tile is not projected twice, so it is a full one: what is left over comes first.
    """
    over = (piece.stop - piece.start) % tiles.rows
    first = [slice(piece.start, piece.start + over)] if over else []
    *earlier, last = [*first, *ranges(piece.start + over, piece.stop, tiles.rows)]
    before = slice(piece.start, last.start)
    parts = [tiles.score(hidden[rows], targets[rows], outputs) for rows in earlier]
    tile, row_scale, stats = tiles.exponentials(hidden[last], targets[last], outputs)
    stats = join([*parts, stats])
    loss, coefficients = answer(stats)
    assert coefficients is not None
    grads.add(last, tile, row_scale * coefficients[before.stop - before.start :])
    for rows in earlier:
        inside = slice(rows.start - piece.start, rows.stop - piece.start)
        tile, row_scale = tiles.probabilities(hidden[rows], targets[rows], part_of(stats, inside))
        grads.add(rows, tile, row_scale * coefficients[inside])
    return loss, stats
