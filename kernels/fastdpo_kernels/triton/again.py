"""Rows of a tile once more, as softmax − onehot: those whose sum reached the clamp.

Their logits are far above the target's, which is no good anchor: (z − z_y) + log p_y is a small
difference of large numbers. The highest logit m is: log p = (z − m) − log Σ exp(z − m).
"""

import triton
import triton.language as tl
from torch import Tensor

from ..head import Head
from .configs import choose, multiprocessors
from .logits import LOG2E, exp2, logits_block, prepare, softcap_slope


@triton.jit
def at_most(x, limit):
    """min(x, limit), NaN where x is: a GPU's plain minimum takes the limit instead."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(
    do_not_specialize=["tokens"], do_not_specialize_on_alignment=["targets", "peak", "log_share"]
)
def again_kernel(
    x,
    w,
    bias,
    targets,
    peak,
    log_share,
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
            a = tl.load(peak + rows, mask=kept, other=0.0)[:, None]
            known = tl.load(log_share + rows, mask=kept, other=0.0)[:, None] * LOG2E
            for col_block in range(tl.program_id(0), tl.cdiv(vocab, BLOCK_V), tl.num_programs(0)):
                z = logits_block(
                    x, w, bias, row, col_block * BLOCK_V, tokens, vocab, width, stride_x, stride_w,
                    scale, softcap, inv_temperature,
                    BLOCK_T, BLOCK_V, BLOCK_H, WHOLE_H, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS,
                    TRANSPOSED, PRECISION,
                )  # fmt: skip
                cols = col_block * BLOCK_V + tl.arange(0, BLOCK_V)
                hit = cols[None, :] == target[:, None]
                p = exp2(at_most(z - a + known, 0.0), PRECISION)
                e = tl.where(hit, p - 1.0, p)
                if HAS_SOFTCAP:
                    e = e * softcap_slope(z, softcap, inv_temperature)
                at = tile + rows.to(tl.int64)[:, None] * stride_tile + cols[None, :]
                mask = (target >= 0)[:, None] & (cols < vocab)[None, :]
                tl.store(at, e.to(tile.dtype.element_ty), mask=mask)


def again(
    head: Head, hidden: Tensor, flagged: Tensor, tile: Tensor, peak: Tensor, log_share: Tensor
) -> None:
    """Rows of the tile (t, V) whose target in `flagged` (t,) is not negative become softmax −
    onehot, from their highest logits, in bits, and the logarithms of the share of those (t,).
    """
    launch = prepare(head, hidden, choose(head, hidden, descriptors=False))
    again_kernel[(multiprocessors(hidden.device),)](
        **launch,
        targets=flagged,
        peak=peak,
        log_share=log_share,
        tile=tile,
        stride_tile=tile.stride(0),
    )
