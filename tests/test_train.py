"""Whole runs of a tiny model: what they write, and that nothing but rounding depends on how rows
are packed.
"""

import math
from functools import partial

import pytest
import torch
from training import assert_close_metrics, heard, metrics, run, settings, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastdpo import TrainConfig, train
from fastdpo.errors import ConfigError, DataError, FastDPOError, ModelError
from fastdpo.model import load
from fastdpo.model.load import load_model
from fastdpo.training.run import precompute

TRL_METRICS = {
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "num_tokens",
    "entropy",
    "mean_token_accuracy",
    "logits/chosen",
    "logits/rejected",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
}
OURS = {"tokens_per_second", "pairs_per_second", "peak_memory_mib", "tokens_saved_by_sharing"}
OURS |= {"head_passes"}


@pytest.fixture
def go(tiny_model, pairs_file):
    return partial(run, tiny_model, pairs_file)


def test_a_run_learns_and_writes_what_the_stack_reads(go, tmp_path, pairs_file, tiny_model):
    out = tmp_path / "out"
    result, said = go(
        out,
        num_train_epochs=6,
        max_steps=-1,
        eval_dataset_name=str(pairs_file),
        eval_strategy="epoch",
        eval_on_start=True,
        save_strategy="epoch",
        save_total_limit=2,
        beta=0.5,
    )
    rows = metrics(out)
    assert rows[0]["eval_rewards/accuracies"] == pytest.approx(0.5, abs=0.5)
    assert rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[1].keys() >= TRL_METRICS | OURS | {"step"} and rows[1]["head_passes"] == 6
    assert result["eval_rewards/accuracies"] > 0.9 and result["eval_loss"] < 0.4
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 25))
    assert rows[-1]["epoch"] == 6
    assert any(line.startswith("first loss 0.69314") for line in said)
    assert any("shared" in line for line in said)
    trained = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(trained(torch.tensor([[1, 2, 3]])).logits).all()
    assert trained.config.attention_dropout == 0.1
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-24"]
    AutoModelForCausalLM.from_pretrained(out / "checkpoint-24")
    assert TrainConfig.load(out / "training_config.yaml").beta == 0.5
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "- dpo" in card and "eval_rewards/accuracies" in card and str(tiny_model) not in card


VARIANTS = {
    "packed": {"share_prefix": False},
    "padded": {"attn_implementation": "sdpa"},
    "one pair a row": {"max_tokens_per_batch": 1},
    "two or three pairs a row": {"max_tokens_per_batch": 90},
    "ungrouped": {"group_prompts": False},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "checkpointed": {"gradient_checkpointing": True},
    "in tiles": {"gradient_checkpointing": True, "layer_tile_tokens": 16},
    "every second layer": {"gradient_checkpointing": True, "gradient_checkpointing_every": 2},
    "online reference": {"precompute_ref_log_probs": False},
    "another workspace": {"head_workspace_mib": 1},
}


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_no_way_of_packing_changes_a_number(go, tmp_path, loss_type):
    common = {"shuffle": False, "loss_type": [loss_type], "learning_rate": 1e-4}
    go(tmp_path / "out", **common)
    expected = metrics(tmp_path / "out")
    for name, changes in VARIANTS.items():
        go(tmp_path / name, **common, **changes)
        for ours, theirs in zip(metrics(tmp_path / name), expected, strict=True):
            for key in TRL_METRICS - {"rewards/accuracies"}:
                close = pytest.approx(theirs[key], rel=1e-5, abs=1e-5)
                assert ours[key] == close, (name, key, ours["step"])


def test_a_step_is_the_mean_over_its_comparisons(go, tmp_path):
    """13 comparisons in steps of 8: the second step has 5, and its loss is their mean."""
    go(tmp_path / "a", max_steps=-1, num_train_epochs=1, per_device_train_batch_size=20)
    first, second = metrics(tmp_path / "a")
    assert (first["loss"], first["step"]) == (pytest.approx(math.log(2), abs=1e-6), 1)
    assert second["epoch"] == 1.0 and 0.0 < second["loss"] < 2.0


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=str)
def test_adapters_train_beside_either_reference(go, tmp_path, dora, targets):
    common = {
        "use_peft": True,
        "use_dora": dora,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "lora_target_modules": targets,
        "shuffle": False,
        "learning_rate": 1e-2,
        "max_steps": 6,
    }
    result, _ = go(tmp_path / "a", **common)
    go(tmp_path / "b", **common, precompute_ref_log_probs=False)
    assert_close_metrics(tmp_path / "a", tmp_path / "b")
    assert result["loss"] < 0.65
    tensors = weights(tmp_path / "a")
    assert any("lm_head" in name for name in tensors) == ("lm_head" in targets)
    assert all(t.abs().sum() > 0 for name, t in tensors.items() if "lora_B" in name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.isfinite(loaded(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_reference_of_its_own(go, tmp_path, tiny_model):
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(other)
    common = {"ref_model_name_or_path": str(other), "shuffle": False}
    go(tmp_path / "a", **common)
    go(tmp_path / "b", **common, precompute_ref_log_probs=False)
    first = metrics(tmp_path / "a")[0]
    assert abs(first["loss"] - math.log(2)) > 1e-3
    assert_close_metrics(tmp_path / "a", tmp_path / "b")


def test_a_mix_of_losses_is_their_weighted_sum(go, tmp_path):
    go(tmp_path / "mix", loss_type=["sigmoid", "hinge"], loss_weights=[1.0, 0.5], max_steps=1)
    assert metrics(tmp_path / "mix")[0]["loss"] == pytest.approx(math.log(2) + 0.5, abs=1e-5)


def test_bf16_runs_close_to_fp32(go, tmp_path):
    go(tmp_path / "a", shuffle=False, max_steps=2)
    go(tmp_path / "b", shuffle=False, max_steps=2, bf16=True)
    (a, _), (b, _) = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert b["logps/chosen"] == pytest.approx(a["logps/chosen"], rel=1e-2)
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=5e-2)
    assert weights(tmp_path / "b")["lm_head.weight"].dtype == torch.float32


def test_weight_decay_spares_norms(go, tmp_path, tiny_model):
    go(tmp_path / "a", weight_decay=0.5, learning_rate=0.1, max_steps=1, max_grad_norm=1e-12)
    before, after = weights(tiny_model), weights(tmp_path / "a")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert after[name].norm() < 0.97 * before[name].norm()


def test_a_loss_that_is_not_finite_stops_the_run(go, tmp_path, monkeypatch):
    from fastdpo_kernels import LOSSES

    monkeypatch.setitem(
        LOSSES, "nan", lambda pairs, *, beta, label_smoothing: pairs.margins * math.nan
    )
    with pytest.raises(FastDPOError, match="step 1: loss is nan"):
        go(tmp_path / "out", loss_type=["nan"])
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_nothing_is_written_over(go, tmp_path):
    go(tmp_path / "out", max_steps=1)
    before = weights(tmp_path / "out")["lm_head.weight"]
    with pytest.raises(ConfigError, match="holds another run"):
        go(tmp_path / "out", max_steps=2)
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], before)
    go(tmp_path / "out", max_steps=2, overwrite_output_dir=True)
    assert len(metrics(tmp_path / "out")) == 2


def test_unpaired_rows_are_refused_with_a_reason(go, tmp_path):
    file = tmp_path / "kto.jsonl"
    file.write_text('{"prompt": "a", "completion": "b", "label": true}\n', encoding="utf-8")
    with pytest.raises(DataError, match="needs rows of prompt, chosen, rejected"):
        go(tmp_path / "out", dataset_name=str(file), loss_type=["sigmoid"])


def test_models_that_cannot_be_trained_are_named(go, tmp_path, tiny_model):
    with pytest.raises(ModelError, match="does not exist"):
        go(tmp_path / "a", model_name_or_path="/nowhere/model")
    headless = tmp_path / "headless"
    headless.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (headless / file).write_bytes((tiny_model / file).read_bytes())
    (headless / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(ModelError, match="causal language model"):
        go(tmp_path / "b", model_name_or_path=str(headless))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (pickled / file).write_bytes((tiny_model / file).read_bytes())
    torch.save(weights(tiny_model), pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        go(tmp_path / "c", model_name_or_path=str(pickled))
    small = AutoModelForCausalLM.from_pretrained(tiny_model)
    small.resize_token_embeddings(300)
    small.save_pretrained(pickled)
    with pytest.raises(FastDPOError, match="vocabulary"):
        go(tmp_path / "d", model_name_or_path=str(pickled))


def test_precompute_fills_the_cache_that_training_reads(go, tmp_path, tiny_model, pairs_file):
    config = TrainConfig.from_dict(settings(tiny_model, pairs_file, tmp_path / "out"))
    assert precompute(config)["computed"] == 48
    with heard() as said:
        train(config)
    assert any("48 found, 0 computed" in line for line in said)


def test_liger_layers_need_a_gpu_and_leave_the_head(tiny_model, monkeypatch):
    config = TrainConfig.from_dict(
        {"model_name_or_path": str(tiny_model), "use_liger_kernel": True}
    )
    with pytest.raises(ConfigError, match="use_liger_kernel: Liger's kernels need a GPU"):
        load_model(config, torch.device("cpu"))
    asked = []
    monkeypatch.setattr(load, "apply_liger_kernel", lambda model, keys: asked.append(keys))
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, device: self)
    load_model(config, torch.device("cuda"))
    assert asked == [{"fused_linear_cross_entropy": False, "cross_entropy": False}]

    def missing(model, keys):
        raise ImportError("liger-kernel is not available")

    monkeypatch.setattr(load, "apply_liger_kernel", missing)
    with pytest.raises(ConfigError, match="use_liger_kernel: liger-kernel is not available"):
        load_model(config, torch.device("cuda"))


@pytest.mark.gpu
def test_a_gpu_in_bf16_is_as_near_to_fp32_as_eager_attention_is(tiny_model, pairs_file, tmp_path):
    """Loss, log-probabilities and gradient norm of the same rows, against the CPU in fp32."""
    ways = {
        "exact": {"use_cpu": True},
        "eager": {"use_cpu": False, "bf16": True, "attn_implementation": "eager"},
        "ours": {"use_cpu": False, "bf16": True},
    }
    found = {}
    for name, keys in ways.items():
        run(tiny_model, pairs_file, tmp_path / name, learning_rate=1e-4, **keys)
        found[name] = metrics(tmp_path / name)
    for key in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
        ours, eager = (
            max(
                abs(line[key] - true[key])
                for line, true in zip(found[n], found["exact"], strict=True)
            )
            for n in ("ours", "eager")
        )
        scale = max(abs(true[key]) for true in found["exact"])
        assert ours <= 1.5 * eager + 1e-3 * scale, key


@pytest.mark.gpu
@pytest.mark.parametrize(
    "keys",
    [
        {"activation_offloading": True, "gradient_checkpointing": True},
        {"layer_tile_tokens": 64},
        {"optimizer_offload": True},
        {"optim": "adamw_torch_8bit"},
        {"optim": "paged_adamw_8bit"},
        {"torch_compile": True},
        {"use_liger_kernel": True},
        {"use_peft": True, "lora_dropout": 0.0, "load_in_4bit": True},
    ],
    ids=lambda keys: next(iter(keys)) if "use_peft" not in keys else "load_in_4bit",
)
def test_switches_of_memory_and_speed_on_a_gpu(keys, tiny_model, pairs_file, tmp_path):
    """Each trains, and those that keep the numbers keep them to bf16 rounding."""
    wants = {
        "optimizer_offload": "torchao",
        "optim": "bitsandbytes",
        "load_in_4bit": "bitsandbytes",
    }
    for key, library in wants.items():
        if key in keys:
            pytest.importorskip("torchao" if "torch_8bit" in str(keys[key]) else library)
    if "use_liger_kernel" in keys:
        pytest.importorskip("liger_kernel")
    common = {"use_cpu": False, "bf16": True, "learning_rate": 1e-4}
    run(tiny_model, pairs_file, tmp_path / "plain", **common)
    run(tiny_model, pairs_file, tmp_path / "out", **common, **keys)
    plain, found = metrics(tmp_path / "plain"), metrics(tmp_path / "out")
    assert all(math.isfinite(line["loss"]) for line in found)
    if "use_peft" not in keys:
        assert found[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.05)
        for ours, theirs in zip(found, plain, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.02)
