"""The head of any causal language model, read as one matrix and some scalars."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import OTHER_HEADS, OTHERS, SHARED, build
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaModel, T5Config
from transformers import T5ForConditionalGeneration as T5

from fastdpo.data.segments import Segments
from fastdpo.errors import ModelError
from fastdpo.model.head import Head, check_head, effective_weight, find_head, hidden_states
from fastdpo.model.layout import choose_layout

TOKENS = torch.tensor([[5, 9, 33, 2, 17, 40], [1, 2, 3, 4, 5, 6]])
FAMILIES = [*SHARED, *OTHERS, *OTHER_HEADS]
SCALARS = {
    "llama": (1.0, None),
    "cohere": (0.25, None),
    "granite": (0.5, None),
    "hyperclovax": (0.5, None),
    "minicpm3": (0.5, None),
    "falcon_h1": (0.5, None),
    "gemma2": (1.0, 3.0),
    "nanochat": (1.0, 3.0),
    "recurrent_gemma": (1.0, 30.0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_logits(family: str) -> None:
    model = build(family)
    head = find_head(model)
    check_head(model, head)
    states = hidden_states(model, input_ids=TOKENS)
    logits = model(TOKENS).logits
    assert head.weight is model.get_output_embeddings().weight
    assert effective_weight(head) is head.weight
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(head.logits(states).to(logits), logits, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize(("family", "scalars"), SCALARS.items())
def test_scales_and_caps(family: str, scalars: tuple[float, float | None]) -> None:
    head = find_head(build(family))
    assert (head.logit_scale, head.softcap) == scalars


def test_bias_and_tied_weights() -> None:
    phi = build("phi")
    head = find_head(phi)
    assert head.bias is phi.lm_head.bias and head.bias.abs().max() > 0
    qwen = build("qwen2")
    assert find_head(qwen).weight is qwen.get_input_embeddings().weight
    assert find_head(qwen).bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "mamba"])
def test_check_in_lower_precision(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    check_head(model, find_head(model))
    with torch.autocast("cpu", torch.bfloat16):
        check_head(model, find_head(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("cohere", {"logit_scale": 1.0}),
        ("granite", {"logit_scale": 2.0}),
        ("gemma2", {"softcap": None}),
        ("gemma2", {"softcap": 2.5}),
        ("llama", {"logit_scale": 1.1}),
    ],
)
def test_a_wrong_head_is_refused(family: str, wrong: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    right = find_head(model)
    fields = {"logit_scale": right.logit_scale, "softcap": right.softcap} | wrong
    with pytest.raises(ModelError, match="logits are not weight · hidden"):
        check_head(model, Head(right.module, **fields))


def test_check_under_our_own_attention() -> None:
    model = build("gemma3_text")
    choose_layout(model)
    check_head(model, find_head(model))


def test_check_leaves_nothing_behind() -> None:
    model = build("llama").train()
    state = torch.get_rng_state()
    check_head(model, find_head(model))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_models_without_a_usable_head() -> None:
    llama = LlamaConfig(**SHARED["llama"])
    with pytest.raises(ModelError, match="output embedding"):
        find_head(LlamaModel(llama))
    t5 = T5Config(vocab_size=72, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="decoder-only"):
        find_head(T5(t5))
    bert = BertConfig(
        vocab_size=72, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    model = BertLMHeadModel(bert)
    with pytest.raises(ModelError, match="logits are not weight · hidden"):
        check_head(model, find_head(model))
    quantised = build("llama", dtype=torch.float32)
    quantised.lm_head.weight = torch.nn.Parameter(
        quantised.lm_head.weight.to(torch.int8), requires_grad=False
    )
    with pytest.raises(ModelError, match="unquantised"):
        find_head(quantised)


def adapted(family: str = "llama", dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    """A PeftModel whose adapters all do something."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"]} | lora
    model = get_peft_model(build(family, dtype=dtype), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
                p.add_(0.2 * noise) if "magnitude" in name else p.copy_(0.3 * noise)
    return model.eval()


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "not on the head": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapters_on_the_head(adapter: dict[str, Any], family: str) -> None:
    model = adapted(family, **adapter)
    head = find_head(model)
    check_head(model, head)
    logits = model(TOKENS).logits
    states = hidden_states(model, input_ids=TOKENS)
    ours = states @ effective_weight(head).T + (0 if head.bias is None else head.bias)
    torch.testing.assert_close(ours, logits, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(logits)
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad((logits * weight).sum(), wanted)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), wanted), expected, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapters_switched_off_and_merged(adapter: dict[str, Any]) -> None:
    model = adapted(**adapter)
    head, plain = find_head(model), find_head(build("llama")).weight
    with model.disable_adapter():
        assert torch.equal(effective_weight(head), plain)
        check_head(model, head)
    trained = effective_weight(head).detach().clone()
    if adapter.get("target_modules") != ["q_proj"]:
        assert not torch.equal(trained, plain)
        model.merge_adapter()
        torch.testing.assert_close(effective_weight(head), trained, rtol=1e-12, atol=1e-12)
        assert effective_weight(head) is head.weight


def test_several_lora_adapters_add_up() -> None:
    model = adapted()
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    head = find_head(model)
    check_head(model, head)
    one, both = None, effective_weight(head)
    model.base_model.set_adapter("second")
    one = effective_weight(head)
    assert not torch.allclose(one, both)
    check_head(model, head)


def test_a_small_update_survives_a_bf16_base() -> None:
    """peft keeps adapters in fp32; rounding W + sBA to bf16 would drop most of an early update."""
    model = adapted(dtype=torch.bfloat16)
    lora = model.base_model.model.lm_head
    with torch.no_grad():
        lora.lora_B["default"].weight.mul_(1e-4)
    head = find_head(model)
    update = effective_weight(head) - head.weight
    assert update.dtype == torch.float32
    expected = lora.get_delta_weight("default")
    assert (update - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout: expected 0"),
        ({"lora_bias": True, "target_modules": ["lm_head"]}, "lora_bias: expected false"),
    ],
)
def test_lora_settings_that_are_not_one_matrix(settings: dict[str, Any], message: str) -> None:
    base = build("phi")
    base_settings: dict[str, Any] = {"r": 2, "target_modules": ["lm_head"]}
    model = get_peft_model(base, LoraConfig(**(base_settings | settings)))
    with pytest.raises(ModelError, match=message):
        find_head(model)


def test_lora_dropout_elsewhere_is_no_concern_of_the_head() -> None:
    model = adapted(target_modules=["q_proj"], lora_dropout=0.1)
    check_head(model, find_head(model))


def test_other_adapters_are_refused() -> None:
    tuned = get_peft_model(
        build("llama"),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [1, 2]}),
    )
    with pytest.raises(ModelError, match="expected LoRA, DoRA or modules_to_save"):
        find_head(tuned)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = get_peft_model(build("llama"), settings)
    with pytest.raises(ModelError, match="prompt learning"):
        find_head(prompted)


def test_two_dora_adapters_are_refused() -> None:
    model = adapted(use_dora=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="only adapter"):
        find_head(model)


def test_hidden_states_take_segments() -> None:
    model = build("llama")
    expected = hidden_states(model, input_ids=TOKENS)
    choose_layout(model)
    states = hidden_states(
        model,
        input_ids=TOKENS.reshape(1, -1),
        position_ids=torch.arange(6).repeat(2)[None],
        fastdpo_segments=Segments.build([(0, 6, 0, 0), (6, 12, 0, 0)]),
    )
    torch.testing.assert_close(states.view_as(expected), expected, rtol=0, atol=1e-12)
