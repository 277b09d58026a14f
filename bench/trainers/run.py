"""Trainers side by side: ours, TRL as it is and with our head, and every other one that is
installed.

    fastdpo bench --model_config smollm2-135m --data ultrafeedback

Every run is a process of its own; providers take turns, A B A B. They get the same model, the same
rows in the same order and the same number of comparisons a step; the first steps warm up. TRL first
tries batches of 1, 2, 4, ... pairs as far as memory goes, and the fastest is taken for all trainers
that need one. Rows go to bench/results/trainers-<device>.jsonl, those of one long pair to
memory-<device>.jsonl, those of `--loss` to losses-<device>.jsonl, one a run, runs that failed
included.

`--loss` names any loss that TRL has too. Whose rows are labelled responses counts those where pairs
are counted otherwise, and fastdpo has batches of as many as TRL.

`useful_tokens_per_s` counts a prompt for each of the responses of a comparison, and these, which is
what a trainer without sharing and padding computes; `computed_tokens_per_s` what went through the
policy, padding included; `head_passes` is
what our head computed over T·V·H. The definition of `mfu` is printed under the tables.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fastdpo.devices import known_gpu

from ..cli import Parser, split_lists
from ..report import record
from ..report.memory import memory_table
from ..report.rows import Row
from ..report.trainers import trainer_tables, unit_of
from ..workloads import LENGTHS, MODEL_CONFIGS, TEXTS
from . import peers
from .cases import SWITCH, Workload, workloads
from .clock import device
from .process import Failed, run_job
from .providers import PROVIDERS

QUICK = (
    "--model_config nano --data hh-rlhf --steps 4 --warm_up 2 --pairs_per_step 4 --repetitions 2 "
    "--batches 2,4 --learning_rate 3e-2"
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("fastdpo bench", __doc__)
    add = parser.add_argument
    add("--model_config", default="tiny-llama", help=f"of {', '.join(MODEL_CONFIGS)}")
    add("--model_name_or_path", help="a directory, in place of random weights")
    names = ", ".join([*LENGTHS, "pair-N", *TEXTS])
    add("--data", default="hh-rlhf", help=f"of {names}, or a JSONL file")
    add("--loss", default="sigmoid", help="as loss_type has it: kto, orpo, simpo, cpo, ...")
    add("--providers", metavar="A,B", help="default: all that have the loss")
    add("--steps", type=int, default=6, help="optimizer steps, warm-up included")
    add("--warm_up", type=int, default=2, help="steps that are not counted")
    add("--pairs_per_step", type=int, default=8)
    add("--repetitions", type=int, default=3)
    add("--batches", default="1,2,4,8", metavar="A,B", help="pairs a forward that TRL tries")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--lora", action="store_true", help="rank 16 on all linear layers")
    add("--gradient_checkpointing", default="off", metavar="off,on")
    add("--reference", default="precomputed", metavar="precomputed,online")
    add("--learning_rate", type=float, default=1e-5)
    add("--max_length", type=int, default=0, help="default: 1024 for texts, none for words")
    add("--keys", nargs="*", default=[], metavar="PROVIDER.KEY=VALUE", help="for one trainer alone")
    add("--limit_gib", type=float, help="GPU memory that a run may use; default: all")
    add("--timeout", type=float, default=3600, help="seconds of one run")
    add("--quick", action="store_true", help="a tiny model, every provider, in about two minutes")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if options.quick:
        options = parser.parse_args([*QUICK.split(), *given])
    able = [*PROVIDERS, *(peers.PEERS if options.loss == "sigmoid" else ())]
    options.providers = options.providers or ",".join(able)
    known = {"providers": able, "gradient_checkpointing": list(SWITCH)}
    known["reference"] = ["precomputed", "online"]
    split_lists(parser, options, known)
    options.batches = [int(batch) for batch in options.batches.split(",")]
    if options.loss == "kto":  # has no estimate in a batch of one
        options.batches = [batch for batch in options.batches if batch > 1]
    if not options.batches:
        parser.error("--batches: kto needs two rows a batch at least")
    if any(options.pairs_per_step % batch for batch in options.batches):
        parser.error("--batches: each has to divide --pairs_per_step")
    if options.steps <= options.warm_up:
        parser.error("--steps: expected more than --warm_up")
    options.dtype = options.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    return options


def run(
    workload: Workload, provider: str, batch: int, timeout: float, steps: int | None = None
) -> dict[str, Any]:
    """One process; the figures of its row, or its `error`."""
    job = workload.case | ({"steps": steps} if steps else {})
    job |= {"provider": provider, "batch": batch}
    job |= {"model": str(workload.model), "rows": str(workload.rows)}
    settings: dict[str, Any] = {"batch": batch or None}
    try:
        measured = run_job(job, timeout)
    except Failed as error:
        return {"settings": settings, "error": str(error)}
    settings["attention"] = measured.pop("attention")
    return {"settings": settings, **figures(workload, measured)}


def figures(workload: Workload, measured: dict[str, Any]) -> dict[str, Any]:
    """Rates over the counted steps, and what was measured besides."""
    first, last = workload.case["warm_up"], len(measured["step_s"])
    counted = slice(first, last)
    passes = measured.get("head_passes", [])[counted]
    seconds = sum(measured["step_s"][counted])
    computed, response = sum(measured["tokens"][counted]), sum(workload.response_tokens[counted])
    per_weight = 4 if workload.case["lora"] else 6
    flops = per_weight * (workload.layer_weights * computed + workload.head_weights * response)
    gpu = known_gpu()
    peak = gpu.bf16 / 1e12 if gpu and gpu.bf16 else measured["product_tflops"]
    return {
        "step_s": measured["step_s"][counted],
        "pairs_per_s": (last - first) * workload.case["pairs_per_step"] / seconds,
        "useful_tokens_per_s": sum(workload.useful_tokens[counted]) / seconds,
        "computed_tokens_per_s": computed / seconds,
        "mfu": flops / seconds / (peak * 1e12),
        "peak_tflops": peak,
        "peak_mib": measured["peak_mib"],
        "planned_mib": measured.get("planned_mib"),
        "loss": measured["loss"],
        "grad_norm": measured["grad_norm"],
        "head_passes": mean(passes) if passes and None not in passes else None,
    }


def fastest_batch(workload: Workload, options: argparse.Namespace, results: record.Results) -> int:
    """TRL's fastest number of pairs a forward, among those that fit; each try is a row."""
    speed = {}
    for batch in options.batches if len(options.batches) > 1 else ():
        tried = run(workload, "trl", batch, options.timeout, options.warm_up + 2)
        results.add(kind="batch search", case=workload.case, provider="trl", **tried)
        if "error" in tried:
            break
        speed[batch] = tried["pairs_per_s"]
    return max(speed, key=lambda batch: speed[batch]) if speed else options.batches[0]


def measure(options: argparse.Namespace, results: record.Results) -> list[Row]:
    """Run all cases; their rows."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for workload in workloads(options, Path(scratch)):
            others = any(name != "fastdpo" for name in options.providers)
            wants = others or "loss" in workload.case
            batch = fastest_batch(workload, options, results) if wants else 0
            missing: set[str] = set()
            for repetition in range(options.repetitions):
                for name in (name for name in options.providers if name not in missing):
                    size = 0 if name == "fastdpo" and "loss" not in workload.case else batch
                    done = run(workload, name, size, options.timeout)
                    keys = {"kind": "measurement", "case": workload.case, "provider": name}
                    rows.append(results.add(**keys, repetition=repetition, **done))
                    if "error" in done:
                        missing.add(name)
                    unit = unit_of(workload.case)
                    speed = done.get("error") or f"{done['pairs_per_s']:.4g} {unit}/s"
                    print(f"{name}, {workload.case['data']}: {speed}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run the cases, write rows, print the tables."""
    options = parse(arguments)
    long = options.data.startswith("pair-")
    subject = "losses" if options.loss != "sigmoid" else "memory" if long else "trainers"
    rows = measure(options, record.Results(subject, options, device()))
    print("\n" + (memory_table(rows) if long else trainer_tables(rows)))
