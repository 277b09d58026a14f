"""Which device, attention and head a run takes, and what it keeps: one answer for a run and for
`doctor`.
"""

from typing import Any

import torch
from fastdpo_kernels.backends import explain_backend
from fastdpo_kernels.head import workspace_of

from ..config import TrainConfig
from .backends import choose_backend
from .precision import choose_precision


def run_device(config: TrainConfig) -> torch.device:
    """The GPU where there is one, unless `use_cpu` is set."""
    return torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")


def attention_path(config: TrainConfig, model_config: Any = None, sinks: bool = False) -> str:
    """The attention of packed rows as "name: reason"; without a model, for an ordinary one.

    `sinks`: the layers have attention sinks, which a configuration does not say.
    """
    if config.attn_implementation:
        return f"{config.attn_implementation}: attn_implementation asks for it"
    device = run_device(config)
    weights = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    dtype = choose_precision(config.bf16, device)[0] or weights
    layers: dict[str, Any] = {"wanted": config.attention_backend, "sinks": sinks}
    if model_config is not None:
        text = model_config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        softcap = bool(getattr(text, "attn_logit_softcapping", None))
        layers |= {"head_dim": head_dim, "softcap": softcap}
    backend = choose_backend(device, dtype, **layers)
    return f"{backend.name}: {backend.reason}"


def head_path(config: TrainConfig) -> str:
    """What computes log-probabilities and their gradient, as "name: reason"."""
    head = explain_backend("auto", run_device(config))
    if head.name == "triton":
        return f"triton: {head.reason}"
    workspace = workspace_of(config.head_workspace_mib, run_device(config))
    pieces = f"in pieces of at most {workspace} MiB, no full logits"
    return f"torch: {pieces} ({head.reason})"


def activations_path(config: TrainConfig) -> str:
    """What is recomputed in the backward, and where it is recomputed from."""
    if config.gradient_checkpointing:
        every = config.gradient_checkpointing_every
        layers = "every layer" if every == 1 else f"one layer in {every}"
        where = "in memory"
        if config.activation_offloading:
            gpu = run_device(config).type == "cuda"
            where = "in the host's memory" if gpu else "in a file in output_dir"
        text = f"{layers} recomputed, inputs kept {where}"
    else:
        text = "all kept, gradient_checkpointing is false"
    tokens = config.layer_tile_tokens
    return text if tokens is None else f"{text}; MLPs and norms in tiles of {tokens} tokens"
