"""Checkpoints of many processes: gone on from by as many, bit for bit, or by more or fewer, from
whatever spreads the model to whatever else; whole or not there when a process is killed.
"""

import json
import logging
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import assert_same_run, metrics, settings, weights
from transformers import AutoModelForCausalLM

from bench.kill.processes import Kill, Processes, Run
from fastdpo.training import checkpoint

PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "replicate 2": (2, {"data_parallel": "replicate"}),
    "fsdp 2": (2, {"data_parallel": "fsdp"}),
    "fsdp 4": (4, {"data_parallel": "fsdp"}),
    "hsdp 2x2": (4, {"data_parallel": "hsdp", "dp_replicate_size": 2}),
}
"""How many processes, and the keys that spread the model over them."""

ADAPTER = {"use_peft": True, "lora_r": 3, "lora_target_modules": ["q_proj", "down_proj"]}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "moving reference": MOVING,
    "adapter with dropout": {**ADAPTER, "lora_dropout": 0.3, "learning_rate": 1e-2},
    "8 bit": {"optim": "adamw_torch_8bit"},
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
}
EVERY_OTHER = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="module")
def start(processes, tied_model, pairs_file):
    """Train at a place of `PLACES`; how that ended."""

    def started(place: str, output: Path, kill: Kill | None = None, **changes: Any) -> Run:
        ranks, spread = PLACES[place]
        keys = settings(tied_model, pairs_file, output, **spread, **changes)
        return processes.run(keys, kill, ranks)

    return started


def go(start: Any, place: str, output: Path, **changes: Any) -> str:
    """Train to the end; what was said."""
    run = start(place, output, per_device_train_batch_size=2, **changes)
    assert run.code == 0, run.text
    return run.text


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_bit_for_bit(start, tmp_path, kind):
    place = "replicate 2" if kind == "full" else "fsdp 2"
    keys = KINDS[kind]
    go(start, place, tmp_path / "whole", **keys, **EVERY_OTHER)
    saved = tmp_path / "whole" / "checkpoint-2"
    assert checkpoint.damage(saved) is None
    said = go(start, place, tmp_path / "rest", **keys, resume_from_checkpoint=saved)
    assert "resumed at step 2" in said and "rounded once more" not in said
    assert_same_run(tmp_path / "rest", tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "rest")] == [3, 4]
