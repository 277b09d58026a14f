"""What the tests of whole runs share."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fastdpo.config import TrainConfig
from fastdpo.train.run import train


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
    """Train; returns the result and every line that was said."""
    said: list[str] = []
    config = TrainConfig.from_dict(settings(model, data, output, **changes))
    return train(config, say=said.append), said


def metrics(output: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    text = (output / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def weights(directory: Path, name: str = "model.safetensors") -> dict[str, Any]:
    """The tensors of a saved model or adapter."""
    return load_file(directory / name)
