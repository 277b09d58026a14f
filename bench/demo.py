"""The demo's model trained with several losses: what each does to held-out pairs.

    python -m bench.demo --losses sigmoid kto orpo simpo grpo

Every loss sees the demo's 221 pairs once, in steps of 8 pairs or 16 responses, at its learning
rate: KTO the two responses of each with a label, GRPO with the scores 1 and 0. Two figures of the
50 held-out pairs do not depend on the loss: in how many the log-probability of the chosen response
has grown more than that of the rejected one, and in how many it is the higher one a token.

Rows go to bench/results/demo.jsonl, one a loss.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdpo import TrainConfig, train
from fastdpo.data.batch import make_batch
from fastdpo.data.dataset import load_data
from fastdpo.data.groups import Group
from fastdpo.data.plan import make_plan
from fastdpo.demo.__main__ import demo_config
from fastdpo.model.load import load_tokenizer
from fastdpo.model.load_scorer import load_scorer

from .cli import Parser
from .jsonl import read_rows
from .report import record

KEYS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "kto": {"per_device_train_batch_size": 16},
    "orpo": {},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    "grpo": {"per_device_train_batch_size": 16},
}
"""Of each loss, what its configuration has beyond the demo's."""


def rows_for(loss: str, pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs as a loss needs them: two labelled rows each, or two scored responses."""
    if loss == "kto":
        return [
            {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
            for pair in pairs
            for name in ("chosen", "rejected")
        ]
    if loss == "grpo":
        return [
            {
                "prompt": pair["prompt"],
                "responses": [pair["chosen"], pair["rejected"]],
                "scores": [1.0, 0.0],
            }
            for pair in pairs
        ]
    return list(pairs)


def logps(config: TrainConfig, path: str, groups: Sequence[Group]) -> np.ndarray:
    """Log-probability (C, 2) of the chosen and the rejected response of each comparison, nats."""
    scorer = load_scorer(config, torch.device("cpu"), None, path)
    scorer.model.eval()
    layout = scorer.layout.name
    plan = make_plan(groups, units_per_step=1 << 20, max_tokens=2048, layout=layout, seed=None)
    found = {}
    for row in plan[0].ranks[0]:
        batch = make_batch(groups, row, layout)
        sums = scorer.response_logps(batch)[batch.units]
        found |= dict(zip(batch.places.tolist(), sums.tolist(), strict=True))
    return np.array([found[place] for place in sorted(found)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with each loss, write a row for each and print it."""
    parser = Parser("fastdpo bench demo", __doc__)
    parser.add_argument("--losses", nargs="+", choices=KEYS, default=list(KEYS))
    parser.add_argument("--max-steps", type=int, default=-1, help="fewer, to see that it runs")
    options: argparse.Namespace = parser.parse_args(arguments)
    results = record.Results("demo", options)
    base = demo_config([])
    groups = load_data(base, load_tokenizer(base), None).evaluation
    lengths = np.array([[len(g.responses[r]) for r in g.comparisons[0][:2]] for g in groups])
    before = logps(base, str(base.model_name_or_path), groups)
    results.add(loss="before", keys={}, **figures(before, before, lengths))
    for loss in options.losses:
        with tempfile.TemporaryDirectory() as folder:
            row = {"loss": loss, "keys": KEYS[loss]}
            row |= run(base, loss, Path(folder), options.max_steps)
            after = logps(base, f"{folder}/run", groups)
        row |= figures(before, after, lengths)
        results.add(**row)
        print(row, flush=True)


def run(base: TrainConfig, loss: str, folder: Path, max_steps: int) -> dict[str, Any]:
    """Train with one loss into `folder`/run; steps and seconds."""
    keys = {"loss_type": [loss], "output_dir": str(folder / "run"), "max_steps": max_steps}
    keys |= {"eval_on_start": False, "do_eval": False, "disable_tqdm": True} | KEYS[loss]
    config = base.choose("bench.demo", **keys)
    rows = rows_for(loss, read_rows(Path(str(base.dataset_name))))
    start = time.perf_counter()
    result = train(config, rows)
    return {"steps": result.step, "seconds": time.perf_counter() - start}


def figures(before: np.ndarray, after: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Over held-out comparisons: the share whose chosen response has gained on the rejected one (a
    tie is one half), the share whose chosen response is likelier a token, and both changes, nats.
    """
    change, averages = after - before, after / lengths
    gained = change[:, 0] - change[:, 1]
    return {
        "accuracy": float(((gained > 0) + 0.5 * (gained == 0)).mean()),
        "likelier": float((averages[:, 0] > averages[:, 1]).mean()),
        "chosen": float(change[:, 0].mean()),
        "rejected": float(change[:, 1].mean()),
        "pairs": len(gained),
    }


if __name__ == "__main__":
    main()
