"""How long the GPU waits between two optimizer steps, from a trace of our own trainer.

    fastdpo bench gaps --model_config qwen2.5-1.5b --data ultrafeedback

The options are those of `fastdpo bench`. A kernel belongs to the step in which the host launched
it. `gap_s` is from the end of one step's last kernel to the start of the next one's first,
`idle_s` all the time of a step without a kernel, `step_s` from first kernel to first kernel. Rows
go to bench/results/gaps-<device>.jsonl.
"""

import bisect
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..jsonl import read_rows
from ..report import record
from ..report.trainers import gap_table
from . import run
from .cases import workloads
from .clock import device
from .job import keys_of, loss_for
from .providers import run_fastdpo

TRACED = 4


def gaps(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """`step_s`, `gap_s` and `idle_s` of every traced step but the last."""
    steps = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if str(event.get("name", "")).startswith("ProfilerStep#")
        and event.get("cat") == "user_annotation"
    )
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    kernels: list[list[tuple[float, float]]] = [[] for _ in steps]
    starts = [start for start, _ in steps]
    for event in events:
        launch = launched.get(event.get("args", {}).get("correlation"))
        if event.get("cat") != "kernel" or launch is None:
            continue
        step = bisect.bisect_right(starts, launch) - 1
        if step >= 0 and launch <= steps[step][1]:
            kernels[step].append((event["ts"], event["ts"] + event["dur"]))
    waits = []
    for mine, following in itertools.pairwise(kernels):
        if mine and following:
            first, last, after = min(mine)[0], max(end for _, end in mine), min(following)[0]
            waits.append(
                {
                    "step_s": (after - first) / 1e6,
                    "gap_s": max(after - last, 0.0) / 1e6,
                    "idle_s": (after - first - _covered(mine)) / 1e6,
                }
            )
    return waits


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans, which may overlap on several streams."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def main(arguments: list[str] | None = None) -> None:
    """Trace a run of each case, write its rows, print the table."""
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(given):
        print(__doc__)
    options = run.parse(given)
    options.steps = TRACED + 3
    results = record.Results("gaps", options, device())
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for workload in workloads(options, Path(scratch)):
            clock = run_fastdpo(
                read_rows(workload.rows),
                workload.model,
                options.steps,
                options.pairs_per_step,
                0,
                **loss_for("fastdpo", workload.case.get("loss")),
                **{**keys_of(workload.case), "profile_steps": TRACED, "logging_steps": TRACED},
            )
            for step in gaps(clock.trace["traceEvents"]):
                key = {"kind": "gap", "case": workload.case, "provider": "fastdpo"}
                rows.append(results.add(**key, **step))
    print(gap_table(rows) if rows else "no kernels in the trace: is there a GPU?")


if __name__ == "__main__":
    main()
