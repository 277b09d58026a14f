"""How long a run takes from its rows to its first step, the model aside.

    python -m bench.start --pairs 100000
    python -m bench.start --pairs 1000000 --without trl

Writes GSM8K pairs, each question with its number before it so that no two prompts are equal, and
measures in processes of their own, in turns: TRL's preparation of the rows; the first start, from
rows to the plan of an epoch and its first step; a start that finds rows and tokens cached. Seconds
of the wall clock and of the processors, those of child processes included. Writes
bench/results/start.jsonl.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import data
from .jsonl import write_rows
from .report import record

MAX_LENGTH = 1024


def main() -> None:
    """Measure every kind of start in turns, write a row for each, print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--without", choices=("trl",), help="leave out TRL's preparation")
    parser.add_argument("--kind", choices=("trl", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(trl(options.file) if options.kind == "trl" else ours(options.file)))
        return
    pairs = data.gsm8k_pairs()
    if pairs is None:
        return
    named = argparse.Namespace(pairs=options.pairs, max_length=MAX_LENGTH)
    results = record.Results("start", named)
    for repetition in range(options.repetitions):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "pairs.jsonl"
            write_rows(file, itertools.islice(numbered(pairs), options.pairs))
            for start, kind in (("trl", "trl"), ("first", "ours"), ("cached", "ours")):
                if start == options.without:
                    continue
                row = {"start": start, "repetition": repetition, **measured(kind, file)}
                print(results.add(**row))


def numbered(pairs: list[dict[str, Any]]) -> Any:
    """The pairs again and again, with their number before the question."""
    for number, row in enumerate(itertools.cycle(pairs)):
        yield {**row, "prompt": f"{number}. {row['prompt']}"}


def measured(kind: str, file: Path) -> dict[str, Any]:
    """What a process of its own measures, with caches beside the file."""
    command = [sys.executable, "-m", "bench.start", "--kind", kind, "--file", str(file)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(file.parent / kind)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def trl(file: Path) -> dict[str, Any]:
    """Seconds of TRL's preparation, with its defaults."""
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOTrainer

    from fastdpo.demo.model import demo_model_path

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    clock = Clock()
    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    clock.lap("rows")
    bare: Any = DPOTrainer.__new__(DPOTrainer)
    bare._tokenizer = tokenizer
    arguments = SimpleNamespace(
        dataset_num_proc=None, max_length=MAX_LENGTH, truncation_mode="keep_start"
    )
    bare._prepare_dataset(rows, tokenizer, arguments, "train")
    clock.lap("tokens")
    return clock.laps


def ours(file: Path) -> dict[str, Any]:
    """Seconds of reading, tokenising and grouping; of the plan of an epoch and its digest; and of
    packing the first step.
    """
    from transformers import AutoTokenizer

    from fastdpo.config import TrainConfig
    from fastdpo.data.dataset import load_data
    from fastdpo.data.plan import epoch_plan, plan_digest
    from fastdpo.demo.model import demo_model_path

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    config = TrainConfig(dataset_name=str(file), max_length=MAX_LENGTH)
    clock = Clock()
    groups = load_data(config, tokenizer, None).train
    clock.lap("groups")
    plan = epoch_plan(config, groups, layout="shared", max_tokens=1024)
    plan_digest(groups, plan)
    clock.lap("plan")
    _ = plan[0]
    clock.lap("step")
    return {**clock.laps, "groups": len(groups), "steps": len(plan)}


class Clock:
    """Seconds between laps, by the clock and by the processors, and the most memory in use."""

    def __init__(self) -> None:
        self.laps: dict[str, Any] = {}
        self._before = _now()

    def lap(self, name: str) -> None:
        """Note what has passed since the last lap."""
        now = _now()
        wall, processors = (after - before for after, before in zip(now, self._before, strict=True))
        self.laps |= {f"{name}_s": round(wall, 3), f"{name}_cpu_s": round(processors, 3)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.laps["resident_mib"] = peak // 1024
        self._before = _now()


def _now() -> tuple[float, float]:
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return time.perf_counter(), own


if __name__ == "__main__":
    main()
