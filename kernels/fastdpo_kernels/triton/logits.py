"""What every kernel of the head begins with: one block of logits, in registers.

    z = cap·tanh(scale·(x·Wᵀ + b)/cap) / temperature

in bits: times log2(e), so that exp(z) of a logit in nats is one exp2 and no product. What leaves a
kernel is in nats where its docstring does not say otherwise.

Operands are read through tensor memory descriptors (TMA) or through pointers, multiplied on the
tensor cores, summed in fp32. Nothing outside these functions knows how a logit is made.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from ..head import Head, transposed
from .configs import Config

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def logits_block(
    x,
    w,
    bias,
    row,
    col,
    tokens,
    vocab,
    width,
    stride_x,
    stride_w,
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
    """Logits (BLOCK_T, BLOCK_V) from `row` and `col` on, fp32, in bits.

    Rows and columns beyond the end hold finite values of no meaning; with DESCRIPTORS the columns
    hold 0.
    """
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    cols = col + tl.arange(0, BLOCK_V)
    if DESCRIPTORS:
        for h in range(0, width, BLOCK_H):
            a = x.load([row, h])
            b = w.load([col, h])
            acc = _dot(a, b.T, acc, PRECISION)
    else:
        rows = tl.minimum(row + tl.arange(0, BLOCK_T), tokens - 1).to(tl.int64)
        inside = tl.minimum(cols, vocab - 1).to(tl.int64)
        h = tl.arange(0, BLOCK_H)
        x_block = x + rows[:, None] * stride_x + h[None, :]
        if TRANSPOSED:
            w_block = w + inside[None, :] + h.to(tl.int64)[:, None] * stride_w
        else:
            w_block = w + inside[None, :] * stride_w + h[:, None]
        for start in range(0, width, BLOCK_H):
            if WHOLE_H:
                a = tl.load(x_block)
                b = tl.load(w_block)
            else:
                a = tl.load(x_block, mask=(h < width - start)[None, :], other=0.0)
                b = tl.load(w_block, mask=(h < width - start)[:, None], other=0.0)
            acc = _dot(a, b, acc, PRECISION)
            x_block += BLOCK_H
            w_block += BLOCK_H * stride_w if TRANSPOSED else BLOCK_H
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < vocab, other=0.0).to(tl.float32)[None, :]
    return transform(acc, scale, softcap, inv_temperature, HAS_SOFTCAP, PRECISION)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "interpreter":  # which multiplies the bits of a bf16 number as an integer
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def exp2(x, PRECISION: tl.constexpr):
    """2^x, 0 below 2^−126: the instruction alone, where `tl.exp2` adds a path for subnormals."""
    if PRECISION == "interpreter":
        return tl.exp2(x)
    else:
        return libdevice.exp2(x)


@triton.jit
def transform(
    raw, scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):
    """Logits in bits from x·Wᵀ + b; `inv_temperature` has the factor log2(e)."""
    if HAS_SOFTCAP:
        # tanh(u) = 1 − 2/(exp(2u) + 1), without an overflow on either side.
        e = exp2(raw * (2.0 * LOG2E * scale / softcap), PRECISION)
        cap = softcap * inv_temperature
        if PRECISION == "interpreter":
            z = cap - (2.0 * cap) / (e + 1.0)
        else:
            z = cap - libdevice.fast_dividef(2.0 * cap, e + 1.0)
    else:
        z = raw * (scale * inv_temperature)
    return z


@triton.jit
def sum_of_logits(z, inside, DESCRIPTORS: tl.constexpr):
    """Σ of a block's logits over the columns `inside` the vocabulary, in bits.

    The copy engine reads zeros outside, whose logits are 0; a mask would cost registers.
    """
    if DESCRIPTORS:
        return tl.sum(z, 1)
    else:
        return tl.sum(tl.where(inside[None, :], z, 0.0), 1)


@triton.jit
def softcap_slope(z, softcap, inv_temperature):
    """1 − tanh² of the soft cap, from the logit that came out."""
    t = z * (1.0 / (softcap * inv_temperature))
    return 1.0 - t * t


@triton.jit
def block_position(program, row_blocks, col_blocks, GROUP: tl.constexpr):
    """(row block, column block) of a program: GROUP row blocks walk over the columns together.

    They read a block of the weight at the same time, so that it comes from memory once.
    """
    group_size = GROUP * col_blocks
    first = (program // group_size) * GROUP
    rows = tl.minimum(row_blocks - first, GROUP)
    within = program % group_size
    return first + within % rows, within // rows


@triton.jit
def log1p(s):
    """log(1 + s) for s ≥ 0, exact to rounding however small s is."""
    u = 1.0 + s
    return tl.where(u == 1.0, s, tl.log(u) * (s / tl.where(u == 1.0, 1.0, u - 1.0)))


def operands(head: Head, hidden: Tensor) -> dict[str, Any]:
    """The head and hidden (t, H) as arguments of a kernel that reads them through pointers.

    `hidden` and `head.weight` have one dtype (bf16, fp16 or fp32); rows of `hidden` are contiguous,
    and either the rows or the columns of the weight, whose pitch is `stride_w`.
    """
    weight, bias, columns = head.weight, head.bias, transposed(head.weight)
    return {
        "x": hidden,
        "w": weight,
        "bias": weight if bias is None else bias,
        "tokens": hidden.shape[0],
        "vocab": weight.shape[0],
        "width": hidden.shape[1],
        "stride_x": hidden.stride(0),
        "stride_w": weight.stride(1 if columns else 0),
        "scale": float(head.logit_scale),
        "softcap": float(head.softcap or 1.0),
        "inv_temperature": LOG2E.value / head.temperature,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "TRANSPOSED": columns,
        "PRECISION": _precision(hidden),
    }


def prepare(head: Head, hidden: Tensor, config: Config) -> dict[str, Any]:
    """The arguments of a kernel that computes the logits of hidden (t, H), `operands` included."""
    arguments = operands(head, hidden) | {
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_H": config.block_h,
        "WHOLE_H": hidden.shape[1] % config.block_h == 0,
        "DESCRIPTORS": config.descriptors,
        **config.launch,
    }
    if config.descriptors:
        blocks = {"x": config.block_t, "w": config.block_v}
        for name, rows in blocks.items():
            block = [rows, config.block_h]
            arguments[name] = TensorDescriptor.from_tensor(arguments[name], block)
    return arguments


def _precision(hidden: Tensor) -> str:
    """fp32 operands are split in three tf32 products, exact to fp32, unless tf32 is allowed.

    AMD's matrix cores multiply fp32 as it is.
    """
    if hidden.device.type != "cuda":
        return "interpreter"
    if hidden.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
