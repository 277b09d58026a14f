"""How long the GPU waits between two optimizer steps, from a trace of our own trainer.

    fastdpo bench gaps --model_config qwen2.5-1.5b --data ultrafeedback

The options are those of `fastdpo bench`. A kernel belongs to the step in which the host launched
it. `gap_s` is from the end of one step's last kernel to the start of the next one's first,
`idle_s` all the time of a step without a kernel, `step_s` from first kernel to first kernel. Rows
go to bench/results/gaps-<device>.jsonl.
"""

import bisect
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import record, trainers
from .trainer_cases import workloads
from .trainer_providers import PROVIDERS
from .trainer_run import options as keys_of

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
    found = []
    for mine, following in itertools.pairwise(kernels):
        if mine and following:
            first, last, after = min(mine)[0], max(end for _, end in mine), min(following)[0]
            found.append(
                {
                    "step_s": (after - first) / 1e6,
                    "gap_s": max(after - last, 0.0) / 1e6,
                    "idle_s": (after - first - _covered(mine)) / 1e6,
                }
            )
    return found


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans, which may overlap on several streams."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def main(arguments: list[str] | None = None) -> None:
    """Trace a run of each case, write its rows, print the shares."""
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(given):
        print(__doc__)
    options = trainers.parse(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.steps = TRACED + 3
    results = record.Results(f"gaps-{record.short_name(device)}", options, device)
    with tempfile.TemporaryDirectory() as scratch:
        for workload in workloads(options, Path(scratch)):
            rows = [json.loads(line) for line in workload.rows.read_text("utf-8").splitlines()]
            clock = PROVIDERS["fastdpo"](
                rows,
                workload.model,
                options.steps,
                options.pairs_per_step,
                0,
                **{**keys_of(workload.case), "profile_steps": TRACED, "logging_steps": TRACED},
            )
            found = gaps(clock.trace["traceEvents"])
            for step in found:
                results.add(kind="gap", case=workload.case, provider="fastdpo", **step)
            print(summary(found) if found else "no kernels in the trace: is there a GPU?")


def summary(steps: list[dict[str, float]]) -> str:
    """Shares of the step time, medians."""
    shares = {
        name: statistics.median(step[name] / step["step_s"] for step in steps)
        for name in ("gap_s", "idle_s")
    }
    return (
        f"between steps {shares['gap_s']:.2%} of the step time, without a kernel "
        f"{shares['idle_s']:.2%}; medians of {len(steps)} steps"
    )


if __name__ == "__main__":
    main()
