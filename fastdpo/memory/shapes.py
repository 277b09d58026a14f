"""What is to be held and computed: the model without its weights, and rows without their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config import TrainConfig
from ..data.groups import Group
from ..data.packing import PackedRow
from ..data.plan import Step
from ..errors import ModelError, one_line
from ..model.adapter import add_adapter
from ..model.head import base_causal_lm, find_head

_BLOCK_4BIT, _BLOCK_NESTED = 64, 256


@dataclass(frozen=True)
class RowShape:
    """The sizes of a packed row."""

    tokens: int
    """S: tokens that the layers compute, padding included."""
    keys: int
    """Keys that the queries see, a shared prompt once for each of its responses; S where nothing is
    shared."""
    scored: int
    """T: tokens that the head scores."""
    segments: int
    """Sequences of queries, one call of attention each where there is no kernel for all of them."""
    pairs: int
    """Query-key pairs that attention computes."""
    masked: int
    """Sizes of the rectangles queries × keys that need a mask where there is no kernel for a shared
    prompt."""
    rectangles: int
    """Sizes of all such rectangles, which need one where a window slides over the keys."""
    longest: int
    """Most keys of a segment."""
    sequences: int = 1
    """Lines of the tensor of tokens: more than 1 in padded rows."""
    prompts: int = 0
    """Scored tokens that are a prompt's own."""


def row_shape(
    groups: Sequence[Group], row: PackedRow, layout: str, *, prompt: bool = False
) -> RowShape:
    """The sizes of a row of the plan in a layout ("shared", "packed" or "padded"); with `prompt`
    the tokens of each part's prompt are scored too, but for the first, which nothing precedes.
    """
    tokens = keys = scored = segments = pairs = masked = rectangles = longest = lines = prompts = 0
    widest = max(
        len(groups[p.group].prompt) + len(groups[p.group].responses[r])
        for p in row
        for r in p.responses
    )
    for part in row:
        group = groups[part.group]
        before = len(group.prompt)
        scored += max(0, before - 1) * prompt
        prompts += max(0, before - 1) * prompt
        for number, r in enumerate(part.responses):
            response = len(group.responses[r])
            alone = layout != "shared" or number == 0
            queries, seen = before * alone + response, before + response
            scored += response if before else max(response - 1, 0)
            if layout == "padded":
                queries = seen = widest
                masked += queries * seen
            elif not alone and before:
                masked += queries * seen
            tokens, keys, lines = tokens + queries, keys + seen, lines + 1
            rectangles, longest = rectangles + queries * seen, max(longest, seen)
            segments += bool(queries)
            pairs += queries * seen - queries * (queries - 1) // 2
    sequences = lines if layout == "padded" else 1
    return RowShape(
        tokens=tokens,
        keys=keys,
        scored=scored,
        segments=segments,
        pairs=pairs,
        masked=masked,
        rectangles=rectangles,
        longest=longest,
        sequences=sequences,
        prompts=prompts,
    )


def step_shapes(
    groups: Sequence[Group], steps: Iterable[Step], layout: str, *, prompt: bool = False
) -> list[list[RowShape]]:
    """The rows of every step on one device; empty rows are left out."""
    return [
        [row_shape(groups, row, layout, prompt=prompt) for row in step.ranks[0] if row]
        for step in steps
    ]


def mismatched_shapes(
    groups: Sequence[Group], steps: Iterable[Step], layout: str
) -> list[list[RowShape]]:
    """The rows of mismatched responses that are scored before every step's own (KTO)."""
    return [[row_shape(groups, row, layout) for row in step.first] for step in steps]


def scaled(row: RowShape, tokens: int) -> RowShape:
    """A row of `tokens` tokens that is made of the same parts as `row`."""
    factor = tokens / row.tokens
    names = ("keys", "scored", "segments", "pairs", "masked", "rectangles", "prompts")
    return replace(
        row, tokens=tokens, **{name: math.ceil(getattr(row, name) * factor) for name in names}
    )


def meta_model(config: TrainConfig, model_config: Any) -> Any:
    """The model to train, its adapter included, on the meta device: shapes and types, no numbers.

    Raises ModelError where transformers has no causal language model for the configuration.
    """
    dtype = getattr(model_config, "dtype", None) if config.dtype == "auto" else config.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=config.trust_remote_code
            )
            if config.use_peft:
                model.requires_grad_(False)
                model = add_adapter(model, config)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"{config.model_name_or_path}: no causal language model ({one_line(error)})"
        ) from None
    return model.train()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of layers that are run one after the other. ModelError where there is none."""
    lists = [
        module
        for module in base_causal_lm(model).modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and isinstance(module[0], GradientCheckpointingLayer)
    ]
    if not lists:
        raise ModelError(f"{type(base_causal_lm(model)).__name__}: found no list of layers")
    return max(lists, key=len)


def linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers inside a module with their names, adapters included."""
    return [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]


def is_base_linear(name: str) -> bool:
    """Whether a linear layer is the model's own and no adapter's."""
    return "lora_" not in name


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model by what they cost; `config` decides what is trained and how it is held."""

    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    weights: int
    """Bytes of all parameters, in 4 bits where the configuration says so."""
    layer_weights: int
    """Bytes of the parameters of the largest layer."""
    root_weights: int
    """Bytes of those outside the layers: embedding, last norm, head."""
    parameters: int
    trained: tuple[tuple[int, int], ...]
    """(elements, bytes of one element) of each trained parameter."""
    embeddings: tuple[tuple[int, int], ...]
    """Those of them that are an embedding's, a tied head's included."""
    layer_trained: int
    """Bytes of the trained parameters of one layer, the mean over layers."""
    linear: int
    """Elements that all layers multiply every token by."""
    linear_trained: int
    """Those of them that get a gradient of their own."""
    linear_tokenwise: int
    """Those of them outside attention."""
    largest_linear: int
    """Elements of the largest matrix of a layer."""
    cast: int
    """Elements of one layer's trained fp32 matrices, of which autocast keeps a copy."""
    head_dtype: torch.dtype
    softcap: bool
    """Whether the head ends in a soft cap."""
    head_trained: bool
    embedding_trained: int
    """Bytes of the input embedding's gradient; 0 where it is frozen."""
    tied: bool

    @classmethod
    def of(cls, model: Any, config: TrainConfig) -> ModelShape:
        """The sizes of a model on the meta device, or of a real one that is not quantised yet."""
        text = base_causal_lm(model).config.get_text_config()
        layers, head = decoder_layers(model), find_head(model)
        embedding = base_causal_lm(model).get_input_embeddings().weight
        matrices = [(n, m.weight) for layer in layers for n, m in linears(layer)]
        base = [w for n, w in matrices if is_base_linear(n)]
        experts = _active_experts(layers, text)
        tokenwise = [w for n, w in matrices if "attn" not in n and "attention" not in n]
        own = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        trained = [p for p in model.parameters() if p.requires_grad]
        tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        vocab, hidden = head.weight.shape
        sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        casts = (w.numel() for _, w in matrices if w.requires_grad and w.dtype == torch.float32)
        return cls(
            layers=len(layers),
            hidden=hidden,
            vocab=vocab,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or hidden // text.num_attention_heads,
            weights=weight_bytes(model.parameters(), base, config),
            layer_weights=max(sizes),
            root_weights=sum(p.nbytes for p in model.parameters()) - sum(sizes),
            parameters=sum(p.numel() for p in model.parameters()),
            trained=tuple((p.numel(), p.element_size()) for p in trained),
            embeddings=tuple((p.numel(), p.element_size()) for p in tables if p.requires_grad),
            layer_trained=sum(p.nbytes for p in own) // len(layers),
            linear=sum(w.numel() for _, w in matrices) + experts,
            linear_trained=sum(w.numel() for _, w in matrices if w.requires_grad)
            + (0 if config.use_peft else experts),
            linear_tokenwise=sum(w.numel() for w in tokenwise) + experts,
            largest_linear=max((w.numel() for w in base), default=0),
            cast=sum(casts) // len(layers),
            head_dtype=head.weight.dtype,
            softcap=head.softcap is not None,
            head_trained=head.weight.requires_grad,
            embedding_trained=embedding.nbytes if embedding.requires_grad else 0,
            tied=head.weight is embedding,
        )


def weight_bytes(
    parameters: Iterable[torch.Tensor], linear: Iterable[torch.Tensor], config: TrainConfig
) -> int:
    """Bytes of the weights: elements × bytes of their type; with `load_in_4bit`, half a byte for
    each of `linear`'s plus the scale of every 64: 4 bytes, or nested 1 byte and 4 bytes for every
    256 of them.
    """
    plain = sum(p.nbytes for p in parameters)
    if not config.load_in_4bit:
        return plain
    saved = 0
    for weight in linear:
        blocks = math.ceil(weight.numel() / _BLOCK_4BIT)
        nested = blocks + 4 * math.ceil(blocks / _BLOCK_NESTED)
        scales = nested if config.use_bnb_nested_quant else 4 * blocks
        saved += weight.nbytes - math.ceil(weight.numel() / 2) - scales
    return plain - saved


def _active_experts(layers: nn.ModuleList, text: Any) -> int:
    """Elements of the experts, which are stacks of matrices (E, m, n), that one token meets."""
    active = getattr(text, "num_experts_per_tok", None) or 0
    stacks = (p for layer in layers for p in layer.parameters() if p.dim() == 3)
    return sum(p[0].numel() * min(active, p.shape[0]) for p in stacks)
