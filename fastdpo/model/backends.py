"""The ways to compute attention over a packed row, and which one to take.

  varlen        torch.nn.attention.varlen on CUDA in fp16/bf16: one call for the whole row;
  flash_attn    flash_attn_varlen_func where that package is installed: the same, with a soft cap;
  flash_attn_3  varlen with the kernels of flash-attention 3 (Hopper) or 4 (Hopper, Blackwell),
  flash_attn_4  where they are installed; only if asked for;
  flex          FlexAttention, compiled: soft caps and sinks without flash-attn;
  sdpa          scaled_dot_product_attention segment by segment, any device and dtype; with a soft
                cap or sinks an explicit softmax, which costs queries × keys × heads per segment.

Each takes a `Call` and returns (1, S, Hq, Dv).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..data.segments import Segments, gather_keys
from ..errors import ModelError

MAX_FLASH_HEAD_DIM = 256
"""The largest head dimension of the flash kernels (flash-attention 2), and of FlexAttention's."""

ONLY_IF_ASKED = {"flash_attn_3": "FA3", "flash_attn_4": "FA4"}
"""Kernels that torch can put in place of its flash-attention 2, by torch's name for them."""


@dataclass(frozen=True)
class Call:
    """What a layer asks of its attention, in one packed row."""

    query: torch.Tensor
    """(1, Hq, S, D), Hq a multiple of Hkv."""
    key: torch.Tensor
    """(1, Hkv, S, D)."""
    value: torch.Tensor
    """(1, Hkv, S, Dv)."""
    segments: Segments
    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    """(Hq,): their logits."""


class Backend(NamedTuple):
    """Which kernel computes attention, and why."""

    name: str
    """One of the names above."""
    reason: str
    """Half a line for the start-up log and `fastdpo doctor`."""


@lru_cache(maxsize=64)
def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int = 64,
    softcap: bool = False,
    sinks: bool = False,
    wanted: str | None = None,
) -> Backend:
    """The fastest exact backend for a device, a dtype and what the layer asks for, or the `wanted`
    one. Raises ModelError where that cannot be had.
    """
    obstacle = _obstacle(device, dtype, head_dim)
    special = "attention sinks" if sinks else "soft cap" if softcap else None
    if wanted is not None and wanted != "sdpa":
        obstacle = obstacle or _lacks(wanted, special)
        if obstacle is not None:
            raise ModelError(f"attention_backend: {wanted} cannot be used: {obstacle}")
    if wanted is not None:
        return Backend(wanted, "attention_backend asks for it")
    if obstacle is not None:
        return Backend("sdpa", f"segment by segment: {obstacle}")
    if special is None:
        return Backend("varlen", "torch.nn.attention.varlen: one call a row")
    without = _lacks("flash_attn", special)
    if without is None:
        return Backend("flash_attn", f"flash_attn_varlen_func: {special}")
    return Backend("flex", f"FlexAttention, compiled: {special}, and {without}")


def _obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps every kernel for whole rows out."""
    if device.type != "cuda":
        return f"{device.type} has no varlen kernel"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash kernels are fp16/bf16, this is {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash kernels need compute capability 8.0"
    if head_dim > MAX_FLASH_HEAD_DIM:
        return f"flash kernels end at head size 256 < {head_dim}"
    return None


def _lacks(name: str, special: str | None) -> str | None:
    """Why this backend cannot compute what the layer asks for."""
    if name == "flex":
        return None
    if name == "flash_attn":
        if special == "attention sinks":
            return "flash-attn has no attention sinks"
        missing = importlib.util.find_spec("flash_attn") is None
        return "flash-attn is not installed" if missing else None
    return f"torch's varlen attention has no {special}" if special else None


_activated: set[str] = set()
"""Which of them is in place, as far as it was put there by `activate`."""


def activate(name: str | None) -> None:
    """Put flash-attention 3 or 4 in place of torch's own kernels; any other name puts those back.

    Raises ModelError where the package is not installed.
    """
    if name in _activated or (name not in ONLY_IF_ASKED and not _activated):
        return
    try:
        from torch.nn import attention

        if _activated:
            _activated.clear()
            attention.restore_flash_attention_impl()
        if name in ONLY_IF_ASKED:
            attention.activate_flash_attention_impl(ONLY_IF_ASKED[name])
            _activated.add(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"attention_backend: {name} is not installed ({error})") from error


def by_segments(call: Call) -> torch.Tensor:
    """SDPA, or an explicit softmax, one segment at a time."""
    segments, window = call.segments, call.sliding_window
    key, value = (_gathered(x, segments).transpose(0, 1)[None] for x in (call.key, call.value))
    pieces = zip(
        call.query.split(segments.query_lengths, dim=2),
        key.split(segments.key_lengths, dim=2),
        value.split(segments.key_lengths, dim=2),
        strict=True,
    )
    explicit = bool(call.softcap) or call.sinks is not None
    outputs = []
    for q, k, v in pieces:
        n, m = q.shape[2], k.shape[2]
        narrow = window if window is not None and window < m else None
        if explicit:
            out = _explicit(q, k, v, segments.causal_mask(n, m, narrow, q.device), call)
        else:
            plain = n == m and narrow is None
            mask = None if plain else segments.causal_mask(n, m, narrow, q.device)
            out = _sdpa(q, k, v, mask, call.scale)
        outputs.append(out.transpose(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _gathered(x: torch.Tensor, segments: Segments) -> torch.Tensor:
    """(1, H, S, D) → (T, H, D), prefixes repeated."""
    return gather_keys(x[0].transpose(0, 1), segments)


def reads_grouped_heads(device: torch.device) -> bool:
    """Whether SDPA has a fused kernel for fewer key than query heads, masks and fp32 included.

    The CPU's flash kernel does; CUDA's memory-efficient one does not, and the math path that
    would be taken instead needs queries × keys of memory.
    """
    return device.type == "cpu"


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and not reads_grouped_heads(q.device):
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        grouped = False
    v_dim = v.shape[-1]
    if v_dim < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - v_dim))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out[..., :v_dim]


def _explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, call: Call
) -> torch.Tensor:
    """One segment with a soft cap or sinks, unknown to SDPA's kernels; softmax in fp32 at least."""
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    scores = (q.unflatten(1, (heads, groups)) @ k.unsqueeze(2).transpose(-1, -2)) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~mask, float("-inf"))
    if call.sinks is not None:
        column = call.sinks.to(scores.dtype).view(1, heads, groups, 1, 1)
        scores = torch.cat([scores, column.expand(-1, -1, -1, q.shape[2], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]].to(v.dtype)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def varlen(call: Call) -> torch.Tensor:
    """torch's own varlen attention, without soft cap and sinks (see `choose_backend`)."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {}
    if call.query.shape[1] != call.key.shape[1] and _takes_enable_gqa(varlen_attn):
        grouped = {"enable_gqa": True}
    return _flash(call, varlen_attn, scale=call.scale, **grouped)


@lru_cache(maxsize=2)
def _takes_enable_gqa(kernel: Callable[..., Any]) -> bool:
    """torch 2.11 takes grouped heads as they are; later versions raise unless told so."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def flash_attn(call: Call) -> torch.Tensor:
    """The flash-attn package's varlen attention, without sinks (see `choose_backend`)."""
    from flash_attn import flash_attn_varlen_func

    return _flash(
        call,
        flash_attn_varlen_func,
        softmax_scale=call.scale,
        causal=True,
        softcap=call.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _flash(call: Call, kernel: Callable[..., Any], **options: Any) -> torch.Tensor:
    """One call of a flash kernel, which wants one head size for all, a multiple of 8."""
    segments, window = call.segments, (-1, 0)  # keys to the left and right, -1 for no limit
    if call.sliding_window is not None and call.sliding_window < segments.max_seqlen_k:
        window = (call.sliding_window - 1, 0)  # a query's own token counts as one
    size = max(call.query.shape[-1], call.value.shape[-1])
    size += -size % 8
    q, k, v = (
        F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x
        for x in (call.query, call.key, call.value)
    )
    out = kernel(
        q[0].transpose(0, 1),
        _gathered(k, segments),
        _gathered(v, segments),
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_seqlen_q,
        segments.max_seqlen_k,
        window_size=window,
        **options,
    )
    return out[None, ..., : call.value.shape[-1]]
