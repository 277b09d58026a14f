"""A resumed run equals one that was never interrupted, bit for bit; a damaged checkpoint is never
trusted.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from training import metrics, run, settings, weights

from fastdpo import files
from fastdpo.errors import CheckpointError, FastDPOError
from fastdpo.train import checkpoint


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
    file = "adapter_model.safetensors" if "use_peft" in changes else "model.safetensors"
    for left in ("model.safetensors", file, "metrics.jsonl"):
        (tmp_path / "cut" / left).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "cut" / "checkpoint-7")
    torch.manual_seed(99)
    _, said = go(tmp_path / "cut", **common, resume_from_checkpoint=True)
    assert any("resumed at step 4" in line for line in said)
    whole, cut = weights(tmp_path / "whole", file), weights(tmp_path / "cut", file)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    timed = {"tokens_per_second", "pairs_per_second", "peak_memory_mib"}
    for a, b in zip(metrics(tmp_path / "whole")[1:], metrics(tmp_path / "cut"), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }


def test_a_killed_process_is_resumed_bit_for_bit(go, tmp_path, tiny_model, pairs_file):
    common = {"max_steps": 14, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    go(tmp_path / "whole", **{**common, "save_strategy": "no"})
    config = tmp_path / "config.json"
    values = settings(tiny_model, pairs_file, tmp_path / "killed", **common)
    config.write_text(json.dumps({**values, "resume_from_checkpoint": True}), encoding="utf-8")
    code = (
        "import json, sys; from fastdpo.config import TrainConfig; "
        "from fastdpo.train.run import train;"
        "train(TrainConfig.from_dict(json.load(open(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(config)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list((tmp_path / "killed").glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    subprocess.run(command, env=env, check=True, capture_output=True)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert [row["step"] for row in metrics(tmp_path / "killed")] == list(range(1, 15))


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
