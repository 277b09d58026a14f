"""FlexAttention over packed rows: soft caps and attention sinks on a GPU without flash-attn.

Nothing is gathered here. Query q of a row sees two intervals of the stream, its own segment up to
itself and its prompt, both cut by the sliding window; blocks of 128 by 128 outside of them are
never computed. A sink is one more key of logit s and value 0, which multiplies the output by
`exp(lse) / (exp(lse) + exp(s)) = sigmoid(lse - s)`. The backward adds without atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ..data.segments import Segments
from .backends import Call

BLOCK = 128
"""Queries and keys of a block of the mask."""


@lru_cache(maxsize=1)
def compiled() -> Callable[..., Any]:
    """FlexAttention as a fused kernel; row lengths become symbolic once they have changed."""
    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def score(s: torch.Tensor, b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        return softcap * torch.tanh(s / softcap)

    return score


def flex(call: Call) -> torch.Tensor:
    """FlexAttention, with all that a layer can ask for; (1, S, Hq, Dv)."""
    out: Any = compiled()(
        call.query,
        call.key,
        call.value,
        score_mod=_capped(call.softcap) if call.softcap else None,
        block_mask=block_mask(
            call.segments, call.sliding_window, call.query.device, call.key.shape[2]
        ),
        scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
        return_aux=None if call.sinks is None else AuxRequest(lse=True),
    )
    if call.sinks is not None:
        out, aux = out
        kept = torch.sigmoid(aux.lse - call.sinks.to(aux.lse.dtype)[:, None])
        out = (out * kept[..., None]).to(call.value.dtype)
    return out.transpose(1, 2)


def block_mask(
    segments: Segments, window: int | None, device: torch.device, keys: int | None = None
) -> BlockMask:
    """What each query of a row sees among so many `keys` (None: as many as the row has), and which
    blocks are seen in part or in full; made once.
    """
    name = ("blocks", window, device)
    if name not in segments.cache:
        intervals = _intervals(segments, window, device)
        begin, keys = segments.bounds[0][0], keys or segments.length
        segments.cache[name] = _block_mask(*intervals, begin, keys)
    return segments.cache[name]


def _intervals(
    segments: Segments, window: int | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int32 (Q,) each: query q sees keys `own[q] … q` and `first[q] … stop[q] - 1`."""
    bounds = torch.tensor(segments.bounds, dtype=torch.int32)
    begin, lengths = int(bounds[0, 0]), bounds[:, 1] - bounds[:, 0]
    bounds[0, 0] = segments.opens
    own, _, first, stop = bounds.repeat_interleave(lengths, dim=0).T
    if window is not None:
        position = torch.arange(begin, segments.length, dtype=torch.int32)
        # A key of the prompt is as far away as if the response followed the prompt at once.
        first = torch.maximum(first, position - own + stop - window + 1)
        own = torch.maximum(own, position - window + 1)
    return own.to(device), first.to(device), stop.to(device)


def _block_mask(
    own: torch.Tensor, first: torch.Tensor, stop: torch.Tensor, begin: int, keys: int
) -> BlockMask:
    """Of the intervals (Q,) of queries that lie in the stream from `begin` on."""

    def sees(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((k >= own[q]) & (k <= q + begin)) | ((k >= first[q]) & (k < stop[q]))

    begins = torch.arange(0, keys, BLOCK, device=own.device)
    ends = begins + BLOCK
    queries = torch.arange(begin, begin + len(own), device=own.device)[:, None]
    low, high, until = own[:, None], first[:, None], stop[:, None]
    some = (low < ends) & (queries >= begins) | (torch.maximum(high, begins) < until.minimum(ends))
    every = (low <= begins) & (queries >= ends - 1) | (high <= begins) & (until >= ends)
    some = _by_block(some, False).any(1)
    every = _by_block(every, True).all(1)
    partial = _ordered(some & ~every)
    return BlockMask.from_kv_blocks(
        *partial, *_ordered(every), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(len(own), keys)
    )


def _by_block(seen: torch.Tensor, filler: bool) -> torch.Tensor:
    """bool (Q, N) → (Q / BLOCK, BLOCK, N), the last block of queries filled up."""
    queries, keys = seen.shape
    missing = -queries % BLOCK
    return torch.nn.functional.pad(seen, (0, 0, 0, missing), value=filler).view(-1, BLOCK, keys)


def _ordered(selected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool (M, N) → how many key blocks each query block has, and their numbers, first of all."""
    order = selected.int().argsort(dim=-1, descending=True, stable=True)
    return selected.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
