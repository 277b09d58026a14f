"""Output directories as runs leave them, made by hand."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdpo import TrainConfig

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> &amp; "
    "\x1b[31m\u202e\ud800 {{7*7}}"
)
"""What would act if a page let it: HTML, a template, a terminal's escapes, half a character."""


def write_run(
    path: Path,
    steps: int = 60,
    *,
    finished: bool = True,
    noise: float = 0.03,
    curves: dict[str, Callable[[float], float]] | None = None,
    held_out: dict[str, Callable[[float], float]] | None = None,
    facts: dict[str, Any] | None = None,
    checks: dict[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """A run of so many steps; a curve is a function of how far the run is, from 0 to 1. Held-out
    curves have a point at the start and at each sixth of the run.
    """
    path.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    curves = LEARNS | (curves or {})
    held_out = HELD_OUT | (held_out or {}) if held_out is not None else HELD_OUT
    rows: list[dict[str, float]] = [{"step": 0, **_at(0.0, held_out)}]
    for step in range(1, steps + 1):
        share = step / steps
        noisy = {n: v + noise * abs(v) * rng.gauss(0, 1) for n, v in _at(share, curves).items()}
        noisy["rewards/accuracies"] = min(1.0, noisy["rewards/accuracies"])
        rows.append({"step": step, "epoch": 2 * share, "num_tokens": 900 * step, **noisy})
        if step % max(1, steps // 6) == 0:
            rows.append({"step": step, **_at(share, held_out)})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    config = TrainConfig(model_name_or_path="org/model-1b", dataset_name="pairs.jsonl", **keys)
    config.save(path / "training_config.yaml")
    state = {"finished": finished, "step": steps, "files": ["metrics.jsonl"]}
    (path / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    (path / "report.json").write_text(json.dumps(FACTS | (facts or {})), encoding="utf-8")
    if checks is not None:
        (path / "data_checks.json").write_text(json.dumps(checks), encoding="utf-8")
    return path


def _at(share: float, curves: dict[str, Callable[[float], float]]) -> dict[str, float]:
    return {name: curve(share) for name, curve in curves.items()}


LEARNS: dict[str, Callable[[float], float]] = {
    "loss": lambda s: 0.6931 * math.exp(-0.7 * s),
    "rewards/accuracies": lambda s: 0.5 + 0.4 * s,
    "rewards/margins": lambda s: 1.4 * s,
    "rewards/chosen": lambda s: 0.6 * s,
    "rewards/rejected": lambda s: -0.8 * s,
    "logps/chosen": lambda s: -120 + 6 * s,
    "logps/rejected": lambda s: -140 - 8 * s,
    "entropy": lambda s: 1.9 - 0.2 * s,
    "grad_norm": lambda s: 3.0 - s,
    "learning_rate": lambda s: 1e-5 * (1 - s),
    "tokens_per_second": lambda s: 5200.0,
    "pairs_per_second": lambda s: 12.0,
    "peak_memory_mib": lambda s: 3100.0,
}
HELD_OUT: dict[str, Callable[[float], float]] = {
    "eval_loss": lambda s: 0.6931 * math.exp(-0.5 * s),
    "eval_rewards/accuracies": lambda s: 0.5 + 0.3 * s,
    "eval_rewards/margins": lambda s: 0.9 * s,
    "eval_rewards/chosen": lambda s: 0.4 * s,
    "eval_rewards/rejected": lambda s: -0.5 * s,
    "eval_logps/chosen": lambda s: -121 + 4 * s,
    "eval_logps/rejected": lambda s: -139 - 5 * s,
}
FACTS: dict[str, Any] = {
    "total_steps": 60,
    "seconds": 431.0,
    "device": "CPU",
    "devices": 1,
    "parameters": 134_515_008,
    "lengths": {
        "edges": list(range(0, 130, 10)),
        "counts": {
            "prompt": [0, 9, 40, 80, 60, 20, 8, 3, 1, 0, 0, 0],
            "chosen": [0, 3, 18, 55, 70, 44, 20, 8, 2, 1, 0, 0],
            "rejected": [0, 1, 8, 30, 66, 60, 31, 16, 6, 2, 1, 0],
        },
        "medians": {"prompt": 35.0, "chosen": 43.0, "rejected": 51.0},
        "longest": {"prompt": 88, "chosen": 97, "rejected": 108},
        "groups": 221,
        "of": 221,
        "max_length": 256,
        "longer_chosen": 0.42,
    },
    "samples": [
        {
            "prompt": [["system", "You are a helpful assistant."], ["user", "Why do we yawn?"]],
            "before": "Yawning is a fascinating phenomenon with many theories around it …",
            "after": "Mostly because we are tired; it may cool the brain.",
            "chosen": "Mostly because we are tired or bored; a yawn may help to cool the brain.",
        }
    ],
}
CHECKS: dict[str, Any] = {
    "summary": {"rows": 221, "warning": 1},
    "findings": [
        {
            "name": "duplicates",
            "level": "warning",
            "count": 3,
            "share": 0.014,
            "text": "3 rows stand in the data twice",
            "examples": [{"row": 12, "text": "Why do we yawn?"}],
        }
    ],
    "lengths": {},
}
