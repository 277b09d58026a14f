"""What the tests of whole runs share."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastdpo import TrainConfig, train
from fastdpo.training.run import precompute


def settings(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A short run in fp32 with a noticeable learning rate, without report and checks of the data;
    its reference cache lies beside its output.
    """
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "output_dir": str(output),
        "reference_cache_dir": str(output.parent / "reference"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report": False,
        "check_data": False,
        **changes,
    }


def run(model: Path, data: Path, output: Path, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    """Train; returns the last metrics with output_dir, and every line that was logged."""
    with heard() as said:
        result = train(TrainConfig.from_dict(settings(model, data, output, **changes)))
    return {**result.metrics, "output_dir": str(result.output_dir)}, said


def fill(model: Path, data: Path, output: Path, **changes: Any) -> tuple[int, int]:
    """Run `fastdpo precompute`; how many log-probabilities were found, and how many computed."""
    report = precompute(TrainConfig.from_dict(settings(model, data, output, **changes)))
    return report["found"], report["computed"]


@contextmanager
def heard() -> Iterator[list[str]]:
    """Every line that fastdpo logs in the block, from INFO on."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("fastdpo"), Lines()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def metrics(output: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    text = (output / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def assert_close_metrics(one: Path, other: Path) -> None:
    """The same losses and norms of gradients step by step, but for rounding in fp32."""
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model, or of an adapter where there is no model."""
    whole = directory / "model.safetensors"
    return load_file(whole if whole.exists() else directory / "adapter_model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Equal tensors under equal names, bit for bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_same_run(one: Path, other: Path) -> None:
    """Equal weights, and in every step of `one` the numbers that it has in `other`, bit for bit."""
    assert_same_weights(one, other)
    theirs = {row["step"]: row for row in metrics(other)}
    for row in metrics(one):
        same = theirs[row["step"]]
        for name in ("loss", "grad_norm", "learning_rate"):
            assert row[name] == same[name], name
        for name in ("rewards/margins", "rewards/mean", "kl", "delta", "nll_loss"):
            assert row.get(name) == same.get(name), name


def assert_resumes(go: Callable[..., Any], folder: Path, step: int, **keys: Any) -> Path:
    """A run that goes on from the checkpoint of `step` takes the steps of the run that was not
    broken off, bit for bit; returns that checkpoint.
    """
    go(folder / "whole", **keys, save_strategy="steps", save_steps=step)
    start = folder / "whole" / f"checkpoint-{step}"
    torch.manual_seed(99)
    _, said = go(folder / "rest", **keys, resume_from_checkpoint=str(start))
    assert any(f"resumed at step {step}" in line for line in said)
    assert_same_run(folder / "rest", folder / "whole")
    assert len(metrics(folder / "rest")) == len(metrics(folder / "whole")) - step
    return start
