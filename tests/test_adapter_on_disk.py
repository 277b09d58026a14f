"""A LoRA adapter on disk as the model, trained on beside what it was or merged, and as a reference:
the same numbers as TRL's.
"""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from training import assert_close_metrics, assert_resumes, fill, metrics, run, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.trainers.providers import run_trl
from fastdpo import doctor
from fastdpo.config import TrainConfig
from fastdpo.errors import ConfigError, ModelError
from fastdpo.memory.plan import plan
from fastdpo.model.load import load_model, load_model_config, load_tokenizer
from fastdpo.model.load_scorer import load_scorer
from fastdpo.reference import model_fingerprint

CPU = torch.device("cpu")
FILE = "adapter_model.safetensors"
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 3}, "use_rslora": True},
    "head": {"target_modules": ["v_proj", "lm_head"]},
    "saved": {"modules_to_save": ["lm_head"]},
}
# SGD: a step is the gradient itself, where AdamW's first ones are its sign.
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "shuffle": False}


@pytest.fixture(scope="module")
def make(still_model, tmp_path_factory):
    """Adapters that change what the base says, by the keys of peft's configuration."""

    def make(on=still_model, seed=1, **changes):
        keys = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        model = AutoModelForCausalLM.from_pretrained(on)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = LoraConfig(**{**keys, "init_lora_weights": False, **changes})
            adapted = get_peft_model(model, made)
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.05 * torch.randn_like(parameter)
        path = tmp_path_factory.mktemp("adapter")
        adapted.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="module")
def adapter(make):
    return make()


@pytest.fixture
def go(adapter, pairs_file):
    return partial(run, adapter, pairs_file)


def theirs(model, pairs_file, steps=3, **options):
    rows = [json.loads(line) for line in pairs_file.read_text(encoding="utf-8").splitlines()]
    clock = run_trl(rows, model, steps, 6, 6, optim="sgd", learning_rate=0.5, **options)
    return clock.metrics


def close(ours, trl):
    """TRL's metrics step by step; the first loss is that of a policy that is its reference."""
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 1e-2
    for a, b in zip(ours, trl, strict=True):
        for name in ("loss", "logps/chosen", "rewards/rejected", "entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), name
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("precomputed", [True, False], ids=["precomputed", "online"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ranks"])
def test_it_is_trained_on_as_trl_does(still_model, make, pairs_file, tmp_path, kind, precomputed):
    adapter = make(**KINDS[kind])
    keys = {"use_peft": True, "precompute_ref_log_probs": precomputed, **SGD}
    _, said = run(adapter, pairs_file, tmp_path / "out", **keys)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(still_model), adapter, is_trainable=True
    )
    close(
        metrics(tmp_path / "out"),
        theirs(model, pairs_file, precompute_ref_log_probs=precomputed),
    )
    model.save_pretrained(tmp_path / "trl", selected_adapters=["default"])
    start, ours, trl = (weights(p) for p in (adapter, tmp_path / "out", tmp_path / "trl"))
    assert ours.keys() == trl.keys() == start.keys()
    for name, tensor in ours.items():
        moved = (trl[name] - start[name]).norm()
        assert moved > 1e-4 and (tensor - trl[name]).norm() < 1e-3 * moved, name
    assert any(line == f"adapter: {adapter}, trained on" for line in said), said


@pytest.mark.parametrize("precomputed", [True, False], ids=["precomputed", "online"])
def test_merged_it_is_where_full_training_starts(
    still_model, adapter, pairs_file, tmp_path, precomputed
):
    keys = {"precompute_ref_log_probs": precomputed, **SGD}
    run(adapter, pairs_file, tmp_path / "out", **keys)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(still_model), adapter)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(still_model).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    merged.config._name_or_path = str(tmp_path / "merged")
    close(
        metrics(tmp_path / "out"),
        theirs(merged, pairs_file, precompute_ref_log_probs=precomputed),
    )
    start, ours, trl = weights(tmp_path / "merged"), weights(tmp_path / "out"), merged.state_dict()
    for name, tensor in ours.items():
        moved = (trl[name] - start[name]).norm()
        assert moved > 1e-4 and (tensor - trl[name]).norm() < 1e-3 * moved, name
    assert not (tmp_path / "out" / FILE).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_both_references_agree_and_the_output_loads(make, pairs_file, tmp_path, kind):
    """For adapters on the head too, which TRL cannot have."""
    adapter = make(**KINDS[kind])
    common = {"use_peft": True, **SGD, "lora_dropout": 0.0}
    run(adapter, pairs_file, tmp_path / "a", **common)
    run(adapter, pairs_file, tmp_path / "b", **common, precompute_ref_log_probs=False)
    assert_close_metrics(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    tokens = torch.tensor([[5, 9, 7, 3]])
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    other = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "b")
    start = AutoPeftModelForCausalLM.from_pretrained(adapter)
    with torch.no_grad():
        a, b, c = (model(tokens).logits for model in (loaded, other, start))
    assert (a - b).abs().max() < 1e-3 * (a - c).abs().max()
    assert sorted(p.name for p in (tmp_path / "b").iterdir() if p.is_dir()) == []


@pytest.mark.parametrize("precomputed", [True, False], ids=["precomputed", "online"])
def test_a_resumed_run_keeps_the_reference_of_the_start(go, tmp_path, precomputed):
    keys = {"use_peft": True, "precompute_ref_log_probs": precomputed, "lora_dropout": 0.3}
    assert_resumes(go, tmp_path, 3, **keys, max_steps=5)


def test_as_a_reference_it_is_what_peft_computes(still_model, adapter, pairs_file, tmp_path):
    """For full weights and for adapters, precomputed and online, against the merged model."""
    merged = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(still_model).save_pretrained(tmp_path / "merged")
    for peft in ({}, {"use_peft": True, "lora_r": 2, "lora_dropout": 0.0}):
        losses = []
        for reference in (adapter, tmp_path / "merged"):
            for precomputed in (True, False):
                out = tmp_path / f"{len(losses)}{len(peft)}"
                keys = {"precompute_ref_log_probs": precomputed, **SGD, **peft, "max_steps": 1}
                run(still_model, pairs_file, out, ref_model_name_or_path=str(reference), **keys)
                losses.append(metrics(out)[0]["loss"])
        assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
        assert abs(losses[0] - math.log(2)) > 1e-3
    both = {"use_peft": True, "ref_model_name_or_path": str(adapter), **SGD, "max_steps": 1}
    for precomputed in (True, False):
        out = tmp_path / f"both{precomputed}"
        run(adapter, pairs_file, out, **both, precompute_ref_log_probs=precomputed)
        assert metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_on_a_base_in_4_bits(go, tmp_path):
    pytest.importorskip("bitsandbytes")
    keys = {"use_peft": True, "load_in_4bit": True, **SGD}
    go(tmp_path / "a", **keys)
    go(tmp_path / "b", **keys, precompute_ref_log_probs=False)
    assert_close_metrics(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_reference_cache_tells_adapters_apart(still_model, make, adapter, pairs_file, tmp_path):
    def cached(model, **changes):
        return fill(model, pairs_file, tmp_path / "out", **changes)

    for model, keys in [
        (still_model, {}),
        (adapter, {}),
        (adapter, {"use_peft": True}),
        (make(seed=2), {"use_peft": True}),
        (make(seed=2), {}),
        (make(lora_alpha=15), {"use_peft": True}),
    ]:
        assert cached(model, **keys) == (0, 48)
    assert cached(adapter, use_peft=True, lora_dropout=0.2, learning_rate=1.0) == (48, 0)
    assert cached(make(), use_peft=True) == (48, 0)
    assert cached(still_model, use_peft=True) == cached(still_model) == cached(adapter) == (48, 0)


class Backwards(set):
    """A set that is gone through in another order, as in a process with another hash seed."""

    def __iter__(self):
        return iter(sorted(super().__iter__(), reverse=True))


def test_a_set_of_targets_has_one_fingerprint_in_every_process(adapter):
    config = TrainConfig(model_name_or_path=str(adapter), use_peft=True)
    model = load_scorer(config, CPU, None).model
    before = model_fingerprint(model, None, "weights")
    settings = model.peft_config["default"]
    settings.target_modules = Backwards(settings.target_modules)
    assert model_fingerprint(model, None, "weights") == before
    settings.lora_alpha += 1
    assert model_fingerprint(model, None, "weights") != before


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"lora_r": 8}, "lora_r: expected 4, as in .*adapter_config.json, got 8"),
        ({"lora_alpha": 32}, "lora_alpha: expected 16"),
        ({"use_dora": True}, "use_dora: expected False"),
        ({"lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save: expected None"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules: expected down_proj q_proj v_"),
        ({"lora_target_modules": "all-linear"}, "lora_target_modules: expected down_proj q_proj"),
    ],
)
def test_a_setting_that_contradicts_it_is_refused(go, tmp_path, keys, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        go(tmp_path / "out", use_peft=True, **keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / FILE).exists()


def test_settings_that_agree_are_taken_and_written_down(go, adapter, tmp_path):
    same = [".*(q_proj|v_proj|down_proj)"]
    go(
        tmp_path / "out",
        use_peft=True,
        lora_r=4,
        lora_target_modules=same,
        lora_dropout=0.1,
        max_steps=1,
    )
    written = TrainConfig.load(tmp_path / "out" / "training_config.yaml")
    assert (written.lora_r, written.lora_alpha, written.lora_dropout) == (4, 16, 0.1)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (4, 16, 0.1)
    assert "rank 4" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    again = {"model_name_or_path": str(adapter), "output_dir": str(tmp_path / "again")}
    config = TrainConfig.load(tmp_path / "out" / "training_config.yaml")
    run(adapter, config.dataset_name, tmp_path / "again", **{**config.to_dict(), **again})


def test_its_own_tokenizer_comes_before_the_bases(still_model, make, tmp_path):
    adapter = make()
    config = TrainConfig(model_name_or_path=str(adapter))
    tokenizer = load_tokenizer(config)
    assert "mine" not in tokenizer.get_vocab()
    assert load_model_config(config).hidden_size == 32
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(adapter)
    assert load_tokenizer(config).chat_template == "mine"


def test_a_relative_base_is_looked_for_from_here(still_model, make, monkeypatch):
    path = make()
    edit(path, base_model_name_or_path=still_model.name)
    monkeypatch.chdir(still_model.parent)
    assert load_model(TrainConfig(model_name_or_path=str(path)), CPU).config.hidden_size == 32


def test_plan_and_doctor_know_it(adapter, pairs_file):
    keys = {"model_name_or_path": str(adapter), "dataset_name": str(pairs_file), "use_peft": True}
    config = TrainConfig.from_dict({**keys, "use_cpu": True})
    assert plan(config, gpu="rtx4090-24gb")
    text = doctor.report(config)
    assert "M parameters" in text and "shared" in text.rpartition("layout")[2]


def test_one_of_the_hub_is_found_in_its_cache(
    still_model, adapter, pairs_file, tmp_path, monkeypatch
):
    """The hub's cache is a directory of snapshots; nothing is fetched."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--some--adapter"
    shutil.copytree(adapter, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    result, _ = run("some/adapter", pairs_file, tmp_path / "out", use_peft=True, max_steps=1)
    assert result["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert weights(tmp_path / "out").keys() == weights(adapter).keys()


def edit(path, **changes):
    file = path / "adapter_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def cut(path, file=FILE):
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])


def change_weights(path, change):
    from safetensors.torch import save_file

    save_file(change(weights(path)), path / FILE, metadata={"format": "pt"})


def point(path, file):
    (path / file).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\n")


BROKEN = {
    "another method": (lambda p: edit(p, peft_type="IA3"), "peft_type: expected LORA, found IA3"),
    "no method": (lambda p: edit(p, peft_type=None), "peft_type: expected LORA, found None"),
    "a reward model's": (lambda p: edit(p, task_type="SEQ_CLS"), "expected CAUSAL_LM, found SEQ_C"),
    "no base": (lambda p: edit(p, base_model_name_or_path=None), "name of the base, found None"),
    "a base elsewhere": (
        lambda p: edit(p, base_model_name_or_path="/nowhere/model"),
        "adapter_config.json: base_model_name_or_path: there is no directory /nowhere/model",
    ),
    "a relative base": (
        lambda p: edit(p, base_model_name_or_path="./model"),
        r"there is no directory ./model \(looked for in ",
    ),
    "itself as its base": (
        lambda p: edit(p, base_model_name_or_path=str(p)),
        "is an adapter itself; expected a whole model",
    ),
    "a text for its rank": (lambda p: edit(p, r="four"), "_config.json: r: expected a number"),
    "settings cut off": (lambda p: cut(p, "adapter_config.json"), "config.json: is not valid JSON"),
    "settings of Git LFS": (lambda p: point(p, "adapter_config.json"), "a pointer of Git LFS"),
    "no weights": (lambda p: (p / FILE).unlink(), f"{FILE}: is missing"),
    "pickled weights": (
        lambda p: (p / FILE).rename(p / "adapter_model.bin"),
        "only safetensors are loaded, not adapter_model.bin",
    ),
    "weights cut off": (cut, f"{FILE}: is cut off or damaged"),
    "weights of Git LFS": (lambda p: point(p, FILE), f"{FILE}: is a pointer of Git LFS"),
    "a layer short": (
        lambda p: change_weights(p, lambda w: {k: v for k, v in w.items() if "layers.1" not in k}),
        f"{FILE}: lacks 6 weights of the adapter",
    ),
    "a layer more": (
        lambda p: change_weights(
            p, lambda w: {**w, **{k.replace("layers.1", "layers.7"): v + 0 for k, v in w.items()}}
        ),
        "6 weights have no place on .*, so it was made for another model: .*layers.7",
    ),
    "of another width": (
        lambda p: change_weights(p, lambda w: {k: torch.zeros(4, 4) for k in w}),
        "does not fit .* size mismatch for",
    ),
    "of another rank": (lambda p: edit(p, r=2), "does not fit .* size mismatch for"),
    "of another architecture": (
        lambda p: edit(p, target_modules=["c_attn"]),
        "does not fit .*arget modules .*c_attn",
    ),
    "a whole model beside it": (
        lambda p: (p / "model.safetensors").write_bytes((p / FILE).read_bytes()),
        "holds a whole model and an adapter",
    ),
}


@pytest.mark.parametrize("peft", [True, False], ids=["trained", "merged"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_one_line(adapter, pairs_file, tmp_path, name, peft):
    broken, expected = BROKEN[name]
    path = tmp_path / "adapter"
    shutil.copytree(adapter, path)
    broken(path)
    with pytest.raises(ModelError, match=expected) as caught:
        run(path, pairs_file, tmp_path / "out", use_peft=peft)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=expected):
        run(adapter, pairs_file, tmp_path / "b", use_peft=peft, ref_model_name_or_path=str(path))


def test_one_that_changes_a_tied_head_is_not_merged(make, tied_model):
    """Merged, the embedding would change with the head."""
    for changes in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        config = TrainConfig(model_name_or_path=str(make(on=tied_model, **changes)))
        with pytest.raises(ModelError, match=r"its head is the embedding too.*set use_peft"):
            load_model(config, CPU)
