"""The anchored exponential: a tile of exp(z − a) in memory, from which both gradients are made.

The anchor a_t of a token is its target's own logit, computed first (T·H work). One product then
writes, block by block,

    E_tv = exp(z_tv − a_t),      s_t = 1 + Σ_{v≠y} E_tv,      logp_t = −log s_t,

with the sums in fp32 and without the target's column, so that log1p keeps logp exact as p → 1. No
running maximum, no atomics, one order of summation. At the end the target's entry becomes
−Σ_{v≠y} E_tv; then softmax − onehot = E/s, and a coefficient per token never touches the tile:

    dX = (E·W)·r,      dW = Eᵀ·(X·r),      r_t = −c_t·scale/s_t.

With a soft cap E also carries its slope 1 − tanh². A sum that reaches exp(clamp) flags its token:
its log-sum-exp is then computed as in `score`, and its row of E once more with that as the anchor,
which makes it softmax − onehot. A second pass over the same tokens does so for all of them. Both
kernels look for flagged tokens on the device; where there are none they end at once.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..head import Head, Stats
from .anchor import anchors
from .configs import Config, choose, multiprocessors
from .finish import finish
from .logits import block_position, logits_block, prepare, softcap_slope
from .score import extras, score_into, unpack

GROUP = 16
_CLAMP = 75.0
_CLAMP_SQUARED = 40.0
_NO_EXTRAS = {"HAS_ENTROPY": False, "HAS_SQUARES": False, "HAS_MEAN": False, "HAS_TOP1": False}


@triton.jit
def at_most(x, limit):
    """min(x, limit), NaN where x is: a GPU's plain minimum takes the limit instead."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def softmax_minus_onehot(z, anchor, logprob, hit):
    """log p = (z − z_y) + log p_y: the log-sum-exp is too coarse where logits are large."""
    p = tl.exp(at_most(z - anchor + logprob[:, None], 0.0))
    return tl.where(hit, p - 1.0, p)


@triton.jit
def exponential_kernel(
    x,
    w,
    bias,
    targets,
    anchor,
    logprob,
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
    then Σ z, max(z − a), Σ E·(z − a), Σ E². Without, E is softmax − onehot, from `logprob`.
    """
    row_blocks, col_blocks = tl.cdiv(tokens, BLOCK_T), tl.cdiv(vocab, BLOCK_V)
    programs = tl.num_programs(0)
    for program in tl.range(
        tl.program_id(0), row_blocks * col_blocks, programs, flatten=PERSISTENT
    ):
        row_block, col_block = block_position(program, row_blocks, col_blocks, GROUP)
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
        target = tl.load(targets + rows, mask=kept, other=-1)
        hit = cols[None, :] == target[:, None]
        a = tl.load(anchor + rows, mask=kept, other=0.0)[:, None]
        if SUMS:
            other = (cols < vocab)[None, :] & (hit == 0)
            out = partial + tl.cast(col_block, tl.int64) * tokens + rows
            step = tl.cast(col_blocks, tl.int64) * tokens
            # In this order, and from z each time, the sums need the fewest registers.
            if HAS_MEAN:
                tl.store(
                    out + step, tl.sum(tl.where((cols < vocab)[None, :], z, 0.0), 1), mask=kept
                )
            if HAS_TOP1:
                highest = tl.max(tl.where(other, z - a, -float("inf")), 1)
                tl.store(out + (1 + HAS_MEAN) * step, highest, mask=kept)
            e = tl.exp(tl.where(other, at_most(z - a, clamp), -float("inf")))
            tl.store(out, tl.sum(e, 1), mask=kept)
            out += (1 + HAS_MEAN + HAS_TOP1) * step
            if HAS_ENTROPY:
                tl.store(out, tl.sum(e * tl.maximum(z - a, -1e4), 1), mask=kept)
            if HAS_SQUARES:
                tl.store(out + HAS_ENTROPY * step, tl.sum(e * e, 1), mask=kept)
        else:
            known = tl.load(logprob + rows, mask=kept, other=0.0)
            e = softmax_minus_onehot(z, a, known, hit)
        if HAS_SOFTCAP:
            e = e * softcap_slope(z, softcap, inv_temperature)
        if DESCRIPTORS:
            tile.store([row, col], e.to(tile.dtype))
        else:
            at = tile + rows.to(tl.int64)[:, None] * stride_tile + cols[None, :]
            tl.store(at, e.to(tile.dtype.element_ty), mask=kept[:, None] & (cols < vocab)[None, :])


@triton.jit
def again_kernel(
    x,
    w,
    bias,
    targets,
    anchor,
    logprob,
    tile,
    tokens,
    vocab,
    width,
    stride_x,
    stride_w,
    stride_tile,
    scale,
    softcap,
    inv_temperature,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WHOLE_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """softmax − onehot into the rows of the tile whose target is not negative: the flagged ones.

    Whether there are any is decided on the device, a block of rows at a time.
    """
    for row in range(0, tokens, BLOCK_T):
        rows = row + tl.arange(0, BLOCK_T)
        kept = rows < tokens
        target = tl.load(targets + rows, mask=kept, other=-1)
        if tl.max(target, 0) >= 0:
            a = tl.load(anchor + rows, mask=kept, other=0.0)[:, None]
            known = tl.load(logprob + rows, mask=kept, other=0.0)
            for col_block in range(tl.program_id(0), tl.cdiv(vocab, BLOCK_V), tl.num_programs(0)):
                z = logits_block(
                    x, w, bias, row, col_block * BLOCK_V, tokens, vocab, width, stride_x, stride_w,
                    scale, softcap, inv_temperature,
                    BLOCK_T, BLOCK_V, BLOCK_H, WHOLE_H, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS,
                    TRANSPOSED, PRECISION,
                )  # fmt: skip
                cols = col_block * BLOCK_V + tl.arange(0, BLOCK_V)
                e = softmax_minus_onehot(z, a, known, cols[None, :] == target[:, None])
                if HAS_SOFTCAP:
                    e = e * softcap_slope(z, softcap, inv_temperature)
                at = tile + rows.to(tl.int64)[:, None] * stride_tile + cols[None, :]
                mask = (target >= 0)[:, None] & (cols < vocab)[None, :]
                tl.store(at, e.to(tile.dtype.element_ty), mask=mask)


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
    again(head, hidden, flagged, tile, anchor, results[0])
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


def again(
    head: Head, hidden: Tensor, flagged: Tensor, tile: Tensor, anchor: Tensor, logprob: Tensor
) -> None:
    """Rows of the tile (t, V) whose target in `flagged` (t,) is not negative become softmax −
    onehot, from their anchors and log-probabilities (t,).
    """
    launch = prepare(head, hidden, choose(head, hidden, descriptors=False))
    again_kernel[(multiprocessors(hidden.device),)](
        **launch,
        targets=flagged,
        anchor=anchor,
        logprob=logprob,
        tile=tile,
        stride_tile=tile.stride(0),
    )


def probabilities(
    head: Head, hidden: Tensor, targets: Tensor, tile: Tensor, stats: Stats
) -> Tensor:
    """Fill tile (t, V) with softmax − onehot from known statistics; returns row_scale (t,)."""
    anchor, logprob = anchors(head, hidden, targets), stats["logprob"]
    normalised(head, hidden, targets, tile, anchor, logprob)
    return (targets >= 0).to(logprob.dtype)


def normalised(
    head: Head, hidden: Tensor, targets: Tensor, tile: Tensor, anchor: Tensor, logprob: Tensor
) -> None:
    """Fill tile (t, V) with softmax − onehot from anchors and log-probabilities (t,)."""
    config = choose(head, hidden)
    _launch(head, hidden, targets, tile, config, anchor, logprob, anchor, 0.0, None)


def _launch(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    tile: Tensor,
    config: Config,
    anchor: Tensor,
    logprob: Tensor,
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
        logprob=logprob,
        tile=destination,
        partial=partial,
        stride_tile=tile.stride(0),
        clamp=clamp,
        SUMS=flags is not None,
        GROUP=GROUP,
        PERSISTENT=config.persistent,
    )
