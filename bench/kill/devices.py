"""Kills runs that are spread over processes, and goes on with as many, or with another number.

A kill ends one rank, after a time or at a call that changes the disk, and the others as a launcher
would; or all of them at once. Half of the trials
keep the number of processes: what they leave has to be what an undisturbed run of as many leaves,
bit for bit. In the others each start draws its number: their curve has to be that of one process,
but for what fp32 sums in another order differ by. After each kill every checkpoint that is there
has to be whole. Rows go to bench/results/kill-devices.jsonl.
"""

import argparse
import json
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdpo.training import checkpoint

from ..jsonl import read_rows
from ..report import record
from .processes import Kill, Run
from .trials import Trials, differences, draw

SPREAD: dict[str, dict[str, Any]] = {
    "fsdp": {"data_parallel": "fsdp"},
    "fsdp, adapter": {
        "data_parallel": "fsdp",
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "down_proj"],
        "learning_rate": 1e-2,
    },
    "replicate": {"data_parallel": "replicate"},
}
CHANGES = {"global_batch_size": 4, "max_steps": 8, "save_steps": 2, "max_grad_norm": 0.0}
CURVE = 1e-3
"""The largest relative difference of a loss or a gradient's norm on another number of processes.
AdamW divides by the root of moments that are nearly zero: what fp32 rounds differently there, it
multiplies."""


def run(options: argparse.Namespace) -> int:
    """Run the trials; 1 if any ends otherwise than it has to."""
    rng, bad = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        trials = DeviceTrials(Path(scratch), CHANGES)
        results = record.Results("kill-devices", options)
        for number in range(options.times):
            kind = list(SPREAD)[number % len(SPREAD)]
            row = trials.one(kind, rng, options.devices, same=number % 2 == 0)
            results.add(trial=number, **row)
            bad += bool(row["differs"])
            print(number, json.dumps(row), flush=True)
    print(f"{options.times - bad} of {options.times} trials end as they have to")
    return 1 if bad else 0


class DeviceTrials(Trials):
    """Runs of several processes in one directory."""

    kinds = SPREAD

    def whole(self, kind: str, ranks: int) -> tuple[Path, Run]:
        """The run of so many processes that is never killed, and where its files are."""
        folder = self.scratch / f"{kind} {ranks}"
        if folder.name not in self._whole:
            self._whole[folder.name] = self.start(kind, ranks=ranks)
            self.work.rename(folder)
        return folder, self._whole[folder.name]

    def one(self, kind: str, rng: random.Random, devices: list[int], same: bool) -> dict[str, Any]:
        """Kill, start again on as many or others, compare; a row."""
        kills = 1 + rng.choice((0, 0, 1))
        counts = [rng.choice(devices) for _ in range(kills + 1)]
        counts = [counts[0]] * len(counts) if same else counts
        for ranks in {1, *counts}:  # before anything of the trial is there
            self.whole(kind, ranks)
        row: dict[str, Any] = {"kind": kind, "devices": [], "kills": []}
        differs: list[str] = []
        try:
            for number, ranks in enumerate(counts):
                kill = self._draw(kind, rng, ranks) if number < kills else None
                ended = self.start(kind, kill, ranks)
                row["devices"].append(ranks)
                if ended.code == 0:
                    break
                assert kill is not None
                who = "all" if kill.all_ranks else f"rank {kill.rank}"
                at = ended.call or f"{ended.seconds:.2f} s"
                row["kills"].append({"phase": ended.phase, "at": at, "who": who})
                differs += self._damages()
            differs += self._compare(kind, row)
        except RuntimeError as error:
            differs.append(str(error))
        shutil.rmtree(self.work, ignore_errors=True)
        return row | {"steps": self.common["max_steps"], "differs": differs}

    def _draw(self, kind: str, rng: random.Random, ranks: int) -> Kill:
        rank = rng.randrange(ranks)
        [kill] = draw(rng, self.whole(kind, ranks)[1], 1, rank)
        return replace(kill, all_ranks=kill.seconds is not None and rng.random() < 0.5)

    def _damages(self) -> list[str]:
        """What is wrong with checkpoints; one more than are kept is being removed."""
        saved = checkpoint.checkpoints(self.work / "out")[-self.common["save_total_limit"] :]
        problems = {path.name: checkpoint.damage(path) for path in saved}
        return [f"{name}: {problem}" for name, problem in problems.items() if problem is not None]

    def _compare(self, kind: str, row: dict[str, Any]) -> list[str]:
        """In what the run differs from an undisturbed one more than it may."""
        if len(set(row["devices"])) == 1:
            found = list(differences(self.whole_of(kind, row), self.work))
            row["bit_for_bit"] = not found
            return found
        row["bit_for_bit"] = None
        expected = read_rows(self.whole(kind, 1)[0] / "out" / "metrics.jsonl")
        ours = read_rows(self.work / "out" / "metrics.jsonl")
        if [line["step"] for line in ours] != [line["step"] for line in expected]:
            return ["other steps are logged"]
        row["off"] = max(
            abs(a[name] - b[name]) / abs(b[name])
            for a, b in zip(ours, expected, strict=True)
            for name in ("loss", "grad_norm", "eval_loss")
            if name in b
        )
        return [] if row["off"] <= CURVE else [f"the curve is off by {row['off']:.1e}"]

    def whole_of(self, kind: str, row: dict[str, Any]) -> Path:
        """Where the files of the undisturbed run of as many processes are."""
        return self.whole(kind, row["devices"][0])[0]
