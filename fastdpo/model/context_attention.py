"""Attention of a row whose tokens lie on the ranks of a context-parallel group.

By heads where the query heads divide among the ranks (Ulysses: Jacobs et al. 2023,
arXiv:2309.14509): an all-to-all turns a stretch of tokens with all heads into all tokens with some
heads, the same kernel as on one device runs on the whole row, and an all-to-all turns its output
back. Every rank has the same work and keeps its share of queries, keys and values.

By queries elsewhere: keys and values are gathered and each rank computes its own queries. It holds
all keys and values of a layer, and later ranks, whose queries see more keys, have more to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import lcm

from torch import Tensor

from .backends import Call
from .context import ContextGroup


def spread(call: Call, kernel: Callable[[Call], Tensor], context: ContextGroup) -> Tensor:
    """`kernel` over the whole row; (1, W, Hq, Dv) for this rank's W queries.

    The call's queries, keys and values are those of this rank's stretch, (1, H, W, D), and its
    segments those of the row, filled up to N·W tokens.
    """
    if by_heads(call.query.shape[1], context.size):
        return _by_heads(call, kernel, context)
    return _by_queries(call, kernel, context)


def by_heads(query_heads: int, ranks: int) -> bool:
    """Whether attention divides by heads among so many ranks. Key and value heads that do not are
    repeated until they do.
    """
    return query_heads % ranks == 0


def _by_heads(call: Call, kernel: Callable[[Call], Tensor], context: ContextGroup) -> Tensor:
    ranks, heads = context.size, call.key.shape[1]
    # The fewest heads that divide among the ranks and stand evenly under the query heads.
    repeats = lcm(heads, ranks) // heads
    key, value = (
        x if repeats == 1 else x.repeat_interleave(repeats, dim=1) for x in (call.key, call.value)
    )
    query, key, value = (_all_tokens(x, context) for x in (call.query, key, value))
    sinks = None if call.sinks is None else call.sinks.chunk(ranks)[context.rank]
    out = kernel(replace(call, query=query, key=key, value=value, sinks=sinks))
    return _all_heads(out, context)


def _all_tokens(x: Tensor, context: ContextGroup) -> Tensor:
    """(1, H, W, D), a stretch with all heads → (1, H / N, N·W, D), the row with some."""
    pieces = x[0].unflatten(0, (context.size, -1)).transpose(1, 2)
    return context.exchange(pieces).flatten(0, 1).transpose(0, 1)[None]


def _all_heads(x: Tensor, context: ContextGroup) -> Tensor:
    """(1, N·W, H / N, D), the row with some heads → (1, W, H, D), a stretch with all."""
    pieces = x[0].unflatten(0, (context.size, -1))
    return context.exchange(pieces).transpose(0, 1).flatten(1, 2)[None]


def _by_queries(call: Call, kernel: Callable[[Call], Tensor], context: ContextGroup) -> Tensor:
    key, value = (
        context.gather(x[0].transpose(0, 1)).transpose(0, 1)[None] for x in (call.key, call.value)
    )
    width = call.query.shape[2]
    first = context.rank * width
    segments = call.segments.stretch(first, first + width)
    return kernel(replace(call, key=key, value=value, segments=segments))
