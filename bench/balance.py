"""How evenly a step's work is spread over ranks, counted from the plan: no device is needed.

    fastdpo bench balance
    fastdpo bench balance --workloads ultrafeedback --ranks 64 --units 4,8,16 --max-tokens 4096

An epoch of made-up groups with the lengths of `bench.workloads` is planned for so many ranks. The
imbalance of a step is the work of the dearest rank over that of the mean; where ranks wait for each
other in every row, as under FSDP, it is the sum of the dearest row of each round over that mean. At
random, every rank takes the next units of the shuffled data, as a distributed sampler deals them;
best-fit deals out rows as they were packed. A rank that holds too few units cannot be even: `bound`
is the dearest part over the mean rank, or 1. `other_models` is the imbalance in the operations of
models whose attention and head cost more or less than what the plan assumes, and `for_model` that
of a plan that was told.

Rows go to bench/results/balance.jsonl, one a workload, layout and number of ranks.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoConfig

from fastdpo.config import TrainConfig
from fastdpo.data.groups import Group
from fastdpo.data.packing import LAYOUTS, best_fit_decreasing, part_tokens
from fastdpo.data.plan import Step, make_plan
from fastdpo.data.ranks import TYPICAL, Work, row_work
from fastdpo.memory.shapes import ModelShape, meta_model
from fastdpo.memory.speed import step_work

from .cli import Parser, split_lists
from .report import record
from .workloads import LENGTHS, MODEL_CONFIGS, Lengths

WORKLOADS = ("hh-rlhf", "ultrafeedback", "n-best")
UNITS = {"hh-rlhf": 32, "ultrafeedback": 16, "n-best": 64}
"""Comparisons a rank and step where none are asked for: a full row of 16384 tokens, or most of
one."""

OTHERS = ("llama-3.1-8b", "qwen2.5-0.5b")
"""A wide model with a small head beside its layers, and a narrow one with a large head."""


def made_up(lengths: Lengths, comparisons: int, seed: int = 0) -> list[Group]:
    """Groups of log-normal lengths with at least so many comparisons: better responses beside worse
    ones, as `bench.workloads` pairs them.
    """
    rng = np.random.default_rng(seed)

    def tokens(median: int, spread: float) -> np.ndarray:
        drawn = round(median * float(np.exp(spread * rng.standard_normal())))
        return np.zeros(max(1, min(lengths.longest, drawn)), np.int32)

    groups: list[Group] = []
    while comparisons > 0:
        better = 1 + len(groups) % (lengths.responses // 2)
        pairs = [(w, loser) for w in range(better) for loser in range(better, lengths.responses)]
        responses = [
            tokens(lengths.response, lengths.response_spread) for _ in range(lengths.responses)
        ]
        prompt = tokens(lengths.prompt, lengths.prompt_spread)
        groups.append(Group(prompt, responses, [(*pair, 1.0) for pair in pairs]))
        comparisons -= len(pairs)
    return groups


def imbalance(
    groups: Sequence[Group], step: Step, layout: str, work: Work = TYPICAL
) -> tuple[float, float]:
    """Of the sums of the ranks, and of the rounds."""
    loads = np.array([[row_work(groups, row, layout, work) for row in r] for r in step.ranks])
    mean = loads.sum() / len(loads)
    return float(loads.sum(1).max() / mean), float(loads.max(0).sum() / mean)


def bound(groups: Sequence[Group], step: Step, layout: str) -> float:
    """The imbalance that no plan goes below which leaves parts whole."""
    rows = [row for rank in step.ranks for row in rank]
    mean = sum(row_work(groups, row, layout) for row in rows) / len(step.ranks)
    return max(1.0, max(row_work(groups, (p,), layout) for row in rows for p in row) / mean)


def dealt(groups: Sequence[Group], step: Step, layout: str, max_tokens: int) -> tuple[float, float]:
    """The imbalance of ranks that take the next parts as shuffled, and of rows of best-fit; without
    padding.
    """
    ranks = len(step.ranks)
    parts = [part for rank in step.ranks for row in rank for part in row]
    parts.sort(key=lambda part: part.places)
    loads = [row_work(groups, (part,), layout) for part in parts]
    # As many units on every rank, up to one group.
    owner = [min(part.places) * ranks // step.units for part in parts]
    costs = [part_tokens(groups[p.group], p.responses, layout) for p in parts]
    rows = best_fit_decreasing(costs, max_tokens)
    return _spread(owner, loads, ranks), _spread(
        [number % ranks for number in range(len(rows))],
        [sum(loads[i] for i in row) for row in rows],
        ranks,
    )


def _spread(owner: Sequence[int], loads: Sequence[int], ranks: int) -> float:
    sums = np.bincount(owner, np.array(loads, np.float64), ranks)
    return float(sums.max() / sums.mean())


def work_of(name: str) -> Work:
    """Of a model of `bench.workloads`, fully trained."""
    config = TrainConfig(model_name_or_path=name)
    model = meta_model(config, AutoConfig.for_model(**MODEL_CONFIGS[name]))
    return step_work(ModelShape.of(model, config))


def measured(
    groups: Sequence[Group], options: argparse.Namespace, ranks: int, layout: str, units: int
) -> dict[str, Any]:
    """The figures of one epoch, means over its steps."""

    def plan(work: Work = TYPICAL) -> list[Step]:
        return make_plan(
            groups,
            units_per_step=ranks * units,
            max_tokens=options.max_tokens,
            layout=layout,
            world_size=ranks,
            work=work,
        )

    start = time.perf_counter()
    steps = plan()
    seconds = time.perf_counter() - start
    sums, rounds = zip(*(imbalance(groups, step, layout) for step in steps), strict=True)
    row: dict[str, Any] = {
        "steps": len(steps),
        "rounds": statistics.mean(len(step.ranks[0]) for step in steps),
        "imbalance": statistics.mean(sums),
        "imbalance_of_rounds": statistics.mean(rounds),
        "whole_steps": statistics.mean(sums[:-1]) if len(sums) > 1 else None,
        "worst_step": max(sums),
        "bound": statistics.mean(bound(groups, step, layout) for step in steps),
        "seconds": seconds,
    }
    if layout != "padded":
        chance = [dealt(groups, step, layout, options.max_tokens) for step in steps]
        row["at_random"], row["best_fit"] = map(statistics.mean, zip(*chance, strict=True))
    for name in OTHERS:
        work = work_of(name)
        for key, taken in (("other_models", steps), ("for_model", plan(work))):
            even = statistics.mean(imbalance(groups, step, layout, work)[0] for step in taken)
            row.setdefault(key, {})[name] = even
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan every case, write a row for each and print it."""
    parser = Parser("fastdpo bench balance", __doc__)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--layouts", default="shared,padded")
    parser.add_argument("--ranks", type=_numbers, default=[8, 64, 512], metavar="N,N")
    parser.add_argument("--units", type=_numbers, default=[0], help="a rank and step; 0: a row")
    parser.add_argument("--comparisons", type=int, default=60000, help="of an epoch")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a row")
    options = parser.parse_args(arguments)
    split_lists(parser, options, {"workloads": LENGTHS, "layouts": LAYOUTS})
    results = record.Results("balance", options)
    for name in options.workloads:
        groups = made_up(LENGTHS[name], options.comparisons)
        for layout, ranks, asked in itertools.product(
            options.layouts, options.ranks, options.units
        ):
            units = asked or UNITS.get(name, 16)
            case = {"workload": name, "layout": layout, "ranks": ranks, "units": units}
            row = case | measured(groups, options, ranks, layout, units)
            results.add(**row)
            print(row, flush=True)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
