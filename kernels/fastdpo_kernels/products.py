"""Matrix products accumulated in fp32 (fp64 for fp64), whatever the operands are.

`operands` is the dtype that the head computes in: what the two factors hold values of, or may be
rounded to, even where they are stored in a wider one.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_BF16_ADVANTAGE = 1.5
"""The host multiplies in bf16 where that is so much faster in the probe: far from what a host
without matrix units gets and from what one with them does, so that every run decides alike."""
_gives: dict[tuple[torch.device, torch.dtype], bool] = {}


def mm(
    a: Tensor, b: Tensor, dtype: torch.dtype, *, operands: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """a @ b as `dtype`, rounded once; `out` is of that dtype."""
    a, b = _factors(a, b, operands)
    with _host_precision(a, operands):
        if a.dtype in (dtype, torch.float32, torch.float64):
            product = torch.mm(a, b, out=out)
        else:
            product = torch.mm(a, b, out_dtype=torch.float32, out=out)
    return product.to(dtype)


def addmm_(total: Tensor, a: Tensor, b: Tensor, *, operands: torch.dtype) -> Tensor:
    """total += a @ b, total in fp32 or fp64."""
    a, b = _factors(a, b, operands)
    if a.dtype != total.dtype:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    with _host_precision(a, operands):
        return total.addmm_(a, b)


def _factors(a: Tensor, b: Tensor, operands: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in bf16 or fp16 on a GPU that gives their product in fp32; both in fp32 or fp64
    elsewhere.
    """
    if a.is_cuda and operands == torch.bfloat16 and _gives_fp32(a, operands):
        return a.to(operands), b.to(operands)
    if a.is_cuda and a.dtype == b.dtype == torch.float16 and _gives_fp32(a, a.dtype):
        return a, b
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide), b.to(wide)


def widens(device: str, operands: torch.dtype) -> bool:
    """Whether a kind of GPU, where there is one, gets factors of dtype `operands` that are copied
    to fp32 for every product.
    """
    there = device == "cuda" and torch.cuda.is_available()
    return there and not _gives_fp32(torch.empty(0, device=device), operands)


def _gives_fp32(like: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device of `like` multiplies factors in `dtype` into fp32, tried once: which
    builds for ROCm do is not written down anywhere, and a rounded product is never taken.
    """
    key = like.device, dtype
    if key not in _gives:
        factor, total = like.new_ones(16, 16, dtype=dtype), like.new_ones(16, 16).float()
        try:
            torch.mm(factor, factor, out_dtype=torch.float32, out=total)
            torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
            _gives[key] = True
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError):
            _gives[key] = False
    return _gives[key]


@contextmanager
def _host_precision(a: Tensor, operands: torch.dtype) -> Iterator[None]:
    """Let a host with bf16 matrix units use them on fp32 factors that hold bf16 values."""
    if operands != torch.bfloat16 or a.device.type != "cpu" or not bf16_is_faster():
        yield
        return
    backend = _matmul_backend()
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def _matmul_backend() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@cache
def bf16_is_faster() -> bool:
    """Whether a CPU multiplies in bf16 faster than in fp32, measured once a process."""
    backend = _matmul_backend()
    before = backend.fp32_precision
    a, b = torch.ones(128, 1024), torch.ones(1024, 1024)
    best = {}
    try:
        for precision in ("ieee", "bf16"):
            backend.fp32_precision = precision
            best[precision] = min(_seconds(a, b) for _ in range(4))
    finally:
        backend.fp32_precision = before
    return best["ieee"] > _BF16_ADVANTAGE * best["bf16"]


def _seconds(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - start
