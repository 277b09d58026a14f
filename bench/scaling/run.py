"""One process beside several: how speed grows, what is sent, what each of them holds.

    fastdpo bench scaling
    fastdpo bench scaling --parts time --processes 1,2 --providers fastdpo

Time: weak scaling gives every process as many pairs, strong scaling divides those that the most
processes take together. Efficiency is the speed of N processes over N times that of one. Where
there are fewer cores than processes that cannot be 1, so N processes of a run of their own each are
measured too, at the same time (`apart`): `of_cores` is the speed beside theirs. Each process has
one thread. All runs take turns within a repetition, on the same rows in the same order; speeds
count the tokens of whole sequences, without padding and without sharing, those of both trainers
alike.

Bytes: what a rank sends in a step, counted at torch's collectives, beside what the scheme cannot do
without; and what the loopback's counter says.

Memory: bytes of weights, gradients and states of a rank after a step, and the most in a step.

`load` of a row is how many processes were running or waiting in the minute before it ended, this
run's own among them.

Rows go to bench/results/scaling-cpu.jsonl, one a run, runs that failed included.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..cli import Parser, split_lists
from ..jsonl import write_rows
from ..report import record
from ..report.rows import Row
from ..trainers.cases import tokens_of_steps
from ..trainers.process import Failed
from ..workloads import LENGTHS, MODEL_CONFIGS, model_path, pairs_of
from . import job
from .schemes import SCHEMES, Model, ideal, keys_of

PARTS = ("time", "bytes", "memory")
PROVIDERS = ("fastdpo", "trl")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEMORY_ROWS = "pair-256"
"""All alike, so that every rank computes the same."""


class Workload:
    """A model and rows of one dtype, in a folder."""

    def __init__(self, options: argparse.Namespace, data: str, dtype: str, folder: Path) -> None:
        self.folder, self.case = folder, {"model": options.model_config, "data": data}
        self.case |= {"dtype": dtype, "warm_up": options.warm_up, "learning_rate": 1e-3}
        self.case |= {"gradient_checkpointing": False}
        self.steps = options.warm_up + options.steps
        self.model = model_path(options.model_config, data, DTYPES[dtype], torch.device("cpu"))
        count = self.steps * options.pairs * max(options.processes)
        self.pairs = pairs_of(data, count)
        self.batch = options.pairs
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.runs = 0

    def run(self, kind: str, provider: str, scheme: str, processes: int, units: int) -> Row:
        """Figures of a run in which every process takes so many pairs a step, or its `error`."""
        self.runs += 1
        place = self.folder / f"{id(self)}-{self.runs}"
        place.mkdir()
        case = self.case | {"provider": provider, "scheme": scheme, "processes": processes}
        case |= {"pairs_a_process": units}
        work: dict[str, Any] = {"kind": kind, "case": case, "processes": processes, "units": units}
        work |= {"provider": provider, "apart": scheme in ("one", "apart"), "steps": self.steps}
        alone = work["apart"]
        file = place / "rows.jsonl"  # no more than are trained, since TRL's reference scores all
        write_rows(file, self.pairs[: self.steps * units * (1 if alone else processes)])
        work |= {"rows": str(file), "model": str(self.model), "folder": str(place)}
        work |= {"batch": min(units, self.batch)}
        try:
            ranks = job.run_ranks(work | {"keys": dict(keys_of(provider, scheme))})
        except Failed as error:
            return {"kind": kind, "case": case, "error": str(error)}
        return {"kind": kind, "case": case, **self.figures(case, ranks)}

    def figures(self, case: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> Row:
        """Of the counted steps: what was computed, and how fast."""
        counted = slice(case["warm_up"], self.steps)
        processes, apart = case["processes"], case["scheme"] in ("one", "apart")
        units = case["pairs_a_process"] * (1 if apart else processes)
        useful, scored = tokens_of_steps(self.pairs, self.tokenizer, None, units)
        seconds = [sum(rank["step_s"][counted]) for rank in ranks]
        # Those that are apart each do the whole of it; the others together.
        rates = [1 / s for s in seconds] if apart else [1 / max(seconds)]
        return {
            "step_s": [rank["step_s"][counted] for rank in ranks],
            "pairs_per_s": sum(rates) * units * (self.steps - case["warm_up"]),
            "tokens_per_s": sum(rates) * sum(useful[counted]),
            "scored": statistics.mean(scored[counted]),
            "tokens": [statistics.mean(rank["tokens"][counted]) for rank in ranks],
            "rows": [statistics.mean(rank["rows"][counted]) for rank in ranks],
            "loss": ranks[0]["loss"],
            "grad_norm": ranks[0]["grad_norm"],
            "seen": [{k: rank[k] for k in _SEEN if rank.get(k)} for rank in ranks],
        }


_SEEN = ("sent", "loopback", "held", "beyond")


def time_cases(options: argparse.Namespace) -> Iterator[tuple[str, str, str, int, int]]:
    """What scales, provider, scheme, processes, pairs a process and step."""
    most, pairs = max(options.processes), options.pairs
    several = [n for n in options.processes if n > 1]
    for provider in options.providers:
        yield "weak", provider, "one", 1, pairs
        yield from (("weak", provider, "apart", n, pairs) for n in several)
        for scheme in ("replicate", "fsdp"):
            yield from (("weak", provider, scheme, n, pairs) for n in several)
        yield "strong", provider, "one", 1, pairs * most
        between = [n for n in several if n < most and pairs * most % n == 0]
        yield from (("strong", provider, "replicate", n, pairs * most // n) for n in between)


def measure_time(workload: Workload, options: argparse.Namespace, add: Any) -> None:
    """All runs in turns, a row each; those of one process come first, the others refer to them."""
    refused: set[tuple[str, str]] = set()
    for repetition in range(options.repetitions):
        speeds: dict[tuple[str, str, str, int], float] = {}
        for scaling, provider, scheme, processes, pairs in time_cases(options):
            if (provider, scheme) in refused:
                continue
            row = workload.run("time", provider, scheme, processes, pairs)
            row |= {"scaling": scaling, "repetition": repetition, "threads": 1}
            if "error" in row:
                refused.add((provider, scheme))
            else:
                speeds[scaling, provider, scheme, processes] = row["tokens_per_s"]
                row |= beside_one(speeds, scaling, provider, scheme, processes)
            add(row)


def beside_one(
    speeds: Mapping[tuple[str, str, str, int], float],
    scaling: str,
    provider: str,
    scheme: str,
    processes: int,
) -> dict[str, float]:
    """The speed beside that of one process, and beside what the cores had to give."""
    one = speeds.get((scaling, provider, "one", 1))
    apart = speeds.get(("weak", provider, "apart", processes))
    alone = speeds.get(("weak", provider, "one", 1))
    if one is None:
        return {}
    times = speeds[scaling, provider, scheme, processes] / one
    found = {"speedup": times, "efficiency": times / processes}
    if apart and alone:
        found["of_cores"] = times / (apart / alone)
    return found


def measure_bytes(workload: Workload, options: argparse.Namespace, add: Any) -> None:
    """What each scheme sends, and what it should."""
    itemsize = DTYPES[workload.case["dtype"]].itemsize
    model = Model.at(workload.model, itemsize)
    cases = [(scheme, max(options.processes)) for scheme in SCHEMES]
    cases += [(scheme, 2) for scheme in ("replicate", "fsdp") if 2 in options.processes[:-1]]
    for scheme, processes in cases:
        row = workload.run("bytes", "fastdpo", scheme, processes, options.pairs)
        if "error" not in row:
            row |= sent_beside_ideal(row, scheme, processes, model)
        add(row)


def sent_beside_ideal(row: Row, scheme: str, processes: int, model: Model) -> dict[str, Any]:
    """Means over ranks and counted steps."""
    seen, first = row.pop("seen"), row["case"]["warm_up"]
    of_steps = [step for rank in seen for step in rank["sent"][first:]]
    kinds = sorted({kind for step in of_steps for kind in step})
    sent = {kind: statistics.mean(step.get(kind, 0.0) for step in of_steps) for kind in kinds}
    means = (statistics.mean(row[name]) for name in ("rows", "tokens"))
    best = ideal(scheme, processes, model, *means, row["scored"])
    found: dict[str, Any] = {"sent": sent, "ideal": best}
    found["over_ideal"] = sum(sent.values()) / sum(best.values())
    # The counter is the machine's: all ranks together, from the end of warm-up to the last step.
    counter = seen[0].get("loopback", [None])
    if counter[0] is not None:
        steps = len(counter) - first
        found["loopback"] = (counter[-1] - counter[first - 1]) / processes / steps
        found["loopback_over_sent"] = found["loopback"] / sum(sent.values())
    return found


def measure_memory(workload: Workload, options: argparse.Namespace, add: Any) -> None:
    """One process beside shares of most processes."""
    cases = [("one", 1), ("fsdp", max(options.processes)), ("vocabulary", max(options.processes))]
    for scheme, processes in cases:
        row = workload.run("memory", "fastdpo", scheme, processes, options.pairs)
        if "error" not in row:
            seen = row.pop("seen")
            worst = max(seen, key=lambda rank: rank["held"]["all"])
            row |= {"held": worst["held"], "beyond": max(rank["beyond"] for rank in seen)}
        add(row)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("fastdpo bench scaling", __doc__)
    add = parser.add_argument
    add("--model_config", default="small-llama", help=f"of {', '.join(MODEL_CONFIGS)}; a Llama")
    add("--data", default="hh-rlhf", help=f"of {', '.join(LENGTHS)}")
    add("--parts", default=",".join(PARTS), metavar="A,B")
    add("--providers", default=",".join(PROVIDERS), metavar="A,B")
    add("--processes", default="1,2,4", metavar="N,N", help="1 and others, the most is even")
    add("--pairs", type=int, default=4, help="of a process and step")
    add("--steps", type=int, default=4, help="that count")
    add("--warm_up", type=int, default=2, help="steps that do not")
    add("--repetitions", type=int, default=3)
    options = parser.parse_args(arguments)
    split_lists(parser, options, {"parts": PARTS, "providers": PROVIDERS})
    options.processes = sorted({int(number) for number in options.processes.split(",")})
    if options.processes[-1] % 2 or options.processes[0] < 1:
        parser.error("--processes: the most is not even")
    if options.warm_up < 1 or options.steps < 2:
        parser.error("--warm_up, --steps: expected 1 and 2 at least")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every part, write a row a run and print it."""
    options = parse(arguments)
    torch.set_num_threads(1)
    job.serve()
    results = record.Results("scaling", options, torch.device("cpu"))
    parts = {
        "time": (measure_time, options.data, "fp32"),
        "bytes": (measure_bytes, options.data, "bf16"),
        "memory": (measure_memory, MEMORY_ROWS, "fp32"),
    }

    def add(row: Row) -> None:
        row |= {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
        results.add(**row)
        shown = ("kind", "scaling", "error", "tokens_per_s", "efficiency", "of_cores")
        shown += ("over_ideal", "loopback_over_sent", "held", "beyond")
        case = row["case"]
        print(case["provider"], case["scheme"], case["processes"], end=" ")
        print({name: row[name] for name in shown if name in row}, flush=True)

    for part in options.parts:
        measure, data, dtype = parts[part]
        with tempfile.TemporaryDirectory() as scratch:
            measure(Workload(options, data, dtype, Path(scratch)), options, add)
