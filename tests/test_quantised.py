"""Adapters on bases in 4 bits: what is quantised, the same numbers as on the weights it stands for,
and a reference cache that tells them apart.
"""

from functools import partial

import pytest
import torch
from families import build
from training import assert_resumes, fill, metrics, run, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.config import TrainConfig
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.adapter import add_adapter
from fastdpo.model.head import check_head, effective_weight, find_head
from fastdpo.model.load import load_model
from fastdpo.model.quantised import count_weights
from fastdpo.reference import weights_digest

functional = pytest.importorskip("bitsandbytes.functional")

QLORA = {
    "load_in_4bit": True,
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
    "learning_rate": 1e-2,
}
CPU = torch.device("cpu")


@pytest.fixture(params=["tiny_model", "tied_model"])
def model_path(request):
    """A head of its own, and one that is the embedding."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def go(tied_model, pairs_file):
    return partial(run, tied_model, pairs_file)


def four_bit(path, autocast=None, **changes):
    config = TrainConfig(**{**QLORA, "model_name_or_path": str(path), **changes})
    return load_model(config, CPU, autocast=autocast), config


def unpacked(path, out, **changes):
    """A checkpoint of the weights that the 4-bit ones stand for."""
    quantised, _ = four_bit(path, **changes)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, module in quantised.named_modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:
                weight = functional.dequantize_4bit(module.weight.data, state)
                plain.get_submodule(name).weight.copy_(weight)
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(path).save_pretrained(out)
    return out


def test_layers_are_in_4_bits_and_the_head_is_not(model_path):
    model, _ = four_bit(model_path)
    plain = AutoModelForCausalLM.from_pretrained(model_path)
    packed = {name for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    expected = {name for name, p in plain.named_parameters() if ".layers." in name and p.dim() == 2}
    assert packed == expected
    head = find_head(model)
    assert torch.equal(head.weight, plain.get_output_embeddings().weight)
    check_head(model, head)
    count = sum(count_weights(p) for p in model.parameters())
    assert count == sum(p.numel() for p in plain.parameters())
    for storage in ("uint8", "bfloat16"):
        model, _ = four_bit(model_path, bnb_4bit_quant_storage=storage)
        held = model.get_submodule("model.layers.0.mlp.up_proj").weight
        assert held.nbytes * 2 == count_weights(held)
        assert held.dtype == getattr(torch, storage)


SCHEMES = {
    "nf4": {},
    "fp4, nested": {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True},
    "stored as bf16": {"bnb_4bit_quant_storage": "bfloat16"},
}
ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "head": {"lora_target_modules": ["q_proj", "lm_head"]},
    "dora on the head": {"lora_target_modules": ["q_proj", "lm_head"], "use_dora": True},
}


@pytest.mark.parametrize(
    "changes",
    [*SCHEMES.values(), *ADAPTERS.values()],
    ids=[*SCHEMES, *ADAPTERS],
)
def test_it_trains_as_on_the_weights_that_it_stands_for(go, tmp_path, tied_model, changes):
    """Losses, norms of gradients and adapters, step by step; the reference is the 4-bit model."""
    keys = {**QLORA, "max_steps": 2, **changes}
    schemes = {name: value for name, value in keys.items() if "bnb" in name}
    plain = unpacked(tied_model, tmp_path / "plain", **schemes)
    _, said = go(tmp_path / "ours", **keys)
    go(tmp_path / "theirs", **{**keys, "load_in_4bit": False}, model_name_or_path=str(plain))
    assert any("shared" in line for line in said), said
    for ours, theirs in zip(metrics(tmp_path / "ours"), metrics(tmp_path / "theirs"), strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    # AdamW's first steps are the sign of the gradient, whatever its size.
    far = sum((a - theirs[name]).abs().gt(1e-3).sum().item() for name, a in ours.items())
    assert far <= 0.01 * sum(t.numel() for t in theirs.values())
    assert not (tmp_path / "ours" / "model.safetensors").exists()


@pytest.mark.parametrize("dora", [False, True])
def test_the_head_with_an_adapter_on_a_4_bit_base(model_path, dora):
    """Merged by hand it gives the logits that peft computes."""
    model, config = four_bit(model_path, lora_target_modules=["lm_head"], use_dora=dora)
    model = add_adapter(model, config)
    head = find_head(model)
    with torch.no_grad():
        head.module.lora_B["default"].weight.normal_()
    check_head(model, head)
    assert not torch.equal(effective_weight(head), head.weight)


def test_products_run_in_the_autocast_type_after_evaluation_too(tied_model):
    """Evaluating on a CPU must not repack the weights: no gradient would pass."""
    model, _ = four_bit(tied_model, autocast=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.bfloat16
    x = torch.randn(3, 64)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[5, 6, 7]]))
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    for mode in (False, True):
        layer.train(mode)
        x = x.detach().requires_grad_()
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 64), rtol=2e-2, atol=2e-2)


def test_a_resumed_run_equals_an_uninterrupted_one(go, tmp_path):
    saved = assert_resumes(go, tmp_path, 2, **QLORA, max_steps=4, gradient_checkpointing=True)
    assert not list(saved.glob("model*")) and (saved / "adapter_model.safetensors").exists()
    whole = weights(tmp_path / "whole")
    assert any(t.abs().sum() > 0 for name, t in whole.items() if "lora_B" in name)


def test_the_reference_cache_tells_quantisations_apart(tied_model, pairs_file, tmp_path):
    cached = partial(fill, tied_model, pairs_file, tmp_path / "out", use_peft=True)
    assert cached() == (0, 48)
    assert cached(load_in_4bit=True) == (0, 48)
    assert cached(load_in_4bit=True, lora_r=3) == (48, 0)
    assert cached(load_in_4bit=True, bnb_4bit_quant_type="fp4") == (0, 48)
    assert cached(load_in_4bit=True, use_bnb_nested_quant=True) == (0, 48)
    model, _ = four_bit(tied_model)
    before = weights_digest(model)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.quant_state.absmax[0] *= 2  # the packed bytes stay what they were
    assert weights_digest(model) != before


def test_what_cannot_be_trained_is_refused(tmp_path, tied_model):
    with pytest.raises(ConfigError, match="load_in_4bit: needs use_peft"):
        TrainConfig(load_in_4bit=True)
    model, _ = four_bit(tied_model)
    model.save_pretrained(tmp_path / "packed")
    config = TrainConfig(model_name_or_path=str(tmp_path / "packed"))
    with pytest.raises(ModelError, match="its weights are quantised: set use_peft"):
        load_model(config, CPU)
    again, _ = four_bit(tmp_path / "packed", load_in_4bit=False)
    assert hasattr(again.model.layers[0].mlp.up_proj.weight, "quant_state")


@pytest.mark.parametrize(
    ("family", "expected"),
    [("falcon", "has no linear layers that bitsandbytes knows"), ("mamba", "does not run in 4 b")],
)
def test_architectures_that_cannot_be_quantised_are_named(tmp_path, family, expected):
    build(family, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"load_in_4bit: {family.title()}.* {expected}") as caught:
        four_bit(tmp_path)
    assert "\n" not in str(caught.value)
