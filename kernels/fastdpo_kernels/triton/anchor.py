"""The anchor of a token: its target's own logit a_t = z_t,y in bits, which costs T·H operations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import Head
from .logits import operands, transform

_BLOCK_T = 8


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["targets"])
def anchor_kernel(
    x,
    w,
    bias,
    targets,
    anchor,
    tokens,
    vocab,
    width,
    stride_x,
    stride_w,
    scale,
    softcap,
    inv_temperature,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """anchor (tokens,): the target's logit in bits; 0 where ignored, NaN for a target outside."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    target = tl.load(targets + rows, mask=rows < tokens, other=-1)
    known = (target >= 0) & (target < vocab)
    x_row = x + rows.to(tl.int64)[:, None] * stride_x
    w_row = w + tl.where(known, target, 0).to(tl.int64)[:, None] * (1 if TRANSPOSED else stride_w)
    acc = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in range(0, width, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        read = known[:, None] & (h < width)[None, :]
        a = tl.load(x_row + h[None, :], mask=read, other=0.0).to(tl.float32)
        at = w_row + (h.to(tl.int64)[None, :] * stride_w if TRANSPOSED else h[None, :])
        acc += a * tl.load(at, mask=read, other=0.0).to(tl.float32)
    raw = tl.sum(acc, 1)
    if HAS_BIAS:
        raw += tl.load(bias + target, mask=known, other=0.0).to(tl.float32)
    z = transform(raw, scale, softcap, inv_temperature, HAS_SOFTCAP, PRECISION)
    z = tl.where(known, z, tl.where(target < 0, 0.0, float("nan")))
    tl.store(anchor + rows, z, mask=rows < tokens)


def anchors(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """The logit (t,) of each target in bits, fp32; 0 where ignored, NaN for a target outside."""
    result = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    anchor_kernel[(triton.cdiv(hidden.shape[0], _BLOCK_T),)](
        **operands(head, hidden),
        targets=targets,
        anchor=result,
        BLOCK_T=_BLOCK_T,
        BLOCK_H=256,
    )
    return result
