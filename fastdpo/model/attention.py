"""Attention over packed rows that share prompts: transformers' attention implementation "fastdpo".

`register()` makes the name known; `model.set_attn_implementation("fastdpo")` selects it; the row's
`Segments` travel as the extra keyword `fastdpo_segments=` of the model's forward, also into the
recomputation of gradient checkpointing; where its tokens are spread over devices, so does their
`ContextGroup`, as `fastdpo_context=`. The name is deliberately unknown to transformers' mask
interface: no mask is ever built, so attention costs no memory in S².

The kernels are in `backends`. With a prompt of P tokens and N responses the gathered keys and
values hold P once per response; queries, and everything else in the layer, are never repeated.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface

from ..data.segments import Segments
from ..errors import ModelError
from .backends import Call, activate, by_segments, choose_backend, flash_attn, varlen
from .context import ContextGroup
from .context_attention import spread
from .flex import flex

_KERNELS = {"sdpa": by_segments, "flex": flex, "flash_attn": flash_attn}
"""By backend; all others are torch's varlen attention, with one kernel or another."""

NAME = "fastdpo"
"""The name under which transformers knows this attention."""


def register(backend: str | None = None) -> None:
    """Make `attn_implementation="fastdpo"` known to transformers (any number of times).

    `backend` is one of `backends` to use for every model from now on, None for the fastest that a
    layer allows. Raises ModelError where it is not installed.
    """
    activate(backend)
    AttentionInterface.register(NAME, partial(attention, backend=backend) if backend else attention)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    fastdpo_segments: Segments | None = None,
    fastdpo_context: ContextGroup | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed row, called by the model's layers.

    query (1, Hq, S, D), key and value (1, Hkv, S, D) and (1, Hkv, S, Dv), Hq a multiple of Hkv;
    s_aux (Hq,) are sink logits. Query q sees key k of its segment when `0 <= q - k <
    sliding_window`; scores are `softcap · tanh(q·k · scaling / softcap)`. Returns the output (1,
    S, Hq, Dv) in the query's dtype, and None for the weights. With a context all these are this
    rank's S / N tokens, and the segments those of the whole row. Raises ModelError for what a
    packed row cannot honour: no segments, a mask, dropout, a position bias, a batch.
    """
    ranks = 1 if fastdpo_context is None else fastdpo_context.size
    segments = _checked(query, ranks, attention_mask, dropout, fastdpo_segments, module, kwargs)
    if segments.trace is not None:
        segments.trace.append({"module": module, "sliding_window": sliding_window})
    segments = segments.to(query.device)
    if torch.is_autocast_enabled(query.device.type):
        # Norms of queries and keys in fp32 would otherwise keep the flash kernels out.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    selected = choose_backend(
        query.device,
        query.dtype,
        head_dim=max(query.shape[-1], value.shape[-1]),
        softcap=bool(softcap),
        sinks=s_aux is not None,
        wanted=backend,
    )
    call = Call(query, key, value, segments, scale, sliding_window, softcap, s_aux)
    kernel = _KERNELS.get(selected.name, varlen)
    return kernel(call) if fastdpo_context is None else spread(call, kernel, fastdpo_context), None


def _checked(
    query: torch.Tensor,
    ranks: int,
    attention_mask: torch.Tensor | None,
    dropout: float,
    segments: Segments | None,
    module: torch.nn.Module,
    kwargs: dict[str, Any],
) -> Segments:
    name = type(module).__name__
    if segments is None:
        raise ModelError(
            f"{name}: the attention function was called without fastdpo_segments (the architecture "
            "drops keyword arguments, or the caller passed none)"
        )
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        what = "an attention mask" if attention_mask is not None else "a position bias"
        raise ModelError(f"{name}: expected packed rows without {what} of the architecture's own")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{name}: expected causal attention")
    if dropout:
        raise ModelError(f"{name}: expected attention dropout 0 in packed rows, got {dropout}")
    if query.shape[0] != 1 or query.shape[2] * ranks != segments.length:
        raise ModelError(
            f"{name}: expected one row of {segments.length} tokens over {ranks} device(s), "
            f"got {query.shape[0]} of {query.shape[2]} on this one"
        )
    return segments
