"""Checkpoints of many processes: gone on from by as many, bit for bit, or by more or fewer, from
whatever spreads the model to whatever else; whole or not there when a process is killed.
"""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
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
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("replicate 2", {}),
    "moving reference": ("fsdp 2", MOVING),
    "adapter with dropout": ("fsdp 2", {**ADAPTER, "lora_dropout": 0.3, "learning_rate": 1e-2}),
    "8 bit": ("fsdp 2", {"optim": "adamw_torch_8bit"}),
    "sgd": ("fsdp 2", {"optim": "sgd", "learning_rate": 0.1}),
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="module")
def start(processes, tied_model, pairs_file):
    """Train at a place of `PLACES`, from a checkpoint if one is given; how that ended."""

    def started(
        place: str, output: Path, source: Path | None = None, kill: Kill | None = None, **keys: Any
    ) -> Run:
        ranks, spread = PLACES[place]
        keys = {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant", **keys}
        if source is not None:
            keys["resume_from_checkpoint"] = source
        return processes.run(
            settings(tied_model, pairs_file, output, **spread, **keys), kill, ranks
        )

    return started


def go(start: Any, *arguments: Any, **keys: Any) -> str:
    """Train to the end, with a checkpoint at every step; what was said."""
    run = start(*arguments, save_strategy="steps", save_steps=1, **keys)
    assert run.code == 0, run.text
    return run.text


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """The directory of a run of three steps of a kind."""
    done: dict[str, Path] = {}

    def trained(kind: str) -> Path:
        if kind not in done:
            place, keys = KINDS[kind]
            done[kind] = tmp_path_factory.mktemp("undisturbed") / "whole"
            go(start, place, done[kind], max_steps=3, **keys)
        return done[kind]

    return trained


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_bit_for_bit(start, undisturbed, tmp_path, kind):
    (place, keys), whole = KINDS[kind], undisturbed(kind)
    source = whole / "checkpoint-1"
    assert checkpoint.damage(source) is None
    assert not [f for f in source.rglob("*") if f.suffix in (".pt", ".bin", ".distcp", ".metadata")]
    said = go(start, place, tmp_path / "rest", source, max_steps=3, **keys)
    assert "resumed at step 1" in said and "rounded once more" not in said
    assert_same_run(tmp_path / "rest", whole)
    assert [row["step"] for row in metrics(tmp_path / "rest")] == [2, 3]


SAVING = "saving"
LEGS = ("alone", "fsdp 4", "hsdp 2x2", "replicate 2", "fsdp 2")


def test_every_step_may_be_taken_elsewhere(start, tmp_path):
    """Each leg keeps the units of a step that the first one had: two on each of two devices."""
    keys, out = {**MOVING, "max_grad_norm": 0.0}, tmp_path / "0"
    go(start, "fsdp 2", out, max_steps=6, **keys)
    whole = {row["step"]: row for row in metrics(out)}
    for step, place in enumerate(LEGS, 1):
        source, out = out / f"checkpoint-{step}", tmp_path / str(step)
        said = go(start, place, out, source, max_steps=step + 1, **keys)
        assert "4 a step" in said, said
        [row] = metrics(out)
        assert row["loss"] == pytest.approx(whole[step + 1]["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(whole[step + 1]["grad_norm"], rel=1e-4)
    ours, theirs = weights(out), weights(tmp_path / "0")
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-5
    wrote = {f.name[:11] for f in (tmp_path / "3" / "checkpoint-4").rglob("shard-*")}
    assert wrote == {"shard-00001", "shard-00002"}, "a replica too many, or too few, writes"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "5" / "checkpoint-6").state_dict()
    assert all(torch.equal(saved[name], ours[name]) for name in ours)


def test_moments_in_8_bits_are_cut_anew_where_shares_have_another_size(
    start, undisturbed, tmp_path
):
    keys, whole = KINDS["8 bit"][1], undisturbed("8 bit")
    before, after = weights(whole / "checkpoint-2"), weights(whole)
    for place, rounded in (("alone", True), ("hsdp 2x2", False)):
        said = go(start, place, tmp_path / place, whole / "checkpoint-2", max_steps=3, **keys)
        assert ("rounded once more" in said) == rounded
        ours = weights(tmp_path / place)
        off, step = (
            torch.cat([(after[n] - one[n]).flatten() for n in after]).norm()
            for one in (ours, before)
        )
        assert off < 0.02 * step


@pytest.fixture(scope="module")
def often(start, tmp_path_factory):
    """Keys that save at every step, and where and how a run with them ended."""
    keys = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    whole = tmp_path_factory.mktemp("often") / "whole"
    return keys, whole, start("fsdp 2", whole, **keys)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_in_the_middle_of_a_write_leaves_no_half_checkpoint(start, often, tmp_path, rank):
    """At one of the calls of the rank's that change the disk, drawn anew each time."""
    (keys, whole, undisturbed), out = often, tmp_path / "out"
    writes = {
        re.sub(r"(-checkpoint-\d+-).*", r"\1", name)
        for phase, name in undisturbed.by_rank[rank]
        if phase == SAVING
    }
    place = f"{SAVING}: {random.choice(sorted(writes))}"
    kill = Kill(place=place, half=random.random() < 0.5, rank=rank)
    run = start("fsdp 2", out, kill=kill, **keys)
    assert run.code == -9, f"{kill}: {run.text}"
    left = checkpoint.checkpoints(out)[-2:]  # one before them was being removed
    assert [checkpoint.damage(path) for path in left] == [None] * len(left), kill
    again = start("fsdp 2", out, **keys, resume_from_checkpoint=True)
    assert again.code == 0, again.text
    assert_same_run(out, whole)
    assert [path.name for path in checkpoint.checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]
    assert not list(out.glob(".fastdpo*"))
