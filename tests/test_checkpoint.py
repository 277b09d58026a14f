"""A resumed run equals one that was never interrupted, bit for bit; a damaged checkpoint is never
trusted.
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from training import assert_same_weights, metrics, run

from bench.kill.processes import Kill
from bench.kill.trials import Trials
from fastdpo import files
from fastdpo.errors import CheckpointError, FastDPOError
from fastdpo.training import checkpoint


@pytest.fixture
def go(tiny_model, pairs_file):
    return partial(run, tiny_model, pairs_file)


ADAPTER = {
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0.3,
    "lora_target_modules": ["q_proj", "down_proj"],
}


@pytest.mark.parametrize("changes", [{}, ADAPTER, {"optim": "sgd"}], ids=["full", "lora", "sgd"])
def test_a_resumed_run_equals_an_uninterrupted_one(go, tmp_path, changes):
    common = {"max_steps": 7, "logging_steps": 3, "warmup_steps": 2, **changes}
    go(tmp_path / "whole", **common)
    go(tmp_path / "cut", **common, save_strategy="steps", save_steps=4)
    for left in ("model.safetensors", "adapter_model.safetensors", "metrics.jsonl"):
        (tmp_path / "cut" / left).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "cut" / "checkpoint-7")
    torch.manual_seed(99)
    _, said = go(tmp_path / "cut", **common, resume_from_checkpoint=True)
    assert any("resumed at step 4" in line for line in said)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    timed = {"tokens_per_second", "pairs_per_second", "peak_memory_mib"}
    for a, b in zip(metrics(tmp_path / "whole")[1:], metrics(tmp_path / "cut"), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }


KILLS = [
    Kill(place="reference: write", half=True),
    Kill(place="starting: os.rename .fastdpo-trainer_state.json"),
    Kill(place="saving: write optimizer.safetensors", half=True),
    Kill(place="evaluating: open metrics.jsonl", half=True),
    Kill(place="rotating: os.rmdir"),
    Kill(place="final save: os.rename adapter_model.safetensors"),
]


def test_a_run_killed_at_six_places_ends_as_an_undisturbed_one(tmp_path):
    """`bench.kill` draws the places at random, for full weights too."""
    short = {"max_steps": 6, "save_steps": 2, "save_total_limit": 1, "eval_steps": 3}
    row = Trials(tmp_path, short).trial("lora", KILLS)
    assert [kill["phase"] for kill in row["kills"]] == [k.place.split(":")[0] for k in KILLS]
    assert row["differs"] == []


@pytest.fixture
def saved(go, tmp_path):
    """A finished run with checkpoints 2 and 4."""
    go(tmp_path / "out", save_strategy="steps", save_steps=2)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-9]), "bytes where"),
        ("optimizer.safetensors", lambda f: f.unlink(), "is missing"),
        ("manifest.json", lambda f: f.unlink(), "is incomplete"),
        (
            "rng.safetensors",
            lambda f: f.write_bytes(f.read_bytes()[:-1] + b"\x07"),
            "digest differs",
        ),
    ],
    ids=["truncated", "missing", "incomplete", "changed"],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(go, saved, file, damage, message):
    damage(saved / "checkpoint-4" / file)
    with pytest.raises(CheckpointError, match=message) as raised:
        go(saved, max_steps=6, resume_from_checkpoint=str(saved / "checkpoint-4"))
    assert "checkpoint-4" in str(raised.value) and file in str(raised.value)
    _, said = go(saved, max_steps=6, resume_from_checkpoint=True)
    assert any("resumed at step 2" in line for line in said)


def test_a_checkpoint_of_another_run_is_refused(go, saved, tmp_path):
    path = str(saved / "checkpoint-2")
    allowed = {"resume_from_checkpoint": path, "resume_with_changes": True}
    with pytest.raises(CheckpointError, match="holds no adapter"):
        go(tmp_path / "c", use_peft=True, **allowed)
    with pytest.raises(CheckpointError, match="another optimizer"):
        go(tmp_path / "d", optim="sgd", **allowed)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        go(tmp_path / "e", resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_another_budget_may_resume(go, saved, tmp_path):
    go(tmp_path / "b", resume_from_checkpoint=str(saved / "checkpoint-2"), max_tokens_per_batch=60)
    for ours, theirs in zip(metrics(tmp_path / "b"), metrics(saved)[2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_a_model_saved_alone_cannot_be_resumed(go, tmp_path):
    go(tmp_path / "out", save_strategy="steps", save_steps=2, save_only_model=True)
    with pytest.raises(CheckpointError, match="save_only_model"):
        go(tmp_path / "out", resume_from_checkpoint=True, max_steps=6)


def test_a_full_disk_leaves_the_checkpoints_that_were_there(go, saved, monkeypatch):
    before = sorted(p.name for p in saved.iterdir())

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(FastDPOError, match="disk is full"):
        go(saved, max_steps=6, resume_from_checkpoint=True, save_strategy="steps", save_steps=1)
    assert sorted(p.name for p in saved.iterdir()) == before
    assert checkpoint.damage(saved / "checkpoint-4") is None


def test_atomic_files_appear_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_file(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RuntimeError), files.atomic_directory(tmp_path / "d") as path:
        (path / "x").write_text("half")
        raise RuntimeError
    assert len(list(tmp_path.iterdir())) == 1


def test_rotation_keeps_the_newest(tmp_path):
    manifest = json.dumps({"config.json": {"bytes": 2, "xxh3_128": "0"}})
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoint.MANIFEST).write_text(manifest)
    checkpoint.rotate(tmp_path, None, 100)
    assert len(list(tmp_path.iterdir())) == 3
    checkpoint.rotate(tmp_path, 2, 100)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_a_damaged_later_checkpoint_does_not_count_as_kept(go, saved, monkeypatch):
    """Resumed before it, the run must not remove the only whole ones for it."""
    (saved / "checkpoint-4" / "rng.safetensors").unlink()
    keys = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 6}
    save = checkpoint.save_checkpoint

    def stopping(path, **named):
        if path.name == "checkpoint-4":
            raise KeyboardInterrupt
        save(path, **named)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "save_checkpoint", stopping)
        go(saved, **keys, resume_from_checkpoint=True)
    assert checkpoint.damage(saved / "checkpoint-3") is None
    go(saved, **keys, resume_from_checkpoint=True)
    assert [p.name for p in checkpoint.checkpoints(saved)] == ["checkpoint-6"]


def test_what_a_kill_during_a_rotation_leaves_goes(go, saved):
    (saved / "checkpoint-1").mkdir()
    keys = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    (saved / "README.md").unlink()  # killed between the last save and the end of its rotation
    go(saved, **keys, resume_from_checkpoint=True)
    assert [p.name for p in checkpoint.checkpoints(saved)] == ["checkpoint-4"]
    (saved / "checkpoint-1").mkdir()
    go(saved, max_steps=1, overwrite_output_dir=True)
    assert checkpoint.checkpoints(saved) == []


def test_a_checkpoint_takes_the_place_of_another_but_not_of_other_files(go, saved):
    (saved / "checkpoint-4" / "notes.txt").write_text("mine")
    go(saved, overwrite_output_dir=True, save_strategy="steps", save_steps=4)
    assert (saved / "checkpoint-4" / "notes.txt").read_text() == "mine"
    assert checkpoint.damage(saved / "checkpoint-4") is None
    _, said = go(saved, max_steps=5, resume_from_checkpoint=True)
    assert any("resumed at step 4" in line for line in said)


def test_a_run_resumed_after_its_last_step_writes_the_same_log_and_card(go, tmp_path, pairs_file):
    out = tmp_path / "out"
    keys = {"save_strategy": "steps", "save_steps": 2, "logging_first_step": True}
    keys |= {"logging_steps": 3, "do_eval": True, "eval_dataset_name": str(pairs_file)}
    result, _ = go(out, **keys)
    lines, card = metrics(out), (out / "README.md").read_text()
    assert [row["step"] for row in lines] == [1, 3, 4, 4] and "eval_loss" in lines[-1]
    (out / "model.safetensors").unlink()  # killed during the last save
    again, _ = go(out, **keys, resume_from_checkpoint=True)
    assert metrics(out) == lines and (out / "README.md").read_text() == card
    assert "| eval_loss |" in card and again == result
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    go(out, **keys, resume_from_checkpoint=True)
    assert [row["step"] for row in metrics(out)] == [1, 3, 4, 4]


def test_weights_of_two_models_never_lie_together(go, saved, monkeypatch):
    """Killed at any move of the last save, a directory with weights is one whole model."""
    seen = []
    replace = os.replace

    def watched(source, target):
        if Path(target).parent == saved and "model-" in str(source):
            new = {f.name for f in Path(source).parent.iterdir()}
            seen.append((Path(target).name, (saved / "model.safetensors").exists(), len(new)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    go(saved, max_steps=6, resume_from_checkpoint=True)
    assert seen[-1][0] == "model.safetensors" and seen[-1][2] == 1
    assert len(seen) > 3 and not any(weights for _, weights, _ in seen)


def test_a_lock_ends_with_its_process_though_a_child_lives_on(tmp_path):
    context = multiprocessing.get_context("fork")
    holding, ended = context.Event(), context.Event()

    def hold():
        with files.locked(tmp_path):
            context.Process(target=ended.wait, args=(60,)).start()
            holding.set()
            os.kill(os.getpid(), signal.SIGKILL)

    process = context.Process(target=hold)
    process.start()
    process.join()
    assert holding.is_set()
    with files.locked(tmp_path):
        pass
    ended.set()
