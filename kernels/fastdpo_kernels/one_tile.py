"""The regime of any gradient where all tokens fit one tile: it is kept from the forward (`kept`),
and the backward is its two products alone (6TVH).
"""

from typing import Any

import torch
from torch import Tensor

from . import kept
from .call import Call, begin, inside_operator, names
from .fakes import dtypes_of
from .gradients import Gradients, Needs
from .head import Stats


def score(call: Call, outputs: str) -> Stats:
    """What `Tiles.score` gives; the tile is kept, if it is wanted and one holds all tokens."""
    tiles, arguments = call.tiles, (call.hidden, call.targets, names(outputs))
    fits = 0 < call.targets.shape[0] <= tiles.rows and tiles.projects_once
    if not (fits and kept.wanted()):
        return tiles.score(*arguments)
    tile, row_scale, stats = tiles.exponentials(*arguments)
    kept.keep(tile, row_scale)
    return stats


def gradients(
    ctx: Any,
    grad_logprob: Tensor | None,
    grad_lse: Tensor | None,
    saved: list[Any],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...] | None:
    """What `linear_logprob_backward` returns of the tensors that were `saved`, from the tile that
    `ctx` has kept; None where it has none, and for a gradient of lse, which is written into a tile.
    """
    held: kept.Kept | None = ctx.kept
    if held is None or type(grad_logprob) is not Tensor:  # a compiler looks on
        return None
    tile = held.tile
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.kept = None
    if tile is None or grad_lse is not None:
        return None
    hidden, weight, bias, targets, *_ = saved
    with inside_operator(hidden):
        call = begin(hidden, weight, bias, targets, **ctx.options)
        if call.hidden.shape[0] != tile.shape[0]:  # "auto" stands for another engine by now
            return None
        grads = Gradients(call.tiles, call.hidden, Needs(*needs), dtypes_of(hidden, weight, bias))
        scale = held.row_scale * call.take(grad_logprob)
        grads.add(slice(0, call.hidden.shape[0]), tile, scale)
        of_hidden, *others = grads.result()
        return None if of_hidden is None else call.spread(of_hidden), *others
