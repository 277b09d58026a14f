"""Kills a training run with SIGKILL at random moments, resumes it, compares the final weights bit
by bit.

    python -m bench.kill --times 10

Each trial starts a run that saves a checkpoint at every third step, kills it after a random time,
resumes it until it ends, and compares `model.safetensors` with that of a run that was never
interrupted. One row a trial goes to bench/results/kill.jsonl.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import models, record
from .workloads import rows_of

STEPS = 12
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def main() -> None:
    """Run the trials; exits with 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, equal = random.Random(options.seed), True
    results = record.Results("kill", options)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        rows = rows_of("gsm8k", 2 * STEPS)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        whole = Path(scratch) / "whole"
        process = subprocess.Popen(command(data, whole), **QUIET)
        start = wait_for_checkpoint(process, whole)
        process.wait()
        duration = time.perf_counter() - start
        expected = (whole / "model.safetensors").read_bytes()
        for trial in range(options.times):
            output = Path(scratch) / f"trial-{trial}"
            after = rng.uniform(0.0, 0.9) * duration
            process = subprocess.Popen(command(data, output), **QUIET)
            wait_for_checkpoint(process, output)
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            steps = [int(p.name.split("-")[1]) for p in output.glob("checkpoint-*")]
            subprocess.run(command(data, output), check=True, capture_output=True)
            same = (output / "model.safetensors").read_bytes() == expected
            equal = equal and same
            row = {
                "trial": trial,
                "seconds_after_first_checkpoint": after,
                "killed": process.returncode == -signal.SIGKILL,
                "last_checkpoint": max(steps, default=None),
                "steps": STEPS,
                "bit_for_bit": same,
            }
            results.add(**row)
            print(row, flush=True)
    sys.exit(0 if equal else 1)


def wait_for_checkpoint(process: "subprocess.Popen[bytes]", output: Path) -> float:
    """Return the time at which the first checkpoint is there."""
    while not list(output.glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.02)
    return time.perf_counter()


def command(data: Path, output: Path) -> list[str]:
    """A run of the tiny Llama that resumes itself if it was interrupted."""
    options = {
        "model_name_or_path": models.model_path("tiny-llama"),
        "dataset_name": data,
        "output_dir": output,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "save_total_limit": 2,
        "learning_rate": 1e-4,
        "resume_from_checkpoint": "true",
        "disable_tqdm": "true",
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return [sys.executable, "-m", "fastdpo.cli", "train", *flags]


if __name__ == "__main__":
    main()
