"""Tiny random models of many architectures, and packed rows for them, built apart from the code."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastdpo.data.segments import Segments

VOCABULARY = 72

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_GPT2_STILL = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_STILL = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
_WINDOWS = {
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 10,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
_OPT = {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}

SHARED: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA | {"tie_word_embeddings": True},
    "qwen3": _LLAMA | _WINDOWS | {"use_sliding_window": True, "max_window_layers": 1},
    "gemma2": _LLAMA
    | _WINDOWS
    | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _LLAMA | _WINDOWS | {"query_pre_attn_scalar": 8},
    "mistral": _LLAMA | {"sliding_window": 4, "head_dim": 8},
    "phi3": _LLAMA | {"pad_token_id": 0},
    "olmo2": _LLAMA,
    "gpt_neox": _LLAMA | _STILL,
    "gpt2": _GPT2 | _GPT2_STILL,
    "granite": _LLAMA | {"logits_scaling": 2.0, "attention_multiplier": 0.3},
    "cohere": _LLAMA | {"logit_scale": 0.25},
    "cohere2": _LLAMA | _WINDOWS | {"logit_scale": 0.25},
    "mixtral": _LLAMA | _EXPERTS,
    "deepseek_v3": _LLAMA
    | _LATENT
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    | {"moe_intermediate_size": 12, "first_k_dense_replace": 1},
    "gpt_oss": _LLAMA | _WINDOWS | _EXPERTS,
    "phi": _LLAMA,
    "opt": _LLAMA | _OPT,
    "starcoder2": _LLAMA | {"sliding_window": 4, "residual_dropout": 0.0, "embedding_dropout": 0.0},
}
"""Architectures whose prompts are shared with every release that setup.py admits, by model_type."""

OTHERS: dict[str, dict[str, Any]] = {
    "bloom": _BLOOM | _STILL,
    "falcon": _LLAMA | _STILL | {"alibi": False},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2},
    "gptj": _GPT2 | _GPT2_STILL | {"rotary_dim": 4},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
    "jamba": _LLAMA
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4},
    "llama4_text": _LLAMA
    | {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 4, "no_rope_layers": [1, 0]},
    "stablelm": _LLAMA,
    "falcon_h1": _LLAMA
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}
    | {"mamba_chunk_size": 8, "lm_head_multiplier": 0.5},
    "recurrent_gemma": _LLAMA
    | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4, "head_dim": 8},
}
"""Architectures that are shared where the release of transformers allows it, and else padded."""

ALONE: dict[str, dict[str, Any]] = {
    "phi3+longrope": _LLAMA
    | {"pad_token_id": 0, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 10},
    "llama+dynamic": _LLAMA | {"max_position_embeddings": 10, "rope_parameters": _DYNAMIC},
}
"""Architectures whose sequences change with their neighbours in a batch."""

OTHER_HEADS: dict[str, dict[str, Any]] = {
    "hyperclovax": _LLAMA | {"logits_scaling": 0.5},
    "minicpm3": _LLAMA | _LATENT | {"dim_model_base": 16},
    "nanochat": _LLAMA | {"final_logit_softcapping": 3.0},
}
"""Further ways from hidden states to logits."""


def build(
    name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random model whose logits spread enough for mistakes to show; the same each time."""
    known = SHARED | OTHERS | ALONE | OTHER_HEADS
    fields = copy.deepcopy(known[name]) | overrides
    config = AutoConfig.for_model(name.partition("+")[0], **fields)
    with torch.random.fork_rng(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        torch.manual_seed(seed)
        # The experts' grouped matrix product has no fp64.
        model.set_experts_implementation("eager")
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64).to(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


Group = tuple[list[int], list[list[int]]]


def random_groups(lengths: list[tuple[int, list[int]]], seed: int = 0) -> list[Group]:
    """Prompts and responses of the given lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    return [(tokens(prompt), [tokens(n) for n in responses]) for prompt, responses in lengths]


GROUPS = random_groups([(6, [5, 2, 7]), (1, [3, 4]), (9, [1])])
"""Three responses, two after a prompt of one token, and a lone response of one token."""


@dataclass
class PackedRow:
    """A packed row, told as facts about each token: what `Segments` says in bounds."""

    ids: list[int]
    positions: list[int]
    groups: list[int]
    responses: list[int]
    """-1 for a token of a shared prompt."""
    bounds: list[tuple[int, int, int, int]]
    score: list[int]
    targets: list[int]

    def inputs(self) -> dict[str, Any]:
        """The model's keyword arguments."""
        return {
            "input_ids": torch.tensor([self.ids]),
            "position_ids": torch.tensor([self.positions]),
            "fastdpo_segments": Segments.build(self.bounds),
        }

    def seen(self, window: int | None = None) -> Tensor:
        """(S, S) bool: who sees whom, by the definition and not by the bounds."""
        position, group, response = (
            torch.tensor(x) for x in (self.positions, self.groups, self.responses)
        )
        distance = position[:, None] - position
        seen = (distance >= 0) & (group[:, None] == group)
        seen &= (response == -1) | (response[:, None] == response)
        return seen if window is None else seen & (distance < window)


def pack(groups: list[Group], *, share: bool) -> PackedRow:
    """`[prompt r0 r1 | …]`, or `[prompt r0 | prompt r1 | …]` without sharing."""
    row = PackedRow([], [], [], [], [], [], [])
    number = 0
    for prompt, responses in groups:
        prompt_start = len(row.ids)
        for nth, response in enumerate(responses):
            number += 1
            shares = share and nth > 0
            start = len(row.ids)
            prompt_start = prompt_start if shares else start
            text = response if shares else prompt + response
            prefix = len(prompt) + len(response) - len(text)
            row.ids += text
            row.positions += range(prefix, prefix + len(text))
            row.groups += [id(prompt) if share else number] * len(text)
            own = len(response)
            row.responses += [-1] * (len(text) - own) + [number] * own
            row.bounds.append((start, start + len(text), prompt_start, prompt_start + prefix))
            row.score += [prompt_start + len(prompt) - 1]
            row.score += range(len(row.ids) - own, len(row.ids) - 1)
            row.targets += response
    return row


def row_logps(model: Any, row: PackedRow, **inputs: Any) -> Tensor:
    """(T,) log-probabilities of the responses' tokens; `inputs` instead of the row's own."""
    logits = model(use_cache=False, **(inputs or row.inputs())).logits[0]
    logps = logits[row.score].double().log_softmax(-1)
    return logps[torch.arange(len(row.targets)), row.targets]


def separate_logps(model: Any, groups: list[Group], *, trailing: int = 0) -> Tensor:
    """(T,) the same from one forward for each response, through whatever attention is set.

    With `trailing`, so many tokens follow each response, which a causal model does not look at.
    """
    parts = []
    for prompt, responses in groups:
        for response in responses:
            ids = torch.tensor([prompt + response + [1] * trailing])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            logps = logits[len(prompt) - 1 : len(prompt) + len(response) - 1]
            logps = logps.double().log_softmax(-1)
            parts.append(logps[torch.arange(len(response)), response])
    return torch.cat(parts)


def gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient of a sum that weighs each token differently."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@dataclass(frozen=True)
class Truth:
    """What separate sequences give, and how exactly the model itself can say it twice.

    Some models round to fp32 inside whatever their dtype (norms, routers, softmax), others never:
    which ones is the library's business. So a model is asked for the same numbers in other ways,
    through its own attention, and may be as far from them elsewhere as it then is from itself.
    """

    logps: Tensor
    gradients: dict[str, Tensor]
    logps_tolerance: float
    """Absolute, for one token."""
    gradients_tolerance: float
    """Relative, for one parameter as `relative_error` measures it."""

    @classmethod
    def of(cls, model: Any, groups: list[Group]) -> Truth:
        """From one forward for each response of `model`, as it is."""
        logps = separate_logps(model, groups)
        expected = gradients(model, logps)
        eps = torch.finfo(model(torch.tensor([[1]]), use_cache=False).logits.dtype).eps
        noise, gradient_noise = eps * logps.abs().max().item(), 16 * eps
        for trailing in (0, 1, 8, 9):
            again = separate_logps(model, groups, trailing=trailing)
            noise = max(noise, (again - logps).abs().max().item())
            # Linear in the loss, so only rounding can tell; 3 is not a power of two.
            thrice = {name: g / 3 for name, g in gradients(model, 3 * again).items()}
            gradient_noise = max(gradient_noise, relative_error(thrice, expected))
        return cls(logps.detach(), expected, FACTOR * noise, FACTOR * gradient_noise)

    def check(self, model: Any, logps: Tensor) -> None:
        """Raise AssertionError where `logps`, or their gradients in `model`, are others."""
        torch.testing.assert_close(logps.detach(), self.logps, rtol=0, atol=self.logps_tolerance)
        assert relative_error(gradients(model, logps), self.gradients) <= self.gradients_tolerance


FACTOR = 8
"""How many times its own repeatability another layout may be away: it rounds in more places."""


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest of all parameters' errors of the gradient, as a share of the gradient."""
    assert ours.keys() == theirs.keys()
    total = torch.stack([g.norm() for g in theirs.values()]).norm()
    # A key bias has gradient 0 but for rounding, hence the share of the whole.
    errors = [(ours[n] - g).norm() / (g.norm() + 1e-6 * total) for n, g in theirs.items()]
    return torch.stack(errors).max().item()
