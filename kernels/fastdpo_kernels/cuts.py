"""Where packed tokens may be cut so that no unit of a loss is cut: the pieces of a call.

Works on the host: nothing waits for a device if `response_ids` and `units` lie there.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .problem import NONE, Problem, Selection, responses_of


def unit_cuts(problem: Problem) -> tuple[list[int], Tensor]:
    """Every place, from 0 to T, where no response or unit is cut; and the first token of each unit
    (U,), on the host.
    """
    tokens, responses = problem.targets.shape[0], problem.ref_logps.shape[0]
    return token_cuts(tokens, responses, problem.response_ids, problem.units)


def token_cuts(
    tokens: int, responses: int, response_ids: Tensor, units: Tensor
) -> tuple[list[int], Tensor]:
    """`unit_cuts` of so many tokens and responses, from response_ids (T,) and units (U, k)."""
    ids, units = responses_of("response_ids", response_ids.cpu(), responses), units.cpu()
    none, units = units == NONE, units.clamp(min=0)
    position = torch.arange(tokens)
    first = torch.full((responses,), tokens).scatter_reduce(0, ids, position, "amin")
    last = torch.full((responses,), -1).scatter_reduce(0, ids, position, "amax")
    unit_first = first[units].masked_fill(none, tokens).amin(1)
    begin = torch.cat([first, unit_first])
    end = torch.cat([last, last[units].masked_fill(none, -1).amax(1)])
    held = end >= begin
    crossed = torch.zeros(tokens + 2, dtype=torch.int64)
    crossed.index_add_(0, begin[held] + 1, torch.ones_like(begin[held]))
    crossed.index_add_(0, end[held] + 1, -torch.ones_like(end[held]))
    cuts = (crossed.cumsum(0)[: tokens + 1] == 0).nonzero().squeeze(1).tolist()
    return cuts, unit_first.clamp(max=tokens - 1)


def units_between(unit_begin: Tensor, piece: slice, device: torch.device) -> Selection:
    """The units that begin in a piece, from the first tokens (U,) of all."""
    inside = (unit_begin >= piece.start) & (unit_begin < piece.stop)
    return _range_or_indices(inside, device)


def pieces(cuts: Sequence[int], rows: int) -> Iterator[slice]:
    """Ranges that begin and end at `cuts`, ascending from 0 to T, and hold at most `rows` tokens
    where possible.
    """
    start = 0
    for here, following in zip(cuts, [*cuts[1:], None], strict=True):
        if here > start and (following is None or following - start > rows):
            yield slice(start, here)
            start = here


def whole_units(problem: Problem, rows: int) -> Iterator[tuple[slice, Selection]]:
    """Cut the tokens where no response or unit is cut, into pieces of at most `rows` tokens where
    possible; a loss of a whole step has one piece.

    Yields the token slice and the units inside it; together they cover everything once.
    """
    tokens = problem.targets.shape[0]
    if tokens == 0 or problem.loss.kind == "step":
        yield slice(0, tokens), slice(None)
        return
    cuts, unit_begin = unit_cuts(problem)
    for piece in pieces(cuts, rows):
        yield piece, units_between(unit_begin, piece, problem.targets.device)


def _range_or_indices(inside: Tensor, device: torch.device) -> Selection:
    indices = inside.nonzero().squeeze(1)
    count = indices.shape[0]
    if count == 0:
        return slice(0, 0)
    start = int(indices[0])
    if int(indices[-1]) - start + 1 == count:
        return slice(start, start + count)
    return indices.to(device)
