"""The output head of any causal language model, as the matrix and scalars of a fused head.

`logits = softcap(logit_scale · (hidden @ weight.T + bias))`, with hidden the decoder's last hidden
state. Architectures differ in the names and in where the scale is kept; `find_head` reads them and
`check_head` compares the result with the model's own logits once, so that an unknown rule is an
error and never a wrong loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..data.segments import Segments
from ..errors import ModelError
from .attention import NAME
from .frozen import compare, compute_dtype, frozen_state, probe_tokens

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Configuration fields that multiply the logits (cohere, falcon_h1, muse_glimmer)."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Configuration fields of a final soft cap (gemma and nanochat, recurrent_gemma, xlstm)."""


@dataclass(frozen=True)
class Head:
    """Where a model's logits come from. Weight and bias are read anew: sharding replaces them."""

    module: nn.Module
    """The output embedding: a Linear, or peft's wrapper around one."""
    logit_scale: float
    """Multiplies the logits, bias included."""
    softcap: float | None
    """`softcap · tanh(logits / softcap)` after scaling; None for no cap."""

    @property
    def weight(self) -> nn.Parameter:
        """(V, H): the stored weight; under LoRA the base's, under modules_to_save the copy's."""
        return _linear(self.module).weight

    @property
    def bias(self) -> torch.Tensor | None:
        """(V,) or None."""
        return getattr(_linear(self.module), "bias", None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., H) → logits (..., V) in full, in the weight's dtype: for checks only."""
        weight, bias = effective_weight(self), self.bias
        bias = None if bias is None else bias.to(weight.dtype)
        scores = F.linear(hidden.to(weight.dtype), weight, bias) * self.logit_scale
        if self.softcap is None:
            return scores
        return self.softcap * torch.tanh(scores / self.softcap)


def base_causal_lm(model: nn.Module) -> Any:
    """The transformers model itself, out of peft's wrapper.

    Raises ModelError for adapters that live in the wrapper's forward (prompt and prefix tuning).
    """
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    if any(getattr(config, "is_prompt_learning", False) for config in adapters.values()):
        raise ModelError("adapter: expected LoRA or another one inside layers, got prompt learning")
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def find_head(model: nn.Module) -> Head:
    """The head of a causal language model or of a PeftModel around one.

    Raises ModelError where there is none, or where it is not one matrix that fits a fused head:
    quantised, or adapted by something else than LoRA, DoRA or modules_to_save.
    """
    base = base_causal_lm(model)
    name = type(base).__name__
    config = base.config.get_text_config()
    if getattr(base.config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: expected a decoder-only language model, got an encoder-decoder")
    module = base.get_output_embeddings()
    if module is None:
        raise ModelError(f"{name}: expected a language model with an output embedding, found none")
    head = Head(module, _logit_scale(config), _softcap(config))
    if not head.weight.is_floating_point() or head.weight.dim() != 2:
        raise ModelError(f"{name}: expected an unquantised head of shape (vocabulary, hidden)")
    _check_adapter(module)
    return head


def _logit_scale(config: Any) -> float:
    scale = 1.0
    for field in MULTIPLIERS:
        value = getattr(config, field, None)
        scale *= value if isinstance(value, int | float) else 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # The one architecture that multiplies by the field that granite and others divide by.
    return scale * scaling if config.model_type == "hyperclovax" else scale / scaling


def _softcap(config: Any) -> float | None:
    return next((float(cap) for field in SOFTCAPS if (cap := getattr(config, field, None))), None)


def hidden_states(model: nn.Module, **inputs: Any) -> torch.Tensor:
    """The decoder's last hidden state (B, S, H), what the head is applied to.

    `inputs` are those of the model's forward (input_ids (B, S), …); no cache is kept.
    """
    outputs = _decoder(base_causal_lm(model))(**inputs, use_cache=False)
    return outputs.last_hidden_state if hasattr(outputs, "last_hidden_state") else outputs[0]


def _decoder(base: Any) -> nn.Module:
    composite = base.config.get_text_config() is not base.config
    decoder = base.get_decoder() if base.base_model is base or composite else base.base_model
    if decoder is not base:
        return decoder
    # llama4's text model names neither; its decoder is the one transformers model it holds.
    return next(child for child in base.children() if isinstance(child, PreTrainedModel))


def check_causal(model: nn.Module) -> None:
    """Raise ModelError if a token changes the hidden states before it, as in an encoder."""
    tokens = probe_tokens(model, 9)
    pair = torch.stack([tokens[:8], torch.cat([tokens[:7], tokens[8:]])])
    with frozen_state(model):
        one, other = hidden_states(model, input_ids=pair)[:, :7].double()
    eps = torch.finfo(compute_dtype(model, next(model.parameters()).dtype)).eps
    if (one - other).abs().max().item() > 64 * eps * one.abs().max().item():
        raise ModelError(
            f"{type(base_causal_lm(model)).__name__}: expected a causal language model, and here a "
            "token changes the hidden states before it, as in an encoder"
        )


def check_head(model: nn.Module, head: Head) -> None:
    """Compare `head` with the model's own logits on a few tokens, once per model.

    Raises ModelError if they differ beyond rounding.
    """
    base = base_causal_lm(model)
    tokens = probe_tokens(base, 8)[None]
    inputs: dict[str, Any] = {"input_ids": tokens}
    if base.config._attn_implementation == NAME:
        inputs["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None]
        inputs["fastdpo_segments"] = Segments.build([(0, tokens.shape[1], 0, 0)], tokens.device)
    with frozen_state(model):
        ours = head.logits(hidden_states(model, **inputs))
        theirs = model(**inputs, use_cache=False).logits.to(ours.device)
    if not theirs.isfinite().all():
        raise ModelError(
            f"{model.name_or_path or type(base).__name__}: its logits are not finite; a weight is "
            "infinite or not a number"
        )
    dtypes = (compute_dtype(model, head.weight.dtype), theirs.dtype)
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    difference, tolerance = compare(ours, theirs, dtype)
    if not difference <= tolerance:
        raise ModelError(
            f"{type(base).__name__}: its logits are not weight · hidden with the known scales and "
            f"caps (largest difference {difference:.2g}, expected at most {tolerance:.2g} in "
            f"{dtype}); a fused head cannot be used"
        )


def effective_weight(head: Head) -> torch.Tensor:
    """(V, H): the matrix that the head multiplies by, with its adapters as they are switched now.

    Without an adapter the parameter itself. With LoRA `W' = W + s·B·A`; with DoRA `m · W' / ‖W'‖`
    row by row, the norm taken as a constant (DoRA, section 4.3); differentiable. The dtype is the
    wider one of base and adapter: peft adds the adapter's output in that type, and a low-rank
    update rounded to the base's bf16 would mostly vanish.
    """
    module: Any = head.module
    weight = head.weight
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return weight
    _check_adapter(module)
    active = _active(module)
    updated: torch.Tensor = weight
    for name in active:
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        updated = updated + module.scaling[name] * (b @ a)
    if not any(name in module.lora_variant for name in active):
        return updated
    magnitude = module.lora_magnitude_vector[active[0]].weight
    return (magnitude / updated.detach().norm(dim=1))[:, None] * updated


def _check_adapter(module: Any) -> None:
    """Raise ModelError for an adapter on the head that is not one matrix."""
    lora = hasattr(module, "lora_A") and isinstance(module.get_base_layer(), nn.Linear)
    wrapped = hasattr(module, "base_layer") or hasattr(module, "original_module")
    if wrapped and not lora and not hasattr(module, "modules_to_save"):
        kind = type(module).__name__
        raise ModelError(f"head: expected LoRA, DoRA or modules_to_save, got peft's {kind}")
    if not lora:
        return
    active = _active(module)
    for name in active:
        variant = module.lora_variant.get(name)
        if variant is not None and (not module.use_dora[name] or len(active) > 1):
            kind = type(variant).__name__
            raise ModelError(f"head: expected LoRA, or DoRA as the only adapter, got {kind}")
        if getattr(module.lora_dropout[name], "p", 0.0) > 0:
            raise ModelError(
                "lora_dropout: expected 0 when the head is a LoRA target, since a fused head has "
                "one weight for all tokens; leave the head out of lora_target_modules"
            )
        if module.lora_B[name].bias is not None:
            raise ModelError("lora_bias: expected false when the head is a LoRA target")


def _active(module: Any) -> list[str]:
    """The LoRA adapters of a module that are in use."""
    return [name for name in module.active_adapters if name in module.lora_A]


def _linear(module: Any) -> Any:
    """The module that holds the stored weight, out of peft's wrappers."""
    if hasattr(module, "modules_to_save"):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        if module.disable_adapters or not active:
            return module.original_module
        return module.modules_to_save[active[0]]
    return module.get_base_layer() if hasattr(module, "base_layer") else module
