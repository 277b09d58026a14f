"""`fastdpo rounds`: kills at random moments, tokens a second of sampling, the rounds of the demo.

    python -m bench.rounds kills --times 10
    python -m bench.rounds sampling --repetitions 3
    python -m bench.rounds demo

`kills`: rounds of a small model in a process of their own, killed once at a random moment and
started again; samples, scores, rows and weights have to be those of undisturbed ones. `sampling`:
eight answers to each of some of the demo's prompts by SmolLM2, in turns by transformers' `generate`
with every prompt as often as it is answered, by ours, which computes it once, and by continuous
batching. `demo`: what `make demo ARGS=--rounds` does, a row a round. Writes
bench/results/rounds.jsonl.
"""

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .jsonl import write_rows
from .report import record
from .workloads import model_path, pairs_of

_JUDGE = "def score(prompt, response, row):\n    return -len(response)\n"
_NUMBER, _TOKENS, _PROMPTS = 8, 48, 16


def main() -> None:
    """Run what the command line asks for; exit status 1 where a killed run ends otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "sampling", "demo"))
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = record.Results("rounds", options)
    sys.exit({"kills": kills, "sampling": sampling, "demo": demo}[options.what](options, results))


def kills(options: argparse.Namespace, results: record.Results) -> int:
    """Rows of trials: when each was killed, in which file's making, and whether it ends alike."""
    rng, differing = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        out, command = _rounds_of_a_small_model(Path(scratch))
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        whole, wanted = time.perf_counter() - began, left_by(out)
        for trial in range(options.times):
            shutil.rmtree(out)
            after = rng.uniform(0.05, 1) * whole
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                process.kill()
            killed = process.wait() != 0
            found = sorted(f for f in out.rglob("*") if f.is_file()) if out.exists() else []
            newest = max(found, key=lambda f: f.stat().st_mtime_ns, default=None)
            subprocess.run(command, check=True, capture_output=True)
            same = left_by(out) == wanted
            differing += not same
            last = None if newest is None else str(newest.relative_to(out))
            row = {"trial": trial, "seconds": round(after, 2), "of": round(whole, 2)}
            print(results.add(**row, killed=killed, last_file=last, bit_for_bit=same))
    return int(differing > 0)


def _rounds_of_a_small_model(scratch: Path) -> tuple[Path, list[str]]:
    """Where the rounds go, and the command that runs them."""
    import yaml

    rows = pairs_of("hh-rlhf", 20)
    write_rows(scratch / "prompts.jsonl", [{"prompt": row["prompt"][-200:]} for row in rows])
    (scratch / "judge.py").write_text(_JUDGE)
    config = {
        "model_name_or_path": str(
            model_path("nano", "hh-rlhf", torch.float32, torch.device("cpu"))
        ),
        "dataset_name": str(scratch / "prompts.jsonl"),
        "judge": f"{scratch}/judge.py:score",
        "output_dir": str(scratch / "out"),
        "reference_cache_dir": str(scratch / "reference"),
        "rounds": 2,
        "num_generations": 4,
        "generation_batch_size": 4,
        "max_completion_length": 16,
        "mask_truncated_completions": False,
        "eval_prompts": 4,
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report": False,
        "check_data": False,
        "disable_tqdm": True,
    }
    (scratch / "rounds.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "fastdpo", "rounds", str(scratch / "rounds.yaml")]
    return scratch / "out", command


def left_by(out: Path) -> dict[str, Any]:
    """The rows of every Parquet file, the bytes of every weight, and the lines of the rounds
    without their times.
    """
    import pyarrow.parquet as parquet

    found: dict[str, Any] = {}
    for file in sorted(out.glob("round-*/*.parquet")):
        found[str(file.relative_to(out))] = parquet.read_table(file).to_pylist()
    for file in sorted(out.glob("round-*/model/*.safetensors")):
        found[str(file.relative_to(out))] = file.read_bytes()
    lines = map(json.loads, (out / "rounds.jsonl").read_text().splitlines())
    return found | {"lines": [{**line, "seconds": None} for line in lines]}


def sampling(options: argparse.Namespace, results: record.Results) -> int:
    """Rows of ways to sample, in turns."""
    from transformers import set_seed

    from fastdpo.config import TrainConfig
    from fastdpo.demo.model import demo_model_path
    from fastdpo.demo.rounds import PROMPTS
    from fastdpo.model.sampler import Sampler, Sampling

    config = TrainConfig(model_name_or_path=str(demo_model_path()), use_cpu=True, bf16=False)
    sampler, how = Sampler.load(config), Sampling(_TOKENS)
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    prompts = [sampler.encode(row["prompt"]) for row in rows[:_PROMPTS]]
    size = 8
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    ways = {
        "each answer's prompt": lambda some: sampler.generate(
            [prompt for prompt in some for _ in range(_NUMBER)], how
        ),
        "a prompt once": lambda some: sampler.generate(some, how, _NUMBER),
        "continuous": lambda some: sampler.generate_continuously(some, how, _NUMBER),
    }
    for repetition, (way, sample) in itertools.product(range(options.repetitions), ways.items()):
        set_seed(repetition)
        began = time.perf_counter()
        answers = [answer for some in batches for each in sample(some) for answer in each]
        seconds = time.perf_counter() - began
        row = {"way": way, "repetition": repetition, "seconds": round(seconds, 3)}
        row |= {"answers": len(answers), "tokens": sum(len(answer.ids) for answer in answers)}
        print(results.add(**row))
    return 0


def demo(options: argparse.Namespace, results: record.Results) -> int:
    """A row for the start and for each round."""
    from fastdpo.demo.rounds import FLAG, rounds_config
    from fastdpo.rounds.loop import rounds

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        lines = rounds(rounds_config([FLAG, f"--output_dir={folder}/out"])).rounds
        seconds = round(time.perf_counter() - began, 1)
    for line in lines:
        print(results.add(demo_seconds=seconds, **line))
    return 0


if __name__ == "__main__":
    main()
