"""Nothing of an earlier run is deleted, overwritten or continued by mistake."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import xxhash
from fastdpo_kernels import LOSSES
from training import assert_same_weights, metrics, run, settings
from transformers import AutoModelForCausalLM

from fastdpo import files
from fastdpo.config import TrainConfig
from fastdpo.errors import CheckpointError, ConfigError, FastDPOError
from fastdpo.training import checkpoint
from fastdpo.training.changes import COMPARED, FIXED, FOLLOWED

LORA = {
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "down_proj"],
}


@pytest.fixture
def go(tiny_model, pairs_file):
    return partial(run, tiny_model, pairs_file)


@pytest.fixture(scope="module")
def finished(request, tiny_model, pairs_file, tmp_path_factory):
    """A finished run with checkpoints 2 and 4, not to be changed, and its keys."""
    path = tmp_path_factory.mktemp("finished") / "out"
    keys = {"save_strategy": "steps", "save_steps": 2}
    keys |= LORA if getattr(request, "param", "full") == "lora" else {}
    run(tiny_model, pairs_file, path, **keys)
    return path, keys


both = pytest.mark.parametrize("finished", ["full", "lora"], indirect=True)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of a finished run, and its keys."""
    path, keys = finished
    return Path(shutil.copytree(path, tmp_path / "out")), dict(keys)


def content(folder: Path) -> dict[str, str]:
    """Every file below a directory, with its digest and time of change."""
    return {
        str(file.relative_to(folder)): f"{xxhash.xxh3_128_hexdigest(file.read_bytes())} "
        f"{file.stat().st_mtime_ns}"
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "reference" not in file.parts
    }


def fails_untouched(go, path, error, message, **changes):
    """The run stops with this error; all but the reference cache beside `path` is as it was."""
    before = content(path.parent)
    with pytest.raises(error, match=message) as raised:
        go(path, **changes)
    assert content(path.parent) == before
    return str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dataset_name": "no/where/pairs.jsonl"}, "not found"),
        ({"model_name_or_path": "./nowhere"}, "does not exist"),
        ({"ref_model_name_or_path": "./nowhere"}, "does not exist"),
        ({"loss_type": ["nan"]}, "step 1: loss is nan"),
    ],
    ids=["data", "model", "reference", "first step"],
)
def test_overwriting_waits_for_the_first_step(go, copy, monkeypatch, wrong, message):
    def nan(pairs, *, beta, label_smoothing):
        return pairs.margins * math.nan

    monkeypatch.setitem(LOSSES, "nan", nan)
    path, keys = copy
    keys = keys | {"overwrite_output_dir": True} | wrong
    fails_untouched(go, path, FastDPOError, message, **keys)


def test_an_evaluation_at_the_start_waits_too(go, copy, pairs_file, monkeypatch):
    def nan(pairs, *, beta, label_smoothing):
        return pairs.margins * (math.nan if torch.is_grad_enabled() else 1.0)

    monkeypatch.setitem(LOSSES, "nan", nan)
    path, keys = copy
    keys = keys | {"eval_on_start": True, "eval_dataset_name": str(pairs_file)}
    keys |= {"loss_type": ["nan"], "overwrite_output_dir": True}
    fails_untouched(go, path, FastDPOError, "step 1: loss is nan", **keys)


def test_a_directory_made_for_a_run_that_fails_goes_again(go, tmp_path):
    with pytest.raises(FastDPOError, match="not found"):
        go(tmp_path / "a" / "b", dataset_name="no/where/pairs.jsonl")
    assert not (tmp_path / "a").exists()


@both
def test_overwriting_removes_what_a_run_wrote_and_nothing_else(go, copy):
    path, _ = copy
    (path / "notes.txt").write_text("mine")
    (path / "checkpoint-4" / "notes.txt").write_text("mine too")
    adapter = (path / "adapter_model.safetensors").exists()
    go(path, max_steps=2, overwrite_output_dir=True, **({} if adapter else LORA))
    assert (path / "notes.txt").read_text() == "mine"
    assert [f.name for f in (path / "checkpoint-4").iterdir()] == ["notes.txt"]
    assert not (path / "checkpoint-2").exists() and len(metrics(path)) == 2
    assert (path / "adapter_model.safetensors").exists() != adapter
    assert (path / "model.safetensors").exists() == adapter


def test_what_a_run_reads_is_not_overwritten(go, tmp_path, tiny_model, pairs_file):
    out = tmp_path / "out"
    go(out, save_strategy="steps", save_steps=2)
    inside = out / "data.jsonl"
    inside.write_bytes(pairs_file.read_bytes())
    link = tmp_path / "link"
    link.mkdir()
    for file in out.iterdir():
        if file.is_file():
            (link / file.name).symlink_to(file)
    refused = partial(fails_untouched, go, out, ConfigError, overwrite_output_dir=True)
    for changes in (
        {"model_name_or_path": str(out)},
        {"model_name_or_path": str(out / "checkpoint-2")},
        {"model_name_or_path": str(link)},
        {"ref_model_name_or_path": str(out / "checkpoint-4")},
    ):
        text = refused("which this run writes over", **changes)
        assert next(iter(changes)) in text
    adapter = tmp_path / "adapter"
    go(adapter, model_name_or_path=str(out), max_steps=1, **LORA)
    text = refused("which this run writes over", model_name_or_path=str(adapter))
    assert str(out) in text
    with pytest.raises(ConfigError, match="cannot go with resume_from_checkpoint"):
        go(out, overwrite_output_dir=True, resume_from_checkpoint=str(out / "checkpoint-2"))
    go(tmp_path / "next", model_name_or_path=str(out), max_steps=1)
    resumed = {"model_name_or_path": str(out / "checkpoint-2"), "resume_from_checkpoint": True}
    message = "which this run writes over"
    fails_untouched(go, out, ConfigError, message, **resumed, resume_with_changes=True, max_steps=6)
    go(out, dataset_name=str(inside), max_steps=1, overwrite_output_dir=True)
    assert inside.read_bytes() == pairs_file.read_bytes()


def test_a_model_beside_its_own_run_can_be_trained_on(go, tmp_path, tiny_model):
    out = tmp_path / "out"
    shutil.copytree(tiny_model, out / "base")
    keys = {"model_name_or_path": str(out / "base"), "save_strategy": "steps", "save_steps": 2}
    go(out, **keys)
    go(out, **keys | {"max_steps": 5}, resume_from_checkpoint=True)
    assert (out / "base" / "model.safetensors").exists() and len(metrics(out)) == 5


def test_a_linked_checkpoint_stays_where_it_leads(go, copy, tmp_path):
    path, keys = copy
    (path / "checkpoint-2").rename(tmp_path / "kept")
    (path / "checkpoint-2").symlink_to(tmp_path / "kept")
    go(path, **keys | {"max_steps": 6, "save_total_limit": 1}, resume_from_checkpoint=True)
    assert checkpoint.damage(tmp_path / "kept") is None
    message = "holds checkpoint-2, which no run of fastdpo wrote"
    fails_untouched(go, path, ConfigError, message, overwrite_output_dir=True)


def test_a_resumed_run_computes_in_the_checkpoints_precision(go, copy, monkeypatch):
    path, keys = copy
    keys |= {"bf16": None, "max_steps": 5, "resume_from_checkpoint": True}
    monkeypatch.setattr("fastdpo.model.precision.cpu_bf16_is_faster", lambda: (True, "faster"))
    _, said = go(path, **keys)
    assert any(line.startswith("precision: float32 on cpu") for line in said)


def test_another_trainers_checkpoint_is_not_written_over(go, copy):
    path, keys = copy
    (path / "checkpoint-6").mkdir()
    (path / "checkpoint-6" / "model.safetensors").write_bytes(b"theirs")
    (path / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": 6}')
    keys |= {"resume_from_checkpoint": True, "max_steps": 6}
    fails_untouched(go, path, ConfigError, "holds checkpoint-6, which no run", **keys)


@pytest.mark.parametrize("way", ["overwrite_output_dir", "resume_from_checkpoint", None])
@pytest.mark.parametrize("held", ["model", "README.md", "tokenizer.model"])
def test_what_no_run_wrote_is_not_written_over(go, tmp_path, tiny_model, way, held):
    out = tmp_path / "out"
    if held == "model":
        AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(out)
    else:
        out.mkdir()
        (out / held).write_text("mine")
    keys = {way: True} if way else {}
    text = fails_untouched(go, out, ConfigError, "no run of fastdpo wrote", **keys)
    assert held in text or "config.json" in text


def test_files_of_the_users_own_are_no_obstacle(go, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("beta: 0.2")
    (out / "log.txt").write_text("log")
    go(out, max_steps=1)
    assert (out / "config.yaml").read_text() == "beta: 0.2"


def test_a_finished_run_says_so_and_stays(go, copy):
    path, keys = copy
    for changes in ({}, {"logging_steps": 2}, {"save_strategy": "no"}):
        before = content(path)
        result, said = go(path, **(keys | changes), resume_from_checkpoint=True)
        assert (
            said[-1]
            == f"{path}: the run with these keys is finished (step 4), nothing is left to do"
        )
        assert result == {"output_dir": str(path)} and content(path) == before
    for step in (2, 4):
        checkpoint.remove(path / f"checkpoint-{step}")
    keys["max_steps"] = 6
    message = "is finished .step 4. and holds no checkpoint to go on from"
    fails_untouched(go, path, CheckpointError, message, resume_from_checkpoint=True, **keys)


def test_a_finished_model_is_not_trained_anew_for_a_file_that_is_gone(go, tmp_path):
    out = tmp_path / "out"
    go(out, max_steps=1)
    (out / "README.md").unlink()
    message = r"is finished \(step 1\), lacks README.md and holds no checkpoint"
    for steps in (1, 2):
        fails_untouched(
            go, out, CheckpointError, message, max_steps=steps, resume_from_checkpoint=True
        )


@both
def test_a_run_killed_before_its_last_save_is_finished_by_its_checkpoint(go, finished, copy):
    path, keys = copy
    file = "adapter_model.safetensors" if "use_peft" in keys else "model.safetensors"
    (path / file).unlink()
    go(path, **keys, resume_from_checkpoint=True)
    assert_same_weights(path, finished[0])
    assert [row["step"] for row in metrics(path)] == [1, 2, 3, 4]


def test_nothing_to_resume(go, tmp_path):
    _, said = go(tmp_path / "out", max_steps=1, resume_from_checkpoint=True)
    assert any("holds no checkpoint, starting at step 0" in line for line in said)


def test_checkpoints_that_are_all_broken_are_named(go, copy):
    path, keys = copy
    (path / "checkpoint-2" / "rng.safetensors").unlink()
    (path / "checkpoint-4" / checkpoint.MANIFEST).write_text("{")
    message = "no checkpoint is whole"
    keys["max_steps"] = 6
    text = fails_untouched(go, path, CheckpointError, message, resume_from_checkpoint=True, **keys)
    assert "checkpoint-2: rng.safetensors is missing" in text
    assert "checkpoint-4: manifest.json is missing or no JSON" in text


@both
def test_an_older_checkpoint_goes_on_elsewhere(go, copy, tmp_path):
    path, keys = copy
    start = str(path / "checkpoint-2")
    message = "holds checkpoint-4 after checkpoint-2"
    fails_untouched(go, path, ConfigError, message, resume_from_checkpoint=start, **keys)
    go(tmp_path / "other", max_steps=1)
    message = "holds another run than"
    other = tmp_path / "other"
    fails_untouched(go, other, ConfigError, message, resume_from_checkpoint=start, **keys)
    go(tmp_path / "new", resume_from_checkpoint=start, **keys)
    assert_same_weights(path, tmp_path / "new")


SCHEDULES = [
    {"learning_rate": 2e-3},
    {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    {"max_steps": 8},
    {
        "max_steps": 8,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
    },
]


@pytest.mark.parametrize("changes", SCHEDULES, ids=lambda changes: " ".join(changes))
def test_a_new_schedule_holds_from_the_next_step_on(go, copy, tmp_path, changes):
    path, keys = copy
    keys_before = TrainConfig.from_dict(settings(path, path, path, **keys)).to_dict()
    keys = keys | {"save_strategy": "no"} | changes
    go(tmp_path / "new", **keys)
    if "max_steps" not in changes:
        checkpoint.remove(path / "checkpoint-4")
    _, said = go(path, **keys, resume_from_checkpoint=True)
    step = 4 if "max_steps" in changes else 2
    (line,) = [line for line in said if line.startswith(f"changed from step {step + 1} on: ")]
    assert all(f"{name} {keys_before[name]} (now {changes[name]})" in line for name in changes)
    rates = [row["learning_rate"] for row in metrics(path)]
    assert rates[step:] == [row["learning_rate"] for row in metrics(tmp_path / "new")][step:]
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight_decay", 0.5), ("adam_beta1", 0.5), ("adam_epsilon", 1e-2), ("max_grad_norm", 1e-3)],
)
def test_what_the_optimizer_is_told_holds_from_the_next_step_on(go, copy, tmp_path, name, value):
    path, keys = copy
    checkpoint.remove(path / "checkpoint-4")
    start = str(path / "checkpoint-2")
    go(tmp_path / "same", **keys, resume_from_checkpoint=start)
    _, said = go(tmp_path / "other", **keys, resume_from_checkpoint=start, **{name: value})
    assert any(line.startswith("changed from step 3 on: " + name) for line in said)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "same", tmp_path / "other")


OTHERS = {
    "beta": 0.2,
    "loss_type": ["hinge"],
    "label_smoothing": 0.1,
    "max_length": 40,
    "dtype": "bfloat16",
    "seed": 1,
    "shuffle": False,
    "optim": "sgd",
    "bf16": True,
    "per_device_train_batch_size": 4,
    "use_peft": None,
    "lora_r": 8,
    "lora_alpha": 64,
    "lora_target_modules": ["q_proj"],
}


@pytest.mark.parametrize(
    ("finished", "name"),
    [("lora" if "lora" in name else "full", name) for name in OTHERS] + [("lora", "use_peft")],
    indirect=["finished"],
)
def test_what_decides_the_training_stays(go, copy, tmp_path, name):
    path, keys = copy
    value = OTHERS[name] if name != "use_peft" else "use_peft" not in keys
    keys = keys | {name: value, "resume_from_checkpoint": str(path / "checkpoint-2")}
    text = fails_untouched(
        go, tmp_path / "new", CheckpointError, "checkpoint-2 was made with", **keys
    )
    before = {"beta": "0.1", "seed": "42", "lora_r": "4", "bf16": "False"}.get(name, "")
    assert f"{name} {before}" in text and f"(now {value})" in text
    assert "set resume_with_changes: true" in text
    keys |= {"resume_with_changes": True}
    if name in ("use_peft", "lora_r", "lora_target_modules", "optim"):
        fails_untouched(go, tmp_path / "new", CheckpointError, "checkpoint-2: ", **keys)
    else:
        _, said = go(tmp_path / "new", **keys)
        assert any(f"{name} {before}" in line for line in said if "changed from" in line)


@both
def test_another_reference_or_other_data_are_no_accident(
    go, copy, tmp_path, tiny_model, pairs_file
):
    path, keys = copy
    keys = keys | {"resume_from_checkpoint": str(path / "checkpoint-2")}
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(other)
    go(tmp_path / "moved", ref_model_name_or_path=str(other), **keys)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(other)
    refused = partial(fails_untouched, go, tmp_path / "new", CheckpointError)
    for online in ({}, {"precompute_ref_log_probs": False}):
        text = refused("other reference model", ref_model_name_or_path=str(other), **online, **keys)
        assert f"ref_model_name_or_path None (now {other})" in text
    lines = pairs_file.read_text(encoding="utf-8").splitlines()[:-1]
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("\n".join(lines), encoding="utf-8")
    text = refused("other data", dataset_name=str(shorter), **keys)
    assert f"dataset_name {pairs_file} (now {shorter})" in text


def test_the_same_in_another_notation_is_no_change(go, copy, tmp_path):
    path, keys = copy
    start = path / "checkpoint-2"
    same = {"data_seed": 42, "loss_weights": [1.0], "max_steps": 2}
    _, said = go(tmp_path / "new", **keys | same, resume_from_checkpoint=str(start))
    assert not any("data_seed" in line or "loss_weights" in line for line in said)


@pytest.mark.parametrize("finished", ["lora"], indirect=True)
def test_the_order_of_modules_is_no_change(go, copy, tmp_path):
    path, keys = copy
    keys |= {"lora_target_modules": ["down_proj", "q_proj"], "max_steps": 2}
    go(tmp_path / "new", **keys, resume_from_checkpoint=str(path / "checkpoint-2"))


def test_every_key_is_sorted_by_what_a_resumed_run_does_with_it():
    """A new key has to be put into one of the lists of training/changes.py, or into this one."""
    free = [
        "trust_remote_code",
        "attn_implementation",
        "use_liger_kernel",
        "dataset_test_split",
        "dataset_num_proc",
        "precompute_ref_log_probs",
        "eval_dataset_name",
        "share_prefix",
        "max_tokens_per_batch",
        "attention_backend",
        "head_workspace_mib",
        "reference_cache_dir",
        "profile_steps",
        "bnb_4bit_quant_storage",
        "memory",
        "gradient_checkpointing",
        "gradient_checkpointing_every",
        "activation_offloading",
        "layer_tile_tokens",
        "optimizer_offload",
        "optimizer_in_backward",
        "tf32",
        "torch_compile",
        "use_cpu",
        "devices",
        "data_parallel",
        "dp_replicate_size",
        "cp_size",
        "head_parallel",
        "ddp_timeout",
        "do_eval",
        "eval_strategy",
        "eval_steps",
        "eval_on_start",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "early_stopping_patience",
        "early_stopping_threshold",
        "project",
        "logging_dir",
        "trackio_space_id",
        "trackio_bucket_id",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
        "per_device_eval_batch_size",
        "logging_steps",
        "logging_first_step",
        "report_to",
        "run_name",
        "report",
        "report_samples",
        "check_data",
        "disable_tqdm",
        "dataset_streaming",
        "output_dir",
        "overwrite_output_dir",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_only_model",
        "resume_from_checkpoint",
        "resume_with_changes",
    ]
    sorted_keys = [*FIXED, *FOLLOWED, *COMPARED, *free]
    assert sorted(sorted_keys) == sorted(TrainConfig.key_fields())


def test_one_run_at_a_time(go, copy):
    path, keys = copy
    with files.locked(path):
        message = "another run is writing to"
        fails_untouched(go, path, ConfigError, message, overwrite_output_dir=True, **keys)
    go(path, max_steps=1, overwrite_output_dir=True)


@pytest.mark.parametrize("left", ["nothing", "another run"])
@pytest.mark.parametrize("call", [1, 4, 5], ids=["first step", "third step", "last step"])
def test_a_directory_that_is_replaced_belongs_to_another_run(
    go, finished, tmp_path, monkeypatch, left, call
):
    """The second call of the loss is the one that tells what the first step's is expected to be."""
    path, keys = finished
    out, sigmoid, calls = tmp_path / "out", LOSSES["sigmoid"], []
    before: dict[str, str] = {}

    def replacing(pairs, **options):
        calls.append(pairs)
        if len(calls) == call:
            out.rename(tmp_path / "moved")
            if left == "another run":
                shutil.copytree(path, out)
                before.update(content(out))
        return sigmoid(pairs, **options)

    monkeypatch.setitem(LOSSES, "replacing", replacing)
    with pytest.raises(ConfigError, match="was moved, removed or replaced"):
        go(out, **keys, loss_type=["replacing"])
    assert (content(out) if out.exists() else {}) == before


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = "import sys, time; from pathlib import Path; from fastdpo.files import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], env=env, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError), files.locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    with files.locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_go(go, copy):
    path, keys = copy
    (path / ".fastdpo-checkpoint-3-abc").mkdir()
    (path / ".fastdpo-checkpoint-3-abc" / "model.safetensors").write_text("half")
    (path / ".fastdpo-metrics.jsonl-x").write_text("half")
    go(path, **(keys | {"max_steps": 5}), resume_from_checkpoint=True)
    assert not list(path.glob(".fastdpo*"))


class Refusing:
    """Lets `allowed` calls that change the disk pass and refuses every later one."""

    def __init__(self, allowed: int, code: int) -> None:
        self.left, self.code = allowed, code

    def wrap(self, function):
        def called(*args, **kwargs):
            if function is open and not set(kwargs.get("mode", (args + ("r",) * 2)[1])) & set(
                "wax+"
            ):
                return function(*args, **kwargs)
            self.left -= 1
            if self.left < 0:
                raise OSError(self.code, os.strerror(self.code), str(args[0]))
            return function(*args, **kwargs)

        return called


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_refuses_at_any_moment(go, tmp_path, monkeypatch, code):
    """From some call on, all that change the disk fail: one line, and the run can be resumed."""
    keys = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    go(tmp_path / "whole", **keys)
    out, allowed, failures = tmp_path / "out", 0, 0
    places = ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "unlink"), (os, "mkdir"))
    while True:
        refusing = Refusing(allowed, code)
        with monkeypatch.context() as patched:
            for module, name in places:
                patched.setattr(module, name, refusing.wrap(getattr(module, name)))
            patched.setattr(checkpoint, "save_file", refusing.wrap(checkpoint.save_file))
            try:
                go(out, **keys, resume_from_checkpoint=True)
                break
            except FastDPOError as error:
                failures += 1
                assert "\n" not in str(error) and str(tmp_path) in str(error)
        saved = checkpoint.checkpoints(out)
        whole = [path for path in saved if checkpoint.damage(path) is None]
        assert not saved or whole
        allowed += 7
    assert failures > 5
    assert_same_weights(out, tmp_path / "whole")
    assert json.loads((out / "trainer_state.json").read_text())["finished"]
