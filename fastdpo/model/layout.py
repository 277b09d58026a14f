"""Which row layout is exact for a model: prompts shared, rows packed, or padded batches.

Sharing a prompt is exact where attention is the only thing that mixes tokens, and where it goes
through our attention function. Neither can be told from a configuration alone, so the layout is
selected by what is known (layer types, rotary scaling, dropout) and then proved at start-up: a few
random prompts and responses, once in the candidate layout and once as separate sequences through
the model's stock attention. What fails falls back to a layout that gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from .attention import NAME, register
from .dropout import rates
from .exactness import ExactnessCheck
from .head import base_causal_lm

MIXES_ONLY_BY_ATTENTION = {"full_attention", "sliding_attention"}
"""Values of `layer_types` that a packed row can honour."""

LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""Rotary embeddings that change with the longest position of a batch."""


@dataclass(frozen=True)
class Layout:
    """How tokens are laid out for a model, exact for it."""

    name: str
    """"shared" (a prompt once for all its responses), "packed" (each response with its own copy of
    the prompt) or "padded" (a batch of sequences with an attention mask).
    """
    reason: str
    """One line for the start-up log: why this one, and why not a faster one."""
    one_by_one: bool = False
    """Whether padded sequences go through the model each by itself."""


def choose_layout(
    model: nn.Module,
    *,
    share_prefix: bool = True,
    max_length: int | None = None,
    attention_backend: str | None = None,
) -> Layout:
    """The fastest layout that is exact for `model`, which may be a PeftModel.

    Sets the model's attention implementation: "fastdpo" for shared and packed rows, its own for
    padded batches. Weights, gradients, modes and random number generators stay as they were. Call
    it under the autocast that training uses. `max_length` is the longest sequence that will be
    seen, if it is known: below the length at which a rotary embedding starts to change, that
    embedding is no obstacle. `attention_backend` is one of `model.backends`, None for the fastest.
    """
    register(attention_backend)
    base = base_causal_lm(model)
    stock = _stock_attention(base)
    base.set_attn_implementation(stock)
    config = base.config.get_text_config()
    if rope := length_dependent_rope(config, max_length):
        return Layout(
            "padded",
            f"padded, one sequence a forward: rope_type {rope} depends on the length",
            True,
        )
    check = ExactnessCheck(model, stock)
    objections: dict[str, list[str]] = {}
    dropout = any(rates(module) for module in model.modules())
    for name, obstacle in _candidates(config, share_prefix, dropout):
        obstacle = obstacle or check.failure(name)
        if obstacle is None:
            base.set_attn_implementation(stock if name == "padded" else NAME)
            return Layout(name, _reason(f"{name}: {check.verdict}", objections))
        objections.setdefault(obstacle, []).append(name)
    return Layout("padded", _reason("padded, one sequence a forward", objections), True)


def expected_layout(config: TrainConfig, model_config: Any) -> str:
    """The name of the layout that `choose_layout` is expected to take, from configurations alone.

    It may still fall back: what only the proof finds out is not known here.
    """
    text = model_config.get_text_config()
    if config.attn_implementation or length_dependent_rope(text, config.max_length):
        return "padded"
    dropout = config.use_peft and config.lora_dropout > 0
    candidates = _candidates(text, config.share_prefix, dropout)
    return next(name for name, obstacle in candidates if obstacle is None)


def _reason(verdict: str, objections: dict[str, list[str]]) -> str:
    against = [f"not {' or '.join(names)}: {why}" for why, names in objections.items()]
    return "; ".join([verdict, *against])


def _candidates(config: Any, share_prefix: bool, dropout: bool) -> Iterator[tuple[str, str | None]]:
    """Layouts from fast to slow, with what the configuration already says against each."""
    kinds = set(getattr(config, "layer_types", None) or ()) - MIXES_ONLY_BY_ATTENTION
    mixing = f"layers of type {', '.join(sorted(kinds))}" if kinds else None
    sharing = None if share_prefix else "share_prefix is off"
    if sharing is None and dropout:
        sharing = "dropout is on, and one prompt would be dropped alike for all its responses"
    yield "shared", mixing or sharing
    yield "packed", mixing
    yield "padded", None


@contextmanager
def ordinary(model: nn.Module) -> Iterator[None]:
    """A model that takes ordinary batches, in the middle of training, which goes on as if nothing
    had been computed: with its attention, its modes and the random states.
    """
    base = base_causal_lm(model)
    attention = base.config._attn_implementation
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    restore_attention(model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        base.set_attn_implementation(attention)
        for module, mode in modes:
            module.training = mode


def restore_attention(model: nn.Module) -> None:
    """Let a model, which may be a PeftModel, take ordinary batches again."""
    base = base_causal_lm(model)
    base.set_attn_implementation(_stock_attention(base))


def _stock_attention(base: Any) -> str:
    """The model's own attention, to compare with and to fall back to."""
    current = base.config._attn_implementation
    if current == NAME:
        current = base.get_correct_attn_implementation(None)
    # transformers' sdpa silently leaves out the soft cap that gemma 2 was trained with.
    capped = getattr(base.config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped and current == "sdpa" else current


def length_dependent_rope(config: Any, max_length: int | None) -> str | None:
    """The rope_type that makes a sequence's numbers depend on its neighbours' lengths, if any."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    for rope in _rope_dictionaries(parameters):
        kind = rope.get("rope_type") or rope.get("type")
        if kind not in LENGTH_DEPENDENT_ROPE:
            continue
        constant_up_to = config.max_position_embeddings
        if kind == "longrope":
            constant_up_to = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", 0
            )
        if max_length is None or max_length > constant_up_to:
            return kind
    return None


def beyond_positions(model_config: Any, length: int, what: str = "max_length") -> str | None:
    """One line where `what`, sequences of `length` tokens, goes beyond the model's positions.

    A rotary scaling that the configuration names (yarn, linear, llama3, …) stretches them by its
    factor; positions themselves are left as the model says.
    """
    config = model_config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    for rope in _rope_dictionaries(parameters):
        before = rope.get("original_max_position_embeddings")
        if before and rope.get("factor"):
            positions = max(positions, int(before * rope["factor"]))
    if length <= positions:
        return None
    return (
        f"{what} {length} is above the model's max_position_embeddings {positions}: it never saw "
        "the positions beyond"
    )


def _rope_dictionaries(parameters: Any) -> Iterator[dict[str, Any]]:
    """The rotary parameters themselves, or those of each layer type."""
    if isinstance(parameters, dict):
        yield parameters
        for value in parameters.values():
            yield from _rope_dictionaries(value)
