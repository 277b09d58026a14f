"""What is computed when, over all ranks of a group: `regimes.py`, a round of tokens at a time.

Bytes that a rank sends and receives on average, of T tokens of all ranks with H numbers each in 2
bytes: 2·T·H for the states, 2·T·H for their gradients, and a few numbers a token.
"""

import torch
from torch import Tensor

from ..cuts import unit_cuts, units_between
from ..gradients import Dtypes, Gradients, Needs, with_lse
from ..head import Stats, Tiles
from ..problem import Problem, Selection, add_sums
from ..regimes import LossResult, join, part_of, piece_gradients, ranges
from .call import ShardCall
from .merge import ANCHOR, LOG_SHARE
from .rounds import Round, even_rounds, whole_rounds


def score(
    call: ShardCall, tiles: Tiles, outputs: tuple[str, ...], keep: bool = False
) -> tuple[Stats, list[Tensor]]:
    """Statistics of this rank's tokens; with `keep`, the states of every round, for a later pass
    over `rounds_of` the same call.
    """
    parts, kept = [], []
    for piece in rounds_of(call, tiles):
        states = call.states(piece)
        stats = tiles.score(states, call.round_targets(piece), outputs)
        parts.append(part_of(stats, call.mine(piece)))
        if keep:
            kept.append(states)
    return join(parts), kept


def rounds_of(call: ShardCall, tiles: Tiles) -> list[Round]:
    """The rounds of a call in which any token may be in any."""
    return even_rounds(call.counts, tiles.rows)


def score_with_gradient(
    call: ShardCall, tiles: Tiles, outputs: tuple[str, ...]
) -> tuple[Stats, Tensor]:
    """The same, and ∂logp_t/∂x_t (t, H) of this rank's, of a head without gradient."""
    gradient = call.hidden.new_empty(call.hidden.shape, dtype=call.dtypes.hidden)
    parts = []
    for piece in rounds_of(call, tiles):
        states, targets = call.states(piece), call.round_targets(piece)
        grads = Gradients(tiles, states, Needs(True, False, False), _partial(call))
        some = [tiles.score(states[:0], targets[:0], outputs)]
        for rows in ranges(0, len(targets), tiles.rows):
            tile, row_scale, stats = tiles.exponentials(states[rows], targets[rows], outputs)
            grads.add(rows, tile, row_scale)
            some.append(stats)
        assert grads.hidden is not None
        call.send_back(grads.hidden, piece, gradient)
        parts.append(part_of(join(some), call.mine(piece)))
    return join(parts), gradient


def logprob_gradients(
    call: ShardCall,
    tiles: Tiles,
    kept: list[Tensor],
    stats: Stats,
    coefficients: Tensor,
    of_lse: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ c_t·logp_t + d_t·lse_t for any coefficients (t,) of this rank's tokens, d
    `of_lse`, from what `score` gave and kept.
    """
    grads, hidden = _gradients(call, tiles)
    columns = [stats["logprob"], stats[ANCHOR], stats[LOG_SHARE], coefficients]
    columns += [] if of_lse is None else [stats["lse"], of_lse]
    numbers = torch.stack(columns, 1)
    for piece, states in zip(rounds_of(call, tiles), kept, strict=True):
        own = numbers[piece[call.exchange.rank]]
        gathered = call.exchange.gather(own, call.lengths(piece)).T.contiguous()
        logprob, anchor, share, coefficients, *others = gathered
        known = {"logprob": logprob, ANCHOR: anchor, LOG_SHARE: share}
        targets = call.round_targets(piece)
        grads.turn_to(states)
        for rows in ranges(0, len(targets), tiles.rows):
            tile, scale = tiles.probabilities(states[rows], targets[rows], part_of(known, rows))
            c = coefficients[rows]
            if others:
                lse, d = (other[rows] for other in others)
                about = (scale, targets[rows], logprob[rows], logprob[rows] + lse)
                c = with_lse(tiles, tile, *about, c, d)
            grads.add(rows, tile, scale * c)
        if grads.hidden is not None:
            call.send_back(grads.hidden, piece, hidden)
    return _finish(call, grads, hidden)


def preference_loss(call: ShardCall, tiles: Tiles, problem: Problem) -> LossResult:
    """The loss of this rank's units; gradients of hidden of that, of the head of all ranks'."""
    outputs = call.outputs
    host, problem = problem, problem.to(call.hidden.device)
    logps = call.hidden.new_zeros(problem.ref_logps.shape[0], dtype=torch.float64)
    if not call.needs.head:
        return _frozen_head(call, tiles, problem, outputs, logps)
    grads, hidden = _gradients(call, tiles)
    cuts, unit_begin = _cuts(call, tiles, host)
    loss = logps.new_zeros(())
    parts = [tiles.score(call.hidden[:0], call.targets[:0], outputs)]
    for piece in whole_rounds(cuts, tiles.rows):
        own, mine, lengths = piece[call.exchange.rank], call.mine(piece), call.lengths(piece)
        selected: Selection = slice(None if own.stop > own.start else 0)
        if unit_begin is not None:
            selected = units_between(unit_begin, own, call.hidden.device)

        def answer(
            stats: Stats, own=own, mine=mine, lengths=lengths, selected=selected
        ) -> tuple[Tensor, Tensor]:
            part, c = _own_loss(tiles, problem, own, part_of(stats, mine), logps, selected, True)
            assert c is not None
            return part, call.exchange.gather(c, lengths)

        states, targets = call.states(piece), call.round_targets(piece)
        grads.turn_to(states)
        everything = slice(0, len(targets))
        part, stats = piece_gradients(tiles, states, targets, everything, outputs, grads, answer)
        loss = loss + part
        parts.append(part_of(stats, mine))
        if grads.hidden is not None:
            call.send_back(grads.hidden, piece, hidden)
    stats = join(parts)
    if not len(call.targets):
        loss, _ = _own_loss(tiles, problem, slice(0, 0), stats, logps, slice(None), False)
    return LossResult(loss, logps, stats, _finish(call, grads, hidden))


def _frozen_head(
    call: ShardCall, tiles: Tiles, problem: Problem, outputs: tuple[str, ...], logps: Tensor
) -> LossResult:
    """A head without gradient: no other rank needs the coefficients of this one's tokens."""
    gradient = None
    if call.needs.hidden:
        stats, gradient = score_with_gradient(call, tiles, outputs)
    else:
        stats, _ = score(call, tiles, outputs)
    everything, units = slice(0, len(call.targets)), slice(None)
    differentiate = gradient is not None and len(call.targets) > 0
    loss, c = _own_loss(tiles, problem, everything, stats, logps, units, differentiate)
    if gradient is not None and c is not None:
        gradient.mul_(c.unsqueeze(1))
    return LossResult(loss, logps, stats, (gradient, None, None))


def _own_loss(
    tiles: Tiles,
    problem: Problem,
    tokens: slice,
    stats: Stats,
    logps: Tensor,
    selected: Selection,
    differentiate: bool,
) -> tuple[Tensor, Tensor | None]:
    """`Tiles.loss_and_coefficients` of this rank's tokens, which may have no units."""
    if problem.units[selected].shape[0]:
        return tiles.loss_and_coefficients(problem, tokens, stats, logps, selected, differentiate)
    add_sums(logps, stats["logprob"].double(), problem.response_ids[tokens])
    return logps.new_zeros(()), torch.zeros_like(stats["logprob"]) if differentiate else None


def _cuts(call: ShardCall, tiles: Tiles, problem: Problem) -> tuple[list[list[int]], Tensor | None]:
    """Where the tokens of each rank may be cut, and the first token of each unit of this rank if
    they are.
    """
    whole = [[0, count] if count else [0] for count in call.counts]
    if sum(call.counts) <= tiles.rows:
        return whole, None
    mine, unit_begin = whole[call.exchange.rank], None
    if len(mine) > 1 and problem.loss.kind != "step":
        mine, unit_begin = unit_cuts(problem)
    return call.exchange.ragged(mine, call.hidden.device), unit_begin


def _partial(call: ShardCall) -> Dtypes:
    """A gradient of hidden states is rounded when those of all ranks are added."""
    wide = torch.promote_types(call.hidden.dtype, torch.float32)
    return call.dtypes._replace(hidden=wide)


def _gradients(call: ShardCall, tiles: Tiles) -> tuple[Gradients, Tensor]:
    """Gradients of no tokens so far, and room for those of this rank's hidden states (t, H)."""
    none = call.hidden[:0]
    grads = Gradients(tiles, none, call.needs, _partial(call), total=sum(call.counts))
    return grads, call.hidden.new_empty(call.hidden.shape, dtype=call.dtypes.hidden)


def _finish(
    call: ShardCall, grads: Gradients, hidden: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _, weight, bias = grads.result()
    return hidden if call.needs.hidden else None, weight, bias
