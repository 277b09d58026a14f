"""Rounds of a small model on a CPU, which tests change."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

JUDGE = "def score(prompt, response, row):\n    return -len(response)\n"
"""The shorter, the better."""


def rounds_settings(model: Path, folder: Path, prompts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Keys of rounds in `folder`, where these prompts and the judge are written."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "judge.py").write_text(JUDGE)
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(folder / "prompts.jsonl"),
        "judge": f"{folder}/judge.py:score",
        "output_dir": str(folder / "out"),
        "reference_cache_dir": str(folder / "reference"),
        "max_completion_length": 6,
        "mask_truncated_completions": False,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report": False,
        "check_data": False,
        "disable_tqdm": True,
    }
