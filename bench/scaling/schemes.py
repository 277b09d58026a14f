"""How a run is spread over its processes, and the bytes that this cannot do without."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SCHEMES: dict[str, dict[str, Any]] = {
    "replicate": {"data_parallel": "replicate"},
    "fsdp": {"data_parallel": "fsdp"},
    "hsdp": {"data_parallel": "hsdp", "dp_replicate_size": 2},
    "vocabulary": {"data_parallel": "fsdp", "head_parallel": "vocabulary"},
    "context": {"data_parallel": "replicate", "cp_size": 2},
}
"""By our keys."""

TRL_SCHEMES: dict[str, dict[str, Any]] = {
    "replicate": {"ddp_backend": "gloo"},
    "fsdp": {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": True,
        },
    },
}
"""By the keys of TRL: DDP, and FSDP2 as accelerate sets it up."""


@dataclass(frozen=True)
class Model:
    """What the bytes of an exchange depend on."""

    layers: int
    """Weights of all layers."""
    head: int
    """Weights of the head, which is not the embedding."""
    root: int
    """Weights outside of layers, the head's included."""
    hidden: int
    attention: int
    """Numbers that a token has in the queries, keys, values and outputs of all layers."""
    itemsize: int
    """Bytes of a weight, and of a state."""

    @classmethod
    def at(cls, path: Path, itemsize: int) -> "Model":
        """Of a Llama in a directory."""
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        everything = sum(p.numel() for p in model.parameters())
        layers = sum(p.numel() for p in model.model.layers.parameters())
        heads = config.num_attention_heads + config.num_key_value_heads
        width = 2 * heads * (config.hidden_size // config.num_attention_heads)
        return cls(
            layers=layers,
            head=model.lm_head.weight.numel(),
            root=everything - layers,
            hidden=config.hidden_size,
            attention=width * config.num_hidden_layers,
            itemsize=itemsize,
        )


def ideal(
    scheme: str, processes: int, model: Model, rows: float, tokens: float, scored: float
) -> dict[str, float]:
    """Bytes that a rank sends in a step, by what for; every gradient is added up in fp32.

    Args:
        scheme: of `SCHEMES`.
        processes: over all replicas and shares.
        rows: of a rank and step. Shares are gathered for each: the layers' twice, for forward and
            backward, the rest once; and its gradients are shared out.
        tokens: that a rank computes in a step.
        scored: tokens of the step that the head sees, over all ranks.
    """
    keys = SCHEMES[scheme]
    replicas = keys.get("dp_replicate_size", 1)
    gradients = 4 * (model.layers + model.root)
    if keys["data_parallel"] == "replicate":
        sent = {"sums": 2 * (processes - 1) / processes * gradients}
        size = keys.get("cp_size", 1)
        if size > 1:  # queries, keys, values and outputs, forward and backward
            exchanged = 2 * tokens * model.attention * model.itemsize
            sent["context"] = (size - 1) / size * exchanged
        return sent
    shares = processes // replicas
    over = (shares - 1) / shares
    root, whole = model.root, 0
    if "head_parallel" in keys:
        root, whole = model.root - model.head, model.head
    sent = {
        "weights": over * rows * model.itemsize * (2 * model.layers + root),
        "gradients": over * rows * (gradients - 4 * whole),
    }
    if replicas > 1:
        sent["sums"] = 2 * (replicas - 1) / replicas * gradients / shares
    if whole:  # the states to every share of the head, and their gradient back
        sent["head"] = over * 2 * scored / replicas * model.hidden * model.itemsize
    return sent


def keys_of(provider: str, scheme: str) -> Mapping[str, Any]:
    """The keys that ask a provider for a scheme; none for a process of its own."""
    if scheme in ("one", "apart"):
        return {}
    return (SCHEMES if provider == "fastdpo" else TRL_SCHEMES)[scheme]
