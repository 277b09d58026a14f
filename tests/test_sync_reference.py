"""A reference that moves towards the policy (TR-DPO): as in TRL's own trainers, and resumed."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import assert_resumes, metrics, run, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.jsonl import read_rows
from bench.trainers.providers import run_fastdpo, run_trl
from bench.trainers.with_trl import trl_keys
from fastdpo import TrainConfig, train
from fastdpo.errors import CheckpointError, ConfigError

EVERY_OTHER = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.7}
SAVED = "reference.safetensors"


@pytest.fixture(scope="module")
def pairs(pairs_file: Path) -> list[dict[str, Any]]:
    return read_rows(pairs_file)


@pytest.fixture
def go(tiny_model, pairs_file):
    return partial(run, tiny_model, pairs_file)


def labelled(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both responses of each pair as rows of their own."""
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_every_step_agrees_with_trl(pairs, still_model, loss_type):
    rows = pairs if loss_type == "sigmoid" else labelled(pairs)
    keys = {"learning_rate": 1e-3, **EVERY_OTHER}
    go = partial(run_trl, rows, still_model, 6, 6, 6, precompute_ref_log_probs=False)
    theirs = go(**trl_keys(loss_type), **keys).metrics
    still = go(**trl_keys(loss_type), learning_rate=1e-3).metrics
    ours = run_fastdpo(rows, still_model, 6, 6, 0, loss_type=[loss_type], **keys).metrics
    assert theirs[-1]["loss"] != pytest.approx(still[-1]["loss"], abs=1e-3), "nothing has moved"
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("step", [3, 4])
def test_it_resumes_with_the_reference_as_it_was(go, tmp_path, step):
    start = assert_resumes(go, tmp_path, step, max_steps=6, **EVERY_OTHER)
    moved, policy = load_file(start / SAVED), load_file(start / "model.safetensors")
    assert moved.keys() == policy.keys()
    assert not any(torch.equal(moved[name], policy[name]) for name in moved if "proj" in name)
    assert not (tmp_path / "whole" / SAVED).exists()


def test_a_tied_model_is_moved_once(tied_model, pairs_file, tmp_path):
    go = partial(run, tied_model, pairs_file)
    assert_resumes(go, tmp_path, 2, ref_model_name_or_path=str(tied_model), **EVERY_OTHER)


def test_a_run_that_moves_no_reference_saves_none(go, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 2}
    go(tmp_path / "still", **keys, precompute_ref_log_probs=False)
    go(tmp_path / "alone", **keys, **EVERY_OTHER, save_only_model=True)
    assert not list(tmp_path.rglob(SAVED))
    path = str(tmp_path / "still" / "checkpoint-2")
    with pytest.raises(CheckpointError, match="was made with sync_ref_model False \\(now True"):
        go(tmp_path / "out", **EVERY_OTHER, resume_from_checkpoint=path)
    keys = {"resume_from_checkpoint": path, "resume_with_changes": True}
    with pytest.raises(CheckpointError, match=f"checkpoint-2: holds no {SAVED}, which a run with"):
        go(tmp_path / "out", **EVERY_OTHER, **keys)


def test_a_reference_of_another_size_cannot_move(go, tmp_path, tied_model):
    expected = "sync_ref_model: expected a reference with weights of the policy's shapes, got .*"
    with pytest.raises(ConfigError, match=expected + str(tied_model)):
        go(tmp_path / "out", ref_model_name_or_path=str(tied_model), **EVERY_OTHER)


def test_a_model_in_memory_has_a_copy_that_moves(go, tmp_path, tiny_model, pairs):
    keys = settings(tiny_model, tmp_path, tmp_path / "memory", **EVERY_OTHER)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    keys = {k: v for k, v in keys.items() if k not in ("model_name_or_path", "dataset_name")}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    train(TrainConfig.from_dict(keys), rows=pairs, model=model, tokenizer=tokenizer)
    go(tmp_path / "disk", **EVERY_OTHER)
    ours, theirs = metrics(tmp_path / "memory"), metrics(tmp_path / "disk")
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
