"""The anchored exponential: a tile of exp(z − a) in memory, from which both gradients are made.

The anchor a_t of a token is its target's own logit, computed first (T·H work). One product then
writes, block by block,

    E_tv = exp(z_tv − a_t),      s_t = 1 + Σ_{v≠y} E_tv,      logp_t = −log s_t,

with the sums in fp32 and without the target's column, so that log1p keeps logp exact as p → 1. No
running maximum, no atomics, one order of summation. At the end the target's entry becomes
−Σ_{v≠y} E_tv; then softmax − onehot = E/s, and a coefficient per token never touches the tile:

    dX = (E·W)·r,      dW = Eᵀ·(X·r),      r_t = −c_t·scale/s_t.

With a soft cap E also carries its slope 1 − tanh². A sum that reaches exp(clamp) flags its token:
its log-sum-exp is then computed as in `score`, and its row of E once more as softmax − onehot
(`again`); a second pass over the same tokens does so for all of them. The kernels look for flagged
tokens on the device; where there are none they end at once.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..head import Head, Stats
from .again import again, at_most
from .anchor import anchors
from .configs import Config, choose, multiprocessors
from .finish import finish
from .logits import (
    LN2,
    LOG2E,
    block_position,
    exp2,
    logits_block,
    prepare,
    softcap_slope,
    sum_of_logits,
)
from .score import extras, score_into, unpack

GROUP = 16
_CLAMP = 75.0
_CLAMP_SQUARED = 40.0
_NO_EXTRAS = {"HAS_ENTROPY": False, "HAS_SQUARES": False, "HAS_MEAN": False, "HAS_TOP1": False}


@triton.jit
def _exponential_block(
    x, w, bias, targets, anchor, entry, tile, partial, row_block, col_block,
    tokens, vocab, width, stride_x, stride_w, stride_tile,
    scale, softcap, inv_temperature, clamp,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, WHOLE_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_SQUARES: tl.constexpr, HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
):  # fmt: skip
    """One block of `exponential_kernel`."""
    row, col = row_block * BLOCK_T, col_block * BLOCK_V
    z = logits_block(
        x, w, bias, row, col, tokens, vocab, width, stride_x, stride_w,
        scale, softcap, inv_temperature,
        BLOCK_T, BLOCK_V, BLOCK_H, WHOLE_H, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS, TRANSPOSED,
        PRECISION,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_T)
    cols = col + tl.arange(0, BLOCK_V)
    kept = rows < tokens
    # A target that does not fit has been found by `anchor_kernel`; a comparison of int64 takes two.
    target = tl.load(targets + rows, mask=kept, other=-1).to(tl.int32)
    hit = cols[None, :] == target[:, None]
    a = tl.load(anchor + rows, mask=kept, other=0.0)[:, None]
    if SUMS:
        other = (cols < vocab)[None, :] & (hit == 0)
        out = partial + tl.cast(col_block, tl.int64) * tokens + rows
        step = tl.cast(tl.cdiv(vocab, BLOCK_V), tl.int64) * tokens
        # In this order, and from z each time, the sums need the fewest registers.
        if HAS_MEAN:
            mean = sum_of_logits(z, cols < vocab, DESCRIPTORS) * LN2
            tl.store(out + step, mean, mask=kept)
        e = exp2(tl.where(other, at_most(z - a, clamp), -float("inf")), PRECISION)
        tl.store(out, tl.sum(e, 1), mask=kept)
        if HAS_TOP1:
            tl.store(out + (1 + HAS_MEAN) * step, tl.max(e, 1), mask=kept)
        out += (1 + HAS_MEAN + HAS_TOP1) * step
        if HAS_ENTROPY:
            tl.store(out, tl.sum(e * tl.maximum(z - a, -1e4), 1) * LN2, mask=kept)
        if HAS_SQUARES:
            tl.store(out + HAS_ENTROPY * step, tl.sum(e * e, 1), mask=kept)
    else:
        known = tl.load(entry + rows, mask=kept, other=0.0)[:, None]
        e = tl.where(hit, known, exp2(at_most(z - a, 0.0), PRECISION))
    if HAS_SOFTCAP:
        e = e * softcap_slope(z, softcap, inv_temperature)
    if DESCRIPTORS:
        tile.store([row, col], e.to(tile.dtype))
    else:
        at = tile + rows.to(tl.int64)[:, None] * stride_tile + cols[None, :]
        tl.store(at, e.to(tile.dtype.element_ty), mask=kept[:, None] & (cols < vocab)[None, :])


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["targets", "entry"])
def exponential_kernel(
    x,
    w,
    bias,
    targets,
    anchor,
    entry,
    tile,
    partial,
    tokens,
    vocab,
    width,
    stride_x,
    stride_w,
    stride_tile,
    scale,
    softcap,
    inv_temperature,
    clamp,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WHOLE_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """tile (tokens, vocab) = E. With SUMS, partial (1 + extras, blocks, tokens): Σ E over v ≠ y;
    then Σ z, max E over v ≠ y, Σ E·(z − a), Σ E². Without, E is softmax − onehot, `anchor`
    the log-sum-exp in bits and `entry` the target's.
    """
    row_blocks, col_blocks = tl.cdiv(tokens, BLOCK_T), tl.cdiv(vocab, BLOCK_V)
    if PERSISTENT:
        for program in tl.range(
            tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0), flatten=True
        ):
            row_block, col_block = block_position(program, row_blocks, col_blocks, GROUP)
            _exponential_block(
                x, w, bias, targets, anchor, entry, tile, partial, row_block, col_block,
                tokens, vocab, width, stride_x, stride_w, stride_tile,
                scale, softcap, inv_temperature, clamp,
                BLOCK_T, BLOCK_V, BLOCK_H, WHOLE_H, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS, TRANSPOSED,
                PRECISION, SUMS, HAS_ENTROPY, HAS_SQUARES, HAS_MEAN, HAS_TOP1,
            )  # fmt: skip
    else:
        # Without a loop the block that is stored takes the memory that the pipeline had.
        row_block, col_block = block_position(tl.program_id(0), row_blocks, col_blocks, GROUP)
        _exponential_block(
            x, w, bias, targets, anchor, entry, tile, partial, row_block, col_block,
            tokens, vocab, width, stride_x, stride_w, stride_tile,
            scale, softcap, inv_temperature, clamp,
            BLOCK_T, BLOCK_V, BLOCK_H, WHOLE_H, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS, TRANSPOSED,
            PRECISION, SUMS, HAS_ENTROPY, HAS_SQUARES, HAS_MEAN, HAS_TOP1,
        )  # fmt: skip


def exponentials(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    tile: Tensor,
    outputs: tuple[str, ...],
) -> tuple[Tensor, Stats]:
    """Fill tile (t, V) with E; returns row_scale (t,) and the statistics of `Tiles.score`."""
    anchor = anchors(head, hidden, targets)
    partial, clamp, flags = anchored(head, hidden, targets, tile, anchor, outputs)
    results, row_scale, flagged = finish(head, targets, anchor, tile, partial, clamp, flags)
    del partial  # before the sums of `score`, which are no more
    score_into(results, head, hidden, flagged, outputs)
    again(head, hidden, flagged, tile, results[6], results[7])
    return row_scale, unpack(results, outputs)


def clamp_of(flags: dict[str, bool]) -> float:
    """The exponent at which the sums end, nats."""
    return _CLAMP_SQUARED if flags["HAS_SQUARES"] else _CLAMP


def anchored(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    tile: Tensor,
    anchor: Tensor,
    outputs: tuple[str, ...],
) -> tuple[Tensor, float, dict[str, bool]]:
    """Fill tile (t, V) with E but for the targets' entries, from known anchors (t,); returns the
    partial sums of `exponential_kernel`, the exponent they end at, and which of them there are.
    """
    tokens, vocab = tile.shape
    config = choose(head, hidden, outputs)
    flags = {**extras(outputs), "HAS_TOP1": "is_top1" in outputs}
    clamp = clamp_of(flags)
    blocks = triton.cdiv(vocab, config.block_v)
    partial = anchor.new_empty((1 + sum(flags.values()), blocks, tokens))
    _launch(head, hidden, targets, tile, config, anchor, anchor, partial, clamp, flags)
    return partial, clamp, flags


def probabilities(
    head: Head, hidden: Tensor, targets: Tensor, tile: Tensor, stats: Stats
) -> Tensor:
    """Fill tile (t, V) with softmax − onehot from known statistics; returns row_scale (t,)."""
    logprob = stats["logprob"]
    normalised(head, hidden, targets, tile, stats["lse"] * LOG2E.value, logprob)
    valid = (targets >= 0).to(logprob.dtype)
    return valid.masked_fill_(targets >= head.weight.shape[0], math.nan)


def normalised(
    head: Head, hidden: Tensor, targets: Tensor, tile: Tensor, lse: Tensor, logprob: Tensor
) -> None:
    """Fill tile (t, V) with softmax − onehot, from log-sum-exps in bits and log-probabilities (t,).

    p_y − 1 comes from the log-probability: as p_y → 1 its own rounding is all that is left of it.
    """
    config = choose(head, hidden)
    _launch(head, hidden, targets, tile, config, lse, logprob.expm1(), lse, 0.0, None)


def _launch(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    tile: Tensor,
    config: Config,
    anchor: Tensor,
    entry: Tensor,
    partial: Tensor,
    clamp: float,
    flags: dict[str, bool] | None,
) -> None:
    """Run `exponential_kernel`; without `flags`, no sums."""
    launch, cores = prepare(head, hidden, config), multiprocessors(hidden.device)
    tokens, vocab = tile.shape
    blocks = triton.cdiv(tokens, config.block_t) * triton.cdiv(vocab, config.block_v)
    destination: Any = tile
    if launch["DESCRIPTORS"]:
        destination = TensorDescriptor.from_tensor(tile, [config.block_t, config.block_v])
    exponential_kernel[(min(blocks, cores) if config.persistent else blocks,)](
        **launch,
        **(flags or _NO_EXTRAS),
        targets=targets,
        anchor=anchor,
        entry=entry,
        tile=destination,
        partial=partial,
        stride_tile=tile.stride(0),
        clamp=clamp * LOG2E.value,
        SUMS=flags is not None,
        GROUP=GROUP,
        PERSISTENT=config.persistent,
    )
