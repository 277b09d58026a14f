"""Log-probabilities without a gradient: 2TVH operations, and no logits in memory.

A program takes BLOCK_T tokens and a segment of the vocabulary, makes its logits block by block and
keeps a running maximum m and a running sum s = Σ exp(z − m) per token (the online log-sum-exp of
Milakov and Gimelshein 2018). The segments of a token are merged in a fixed order by a second, small
kernel:

    logp_t = z_t,y − m − log s        lse_t = m + log s

Segments are short enough to fill the device also when there are few tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import Head, Stats
from .configs import choose, multiprocessors
from .logits import LN2, block_position, exp2, logits_block, prepare, sum_of_logits

TOKENS_A_LAUNCH = 32768
PROGRAMS_A_CORE = 8
_MAX_BLOCKS_A_SEGMENT = 16
GROUP = 16
_MERGED = 32


@triton.jit(
    do_not_specialize=["tokens", "row_blocks", "segments", "blocks_a_segment"],
    do_not_specialize_on_alignment=["targets"],
)
def score_kernel(
    x,
    w,
    bias,
    targets,
    partial,
    tokens,
    vocab,
    width,
    stride_x,
    stride_w,
    scale,
    softcap,
    inv_temperature,
    row_blocks,
    segments,
    blocks_a_segment,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WHOLE_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """partial (3 + extras, segments, tokens): m and z_y (0 elsewhere) in bits, as the first and the
    third, s as the second; then Σe·(z − m), Σe², Σz.
    """
    row_block, segment = block_position(tl.program_id(0), row_blocks, segments, GROUP)
    row = row_block * BLOCK_T
    rows = row + tl.arange(0, BLOCK_T)
    # What does not fit is found by `merge_kernel`; a comparison of int64 takes two.
    target = tl.load(targets + rows, mask=rows < tokens, other=-1).to(tl.int32)
    peak = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    target_logit = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    plain = tl.zeros((BLOCK_T,), tl.float32)
    first = segment * blocks_a_segment
    last = tl.minimum(first + blocks_a_segment, tl.cdiv(vocab, BLOCK_V))
    if tl.max(target, 0) < 0:
        last = first
    for block in range(first, last):
        col = block * BLOCK_V
        z = logits_block(
            x, w, bias, row, col, tokens, vocab, width, stride_x, stride_w,
            scale, softcap, inv_temperature,
            BLOCK_T, BLOCK_V, BLOCK_H, WHOLE_H, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS, TRANSPOSED,
            PRECISION,
        )  # fmt: skip
        cols = col + tl.arange(0, BLOCK_V)
        target_logit += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
        if HAS_MEAN:
            plain += sum_of_logits(z, cols < vocab, DESCRIPTORS)
        z = tl.where((cols < vocab)[None, :], z, -float("inf"))
        highest = tl.maximum(peak, tl.max(z, 1))
        # A token whose logits are −inf so far keeps a sum of 0 instead of exp(−inf + inf).
        base = tl.where(highest == -float("inf"), 0.0, highest)
        shrink = tl.exp2(peak - base)
        d = z - base[:, None]
        e = exp2(d, PRECISION)
        if HAS_ENTROPY:
            # Σe·(z − m) under the old maximum becomes one under the new: shift, then shrink.
            shift = tl.where(total > 0, peak - base, 0.0)
            weighted = (weighted + shift * total) * shrink + tl.sum(tl.where(e > 0, e * d, 0.0), 1)
        if HAS_SQUARES:
            squares = squares * shrink * shrink + tl.sum(e * e, 1)
        total = total * shrink + tl.sum(e, 1)
        peak = highest
    out = partial + tl.cast(segment, tl.int64) * tokens + rows
    step = tl.cast(segments, tl.int64) * tokens
    kept = rows < tokens
    tl.store(out, peak, mask=kept)
    tl.store(out + step, total, mask=kept)
    tl.store(out + 2 * step, target_logit, mask=kept)
    if HAS_ENTROPY:
        tl.store(out + 3 * step, weighted * LN2, mask=kept)
    if HAS_SQUARES:
        tl.store(out + (3 + HAS_ENTROPY) * step, squares, mask=kept)
    if HAS_MEAN:
        tl.store(out + (3 + HAS_ENTROPY + HAS_SQUARES) * step, plain * LN2, mask=kept)


@triton.jit(
    do_not_specialize=["stride", "tokens", "segments"],
    do_not_specialize_on_alignment=["targets"],
)
def merge_kernel(
    targets,
    partial,
    results,
    stride,
    tokens,
    vocab,
    segments,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):
    """results (8, tokens): logp, lse, top-1 (0 or 1), entropy, log Σp², mean logit, then m in bits
    and −log s, for tokens that are not ignored. A target outside the vocabulary gives NaN.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    kept = rows < tokens
    target = tl.load(targets + rows, mask=kept, other=-1)
    lanes = tl.arange(0, BLOCK_S)
    step = tl.cast(segments, tl.int64) * tokens
    source = partial + rows[None, :]
    peak = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    for first in range(0, segments, BLOCK_S):
        at = source + (first + lanes).to(tl.int64)[:, None] * tokens
        read = (first + lanes < segments)[:, None] & kept[None, :]
        peak = tl.maximum(peak, tl.max(tl.load(at, mask=read, other=-float("inf")), 0))
    base = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.zeros((BLOCK_T,), tl.float32)
    target_logit = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    plain = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, segments, BLOCK_S):
        at = source + (first + lanes).to(tl.int64)[:, None] * tokens
        read = (first + lanes < segments)[:, None] & kept[None, :]
        shift = tl.load(at, mask=read, other=-float("inf")) - base[None, :]
        shrink = tl.exp2(shift)
        part = tl.load(at + step, mask=read, other=0.0)
        total += tl.sum(part * shrink, 0)
        target_logit += tl.sum(tl.load(at + 2 * step, mask=read, other=0.0), 0)
        if HAS_ENTROPY:
            inner = tl.load(at + 3 * step, mask=read, other=0.0)
            weighted += tl.sum((inner + tl.where(part > 0, shift * LN2, 0.0) * part) * shrink, 0)
        if HAS_SQUARES:
            inner = tl.load(at + (3 + HAS_ENTROPY) * step, mask=read, other=0.0)
            squares += tl.sum(inner * shrink * shrink, 0)
        if HAS_MEAN:
            inner = tl.load(at + (3 + HAS_ENTROPY + HAS_SQUARES) * step, mask=read, other=0.0)
            plain += tl.sum(inner, 0)
    log_total = tl.log(total)
    logp = tl.where(target < vocab, (target_logit - base) * LN2 - log_total, float("nan"))
    valid = kept & (target >= 0)
    out = results + rows
    tl.store(out, logp, mask=valid)
    tl.store(out + stride, base * LN2 + log_total, mask=valid)
    # The largest of logits drops NaN, their sum does not.
    top1 = (target_logit >= peak) & (total == total)
    tl.store(out + 2 * stride, top1.to(tl.float32), mask=valid)
    if HAS_ENTROPY:
        tl.store(out + 3 * stride, log_total - weighted / total, mask=valid)
    if HAS_SQUARES:
        tl.store(out + 4 * stride, tl.log(squares) - 2.0 * log_total, mask=valid)
    if HAS_MEAN:
        tl.store(out + 5 * stride, plain / vocab, mask=valid)
    tl.store(out + 6 * stride, base, mask=valid)
    tl.store(out + 7 * stride, -log_total, mask=valid)


def score(head: Head, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Stats:
    """Statistics of `Tiles.score`; hidden (t, H) and the head's weight have one dtype."""
    tokens = hidden.shape[0]
    results = torch.zeros((len(_ROWS), tokens), dtype=torch.float32, device=hidden.device)
    for start in range(0, tokens, TOKENS_A_LAUNCH):
        part = slice(start, min(start + TOKENS_A_LAUNCH, tokens))
        score_into(results[:, part], head, hidden[part], targets[part], outputs)
    return unpack(results, outputs)


def unpack(results: Tensor, outputs: tuple[str, ...]) -> Stats:
    """Statistics by name, each in memory of its own, out of the rows that a kernel wrote."""
    rows = dict(zip(_ROWS, results.unbind(0), strict=True))
    return {
        name: rows[name] != 0 if name == "is_top1" else rows[name].clone()
        for name in ("logprob", "lse", *outputs)
    }


_ROWS = (
    "logprob",
    "lse",
    "is_top1",
    "entropy",
    "log_sum_sq_prob",
    "mean_logit",
    "peak",
    "log_share",
)


def extras(outputs: tuple[str, ...]) -> dict[str, bool]:
    """Compile-time flags of the statistics that need sums of their own."""
    return {
        "HAS_ENTROPY": "entropy" in outputs,
        "HAS_SQUARES": "log_sum_sq_prob" in outputs,
        "HAS_MEAN": "mean_logit" in outputs,
    }


def score_into(
    results: Tensor,
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    outputs: tuple[str, ...],
) -> None:
    """Write the rows of results (8, t) for the tokens that are not ignored."""
    partial = partial_sums(head, hidden, targets, outputs)
    merge_kernel[(triton.cdiv(hidden.shape[0], _MERGED),)](
        targets,
        partial,
        results,
        results.stride(0),
        hidden.shape[0],
        head.weight.shape[0],
        partial.shape[1],
        BLOCK_T=_MERGED,
        BLOCK_S=32,
        **extras(outputs),
    )


def partial_sums(head: Head, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Tensor:
    """What `score_kernel` writes, (3 + extras, segments, t), for the tokens not ignored."""
    tokens, vocab = hidden.shape[0], head.weight.shape[0]
    config = choose(head, hidden, outputs, online=True)
    launch, flags = prepare(head, hidden, config), extras(outputs)
    row_blocks, col_blocks = triton.cdiv(tokens, config.block_t), triton.cdiv(vocab, config.block_v)
    wanted = PROGRAMS_A_CORE * multiprocessors(hidden.device)
    blocks_a_segment = max(1, row_blocks * col_blocks // wanted)
    segments = triton.cdiv(col_blocks, min(blocks_a_segment, col_blocks, _MAX_BLOCKS_A_SEGMENT))
    # No more sums than a tile of exponentials has, for which `TritonLayout` leaves room.
    blocks = triton.cdiv(vocab, choose(head, hidden, outputs).block_v)
    sums, room = 3 + sum(flags.values()), blocks * (1 + len({*outputs} - {"lse"}))
    blocks_a_segment = triton.cdiv(col_blocks, max(1, min(segments, room // sums)))
    segments = triton.cdiv(col_blocks, blocks_a_segment)
    partial = hidden.new_empty((sums, segments, tokens), dtype=torch.float32)
    score_kernel[(row_blocks * segments,)](
        **launch,
        targets=targets,
        partial=partial,
        row_blocks=row_blocks,
        segments=segments,
        blocks_a_segment=blocks_a_segment,
        GROUP=GROUP,
        **flags,
    )
    return partial
