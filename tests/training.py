"""What the tests of whole runs share."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fastdpo import TrainConfig, train


def settings(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A short run in fp32 with a noticeable learning rate; its reference cache lies beside its
    output.
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
        **changes,
    }


def run(model: Path, data: Path, output: Path, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    """Train; returns the last metrics with output_dir, and every line that was logged."""
    with heard() as said:
        result = train(TrainConfig.from_dict(settings(model, data, output, **changes)))
    return {**result.metrics, "output_dir": str(result.output_dir)}, said


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


def weights(directory: Path, name: str = "model.safetensors") -> dict[str, Any]:
    """The tensors of a saved model or adapter."""
    return load_file(directory / name)
