"""Kills training runs with SIGKILL at random moments, starts them again, compares what they leave.

    python -m bench.kill --times 100

Each trial is a run of full weights or of a LoRA adapter with dropout, from an empty cache of data
and reference on, that logs, evaluates, saves and rotates every few steps. It is killed up to three
times: after a random time, or at a random one of the calls that change the disk (the phase is drawn
first, so that short ones are hit too), with nothing of the call done or half of it. What it leaves
in the end has to be that of a run that was never disturbed: every file of the output directory and
of its checkpoints bit for bit, times of the steps apart, every value of the reference, and no file
besides. Started once more, it has to be finished. One row a trial goes to bench/results/kill.jsonl.

    python -m bench.kill --times 20 --devices 1 2 4

kills one rank or all of a run that is spread over so many processes: see `devices`.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fastdpo.reference import LogpStore
from fastdpo.training import checkpoint

from ..jsonl import read_rows, write_rows
from ..report import record
from ..workloads import model_path, pairs_of
from .processes import Kill, Processes, Run

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.2,
        "lora_target_modules": ["q_proj", "down_proj"],
        "learning_rate": 1e-2,
    },
}
TIMED = ("tokens_per_second", "pairs_per_second", "peak_memory_mib", "mfu")


def run(options: argparse.Namespace) -> int:
    """Run the trials; 1 if any differs."""
    rng, differing, phases = random.Random(options.seed), 0, Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        trials = Trials(Path(scratch))
        results = record.Results("kill", options)
        for number in range(options.times):
            kind = list(KINDS)[number % len(KINDS)]
            kills = list(draw(rng, trials.undisturbed(kind), 1 + rng.choice((0, 0, 0, 1, 1, 2))))
            row = trials.trial(kind, kills)
            results.add(trial=number, **row)
            differing += not row["bit_for_bit"]
            phases.update(kill["phase"] for kill in row["kills"])
            print(number, json.dumps(row), flush=True)
    print(f"{sum(phases.values())} kills in {options.times} trials, {dict(phases)}")
    print(f"{options.times - differing} trials end bit for bit, {differing} do not")
    return 1 if differing else 0


def draw(rng: random.Random, whole: Run, count: int, rank: int = 0) -> Iterator[Kill]:
    """Kills for a run that takes as long and makes the same calls as this one."""
    made = whole.by_rank[rank]
    for _ in range(count):
        if rng.random() < 0.4:
            yield Kill(seconds=rng.uniform(0.02, 1.0) * whole.seconds, rank=rank)
            continue
        phase = rng.choice(sorted({phase for phase, _ in made}))
        calls = [number for number, call in enumerate(made, 1) if call[0] == phase]
        yield Kill(call=rng.choice(calls), half=rng.random() < 0.5, rank=rank)


class Trials:
    """Runs in one directory, so that all of them have the same paths."""

    kinds = KINDS

    def __init__(self, scratch: Path, changes: dict[str, Any] | None = None) -> None:
        self.scratch, self.work = scratch, scratch / "work"
        rows = pairs_of("hh-rlhf", 26)
        write_rows(scratch / "train.jsonl", rows[:20])
        write_rows(scratch / "test.jsonl", rows[20:])
        self.common: dict[str, Any] = {
            "model_name_or_path": model_path("nano", "hh-rlhf", torch.float32, torch.device("cpu")),
            "dataset_name": scratch / "train.jsonl",
            "eval_dataset_name": scratch / "test.jsonl",
            "output_dir": self.work / "out",
            "reference_cache_dir": self.work / "reference",
            "resume_from_checkpoint": True,
            "use_cpu": True,
            "bf16": False,
            "max_steps": 12,
            "per_device_train_batch_size": 2,
            "max_tokens_per_batch": 256,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "logging_first_step": True,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "eval_on_start": True,
            "save_steps": 3,
            "save_total_limit": 2,
            "disable_tqdm": True,
            **(changes or {}),
        }
        self.processes = Processes(scratch / "notes")
        self._whole: dict[str, Run] = {}

    def undisturbed(self, kind: str) -> Run:
        """The run that is never killed; its files are in `scratch / kind`."""
        if kind not in self._whole:
            self._whole[kind] = self.start(kind)
            self.work.rename(self.scratch / kind)
        return self._whole[kind]

    def start(self, kind: str, kill: Kill | None = None, ranks: int = 1) -> Run:
        """Start, or start again."""
        run = self.processes.run(self.common | self.kinds[kind], kill, ranks)
        if run.code not in (0, -9):
            raise RuntimeError(f"exit code {run.code}: {run.text[-2000:]}")
        return run

    def trial(self, kind: str, kills: list[Kill]) -> dict[str, Any]:
        """Kill, start again, compare; a row."""
        whole = self.undisturbed(kind)
        row: dict[str, Any] = {"kind": kind, "kills": [], "starts": 0}
        try:
            for kill in (*kills, None):
                run = self.start(kind, kill)
                row["starts"] += 1
                if run.code == 0:
                    break
                row["kills"].append(self._describe(kill, run, whole))
            before = {file: file.stat().st_mtime_ns for file in files(self.work / "out")}
            again = self.start(kind)
            differs = list(differences(self.scratch / kind, self.work))
            if "nothing is left to do" not in again.text:
                differs.append("a finished run goes on")
            if before != {file: file.stat().st_mtime_ns for file in files(self.work / "out")}:
                differs.append("a finished run is changed")
        except RuntimeError as error:
            differs = [str(error)]
        shutil.rmtree(self.work, ignore_errors=True)
        return row | {
            "steps": self.common["max_steps"],
            "bit_for_bit": not differs,
            "differs": differs,
        }

    def _describe(self, kill: Kill | None, run: Run, whole: Run) -> dict[str, Any]:
        assert kill is not None
        saved = checkpoint.checkpoints(self.work / "out")
        return {
            "phase": run.phase,
            "at": run.call or f"{run.seconds:.2f} of {whole.seconds:.2f} s",
            "last_checkpoint": int(saved[-1].name.split("-")[1]) if saved else None,
        }


def files(folder: Path) -> list[Path]:
    """All files and empty directories below a directory."""
    paths = sorted(folder.rglob("*"))
    return [path for path in paths if not path.is_dir() or not list(path.iterdir())]


def differences(whole: Path, other: Path) -> Iterator[str]:
    """In what the files of two runs differ, timings apart."""
    expected = {f.relative_to(whole): f for f in files(whole / "out")}
    here = {f.relative_to(other): f for f in files(other / "out")}
    yield from (f"{name} is missing" for name in sorted(expected.keys() - here.keys()))
    yield from (f"{name} is left over" for name in sorted(here.keys() - expected.keys()))
    for name in sorted(expected.keys() & here.keys()):
        if content(expected[name]) != content(here[name]):
            yield f"{name} differs"
    for folder in checkpoint.checkpoints(other / "out"):
        if problem := checkpoint.damage(folder):
            yield f"{folder.name}: {problem}"
    yield from (f"{f.name} is left over" for f in files(other) if f.name.startswith(".fastdpo"))
    (one,), two = (whole / "reference").iterdir(), list((other / "reference").iterdir())
    if [one.name] != [folder.name for folder in two]:
        yield "other reference caches"
    elif values(one) != values(two[0]):
        yield "reference values differ"


def content(file: Path) -> Any:
    """What is compared of a file: its bytes, or what it says without timings."""
    if file.is_dir():
        return None
    if file.name == checkpoint.MANIFEST:  # times of steps make other digests
        return sorted(json.loads(file.read_text(encoding="utf-8")))
    if file.name == "metrics.jsonl":
        return [_untimed(line) for line in read_rows(file)]
    if file.name == "trainer_state.json":
        state = json.loads(file.read_text(encoding="utf-8"))
        return state | {"pending": _untimed(state.get("pending", {}))}
    if file.name in ("report.json", "data_checks.json"):
        facts = json.loads(file.read_text(encoding="utf-8"))
        return [facts.get(name) for name in ("total_steps", "lengths", "samples", "findings")]
    if file.name == "report.html":  # of what the other files hold, with the time of its making
        return None
    if file.name.startswith("shard-"):  # torch's headers come in any order
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    return file.read_bytes()


def values(store: Path) -> dict[bytes, float]:
    """Every value of a reference cache; one that cannot be read is none."""
    logps = LogpStore(store).logps
    assert not np.isnan(list(logps.values())).any()
    return logps


def _untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMED}
