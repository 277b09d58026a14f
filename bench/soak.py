"""Does a long run keep its memory, files and threads flat?

    python -m bench.soak --steps 10000

Trains a model so small that a step takes milliseconds, logs and looks at the process every 250
steps, evaluates and saves every 500, and compares the last quarter of what was seen with the second
one: medians of resident memory, open files, threads, mapped regions of memory, and blocks that
Python has allocated after a collection, where a single number that is kept at every step shows.
Full weights for all steps; for 1,500 each an adapter, activations in a file, and a reference beside
the policy. One row a kind goes to bench/results/soak.jsonl.
"""

import argparse
import gc
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fastdpo import train
from fastdpo.model import offload

from .report import record
from .trainers.providers import fastdpo_config
from .workloads import model_path

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "down_proj"]},
    "offload": {"gradient_checkpointing": True, "activation_offloading": True},
    "online": {"precompute_ref_log_probs": False},
}
SHORT = 1500
PAGE = os.sysconf("SC_PAGE_SIZE")
# What two medians of a run that leaks nothing may differ by: memory and its regions by what the
# allocator happens to keep, blocks by what was saved and formatted last.
NOISE = {"resident_mib": 4.0, "files": 0, "threads": 0, "mappings": 8, "blocks": 300}


def main() -> None:
    """Run all kinds; exits with 1 if anything grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=10_000, help="of the run of full weights")
    parser.add_argument("--every", type=int, default=250, help="steps between two looks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, flat = record.Results("soak", options), True
    with tempfile.TemporaryDirectory() as scratch:
        for kind, keys in KINDS.items():
            steps = options.steps if kind == "full" else min(SHORT, options.steps)
            samples = soak(Path(scratch) / kind, steps, options.every, keys)
            growth = samples.growth()
            flat &= not samples.leaks()
            row = {"kind": kind, "steps": steps, "growth": growth, "flat": not samples.leaks()}
            results.add(**row, samples=samples.rows())
            print(json.dumps(row), flush=True)
    sys.exit(0 if flat else 1)


class Samples:
    """What a process holds, at steps `every`, 2·`every`, …; room for all is made at once."""

    def __init__(self, steps: int, every: int) -> None:
        self.every = every
        self.table = np.zeros((steps // every, len(NOISE)))

    def look(self, step: int, metrics: dict[str, float]) -> None:
        """Look at this process, after a step that is a multiple of `every`."""
        if step % self.every:
            return
        gc.collect()
        self.table[step // self.every - 1] = (
            int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20,
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            Path("/proc/self/maps").read_text().count("\n"),
            sys.getallocatedblocks(),
        )

    def growth(self) -> dict[str, float]:
        """By how much the median of the last quarter exceeds that of the second one."""
        quarter = len(self.table) // 4
        early, late = self.table[quarter : 2 * quarter], self.table[-quarter:]
        difference = np.median(late, axis=0) - np.median(early, axis=0)
        return dict(zip(NOISE, difference.tolist(), strict=True))

    def leaks(self) -> list[str]:
        """What grows beyond noise."""
        return [name for name, more in self.growth().items() if more > NOISE[name]]

    def rows(self) -> list[dict[str, float]]:
        """The samples by name."""
        return [
            {"step": step, **dict(zip(NOISE, row.tolist(), strict=True))}
            for step, row in enumerate(self.table, 1)
            for step in [step * self.every]
        ]


def soak(folder: Path, steps: int, every: int, keys: dict[str, Any]) -> Samples:
    """Train in `folder` and look on."""
    rng = random.Random(0)
    rows = [
        {"prompt": _words(rng), "chosen": f" {_words(rng)}", "rejected": f" {_words(rng)}"}
        for _ in range(44)
    ]
    config = fastdpo_config(
        model_path("nano", "hh-rlhf", torch.float32, torch.device("cpu")),
        folder,
        use_cpu=True,
        bf16=False,
        shuffle=True,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        logging_steps=every,
        eval_strategy="steps",
        eval_steps=2 * every,
        save_strategy="steps",
        save_steps=2 * every,
        save_total_limit=2,
        **{"gradient_checkpointing": False, **keys},
    )
    samples = Samples(steps, every)
    # The inputs of so small a model would stay where they are.
    with patch.object(offload, "MIN_BYTES", 0):
        train(config, rows[:40], rows[40:], on_step=samples.look)
    return samples


def _words(rng: random.Random) -> str:
    return " ".join(f"w{rng.randrange(900)}" for _ in range(rng.randint(4, 12)))


if __name__ == "__main__":
    main()
