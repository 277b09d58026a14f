"""What follows a tile: its partial sums become statistics, and the targets' entries are put in."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import Head
from .logits import LN2, LOG2E, log1p, softcap_slope

_MERGED = 32


@triton.jit(do_not_specialize=["tokens", "blocks"], do_not_specialize_on_alignment=["targets"])
def finish_kernel(
    targets,
    anchor,
    flagged,
    tile,
    partial,
    results,
    row_scale,
    tokens,
    vocab,
    blocks,
    stride_tile,
    softcap,
    inv_temperature,
    limit,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
):
    """From partial sums to the first 6 of results (8, tokens) as in `score`, row_scale (tokens,) =
    1/s, and the targets' entries of the tile. `flagged` gets the targets of the tokens that are
    over the clamp, −1 for the others; the row scale of those is 1.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    kept = rows < tokens
    target = tl.load(targets + rows, mask=kept, other=-1)
    lanes = tl.arange(0, BLOCK_S)
    step = tl.cast(blocks, tl.int64) * tokens
    rest = tl.zeros((BLOCK_T,), tl.float32)
    peak = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    plain = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, blocks, BLOCK_S):
        at = partial + (first + lanes).to(tl.int64)[:, None] * tokens + rows[None, :]
        read = (first + lanes < blocks)[:, None] & kept[None, :]
        rest += tl.sum(tl.load(at, mask=read, other=0.0), 0)
        if HAS_MEAN:
            at += step
            plain += tl.sum(tl.load(at, mask=read, other=0.0), 0)
        if HAS_TOP1:
            at += step
            peak = tl.maximum(peak, tl.max(tl.load(at, mask=read, other=0.0), 0))
        if HAS_ENTROPY:
            at += step
            weighted += tl.sum(tl.load(at, mask=read, other=0.0), 0)
        if HAS_SQUARES:
            at += step
            squares += tl.sum(tl.load(at, mask=read, other=0.0), 0)
    z = tl.load(anchor + rows, mask=kept, other=0.0)
    valid = target >= 0
    over = valid & (rest >= limit)
    s = 1.0 + rest
    log_s = log1p(rest)
    tl.store(flagged + rows, tl.where(over, target, -1), mask=kept)
    scale = tl.where(over, 1.0, 1.0 / s)
    tl.store(row_scale + rows, tl.where(valid, scale, 0.0), mask=kept)
    hit = -rest
    if HAS_SOFTCAP:
        hit = hit * softcap_slope(z, softcap, inv_temperature)
    at = tile + rows.to(tl.int64) * stride_tile + target
    tl.store(at, hit.to(tile.dtype.element_ty), mask=kept & valid & (target < vocab))
    out = results + rows
    tl.store(out, tl.where(valid, -log_s, 0.0), mask=kept)
    tl.store(out + tokens, tl.where(valid, z * LN2 + log_s, 0.0), mask=kept)
    if HAS_TOP1:
        # The largest of logits drops NaN, their sum does not.
        top1 = valid & (peak <= 1.0) & (rest == rest)
        tl.store(out + 2 * tokens, top1.to(tl.float32), mask=kept)
    if HAS_ENTROPY:
        tl.store(out + 3 * tokens, tl.where(valid, log_s - weighted / s, 0.0), mask=kept)
    if HAS_SQUARES:
        collision = tl.log(squares + 1.0) - 2.0 * log_s
        tl.store(out + 4 * tokens, tl.where(valid, collision, 0.0), mask=kept)
    if HAS_MEAN:
        tl.store(out + 5 * tokens, tl.where(valid, plain / vocab, 0.0), mask=kept)


def finish(
    head: Head,
    targets: Tensor,
    anchor: Tensor,
    tile: Tensor,
    partial: Tensor,
    clamp: float,
    flags: dict[str, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the targets' entries into the tile; returns results (8, t) as in `score`, row_scale (t,)
    and the targets (t,) of the tokens over the clamp, −1 for the others.
    """
    tokens, vocab = tile.shape
    flagged, row_scale = torch.empty_like(targets), torch.empty_like(anchor)
    results = anchor.new_empty((8, tokens))
    finish_kernel[(triton.cdiv(tokens, _MERGED),)](
        targets, anchor, flagged, tile, partial, results, row_scale,
        tokens, vocab, partial.shape[1], tile.stride(0), float(head.softcap or 1.0),
        LOG2E.value / head.temperature, math.exp(clamp),
        BLOCK_T=_MERGED, BLOCK_S=32, HAS_SOFTCAP=head.softcap is not None, **flags,
    )  # fmt: skip
    return results, row_scale, flagged
