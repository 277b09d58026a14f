"""Micro-benchmarks of the head: one a provider, regime, head, number of tokens and direction.

    python -m pytest bench/test_heads.py --benchmark-only
    FASTDPO_BENCH="--heads llama-3.1-8b --tokens 4096,16384" python -m pytest bench/test_heads.py \
        --benchmark-only --benchmark-json heads.json

They are for comparing two versions of one provider (`--benchmark-compare`), and for a profiler;
tables come from `bench.heads`, whose providers take turns. The variable `FASTDPO_BENCH` has the
options of `bench.heads`; the default is small enough for a CPU. A provider that cannot be had here
is skipped with its reason; one whose numbers are wrong fails. They run only when asked for by name.
"""

import itertools
import os
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from bench import heads
from bench.head_cases import REGIMES, Inputs, Problem
from bench.head_measure import call, examine, failure, memory_as_errors, own_graphs
from bench.head_peers import PROVIDERS
from bench.head_providers import Step, release

DEFAULT = "--heads smollm2 --tokens 64 --regimes frozen,dpo --repeats 3"
OPTIONS = heads.parse(shlex.split(os.environ.get("FASTDPO_BENCH", DEFAULT)))
DEVICE = torch.device(OPTIONS.device)
SKIPPED = ("NotInstalled", "Unsupported", "OutOfMemory")


@pytest.fixture(scope="module", autouse=True)
def limits() -> Iterator[None]:
    """As in the runner."""
    with memory_as_errors(DEVICE), own_graphs():
        yield


@cache
def inputs(head: str, tokens: int) -> Inputs:
    """Made once for all providers and regimes, and its fp64 numbers with it."""
    inputs.cache_clear()
    return Inputs.make(head, tokens, heads.DTYPES[OPTIONS.dtype], DEVICE)


@cache
def checked(head: str, tokens: int, regime: str, name: str) -> tuple[Step | None, dict[str, Any]]:
    """The step, warmed up, and its errors; or None and why there is none. One is kept."""
    checked.cache_clear()
    release()
    problem = Problem.make(inputs(head, tokens), REGIMES[regime], OPTIONS.workspace_mib)
    try:
        found = examine(problem, PROVIDERS[name])
        step = PROVIDERS[name](problem)
        call(step)
    except Exception as error:
        return None, {"error": failure(error)}
    return step, found


def cases() -> list[Any]:
    """Directions innermost, then providers: inputs and steps are made once."""
    chosen = itertools.product(OPTIONS.heads, OPTIONS.tokens, OPTIONS.regimes, OPTIONS.providers)
    return [
        pytest.param(case, part, id="-".join([*map(str, case), part]))
        for case in chosen
        for part in ("forward", "backward", "both")
        if part == "forward" or REGIMES[case[2]].hidden
    ]


def synchronised(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns when the device has done its work."""

    def run(*arguments: Any) -> Any:
        result = function(*arguments)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        return result

    return run


@pytest.mark.parametrize(("case", "part"), cases())
def test_head(benchmark: Any, case: tuple[str, int, str, str], part: str) -> None:
    """Time one direction; the backward gets a fresh forward every time."""
    step, found = checked(*case)
    if step is None:
        kind = found["error"].partition(":")[0]
        (pytest.skip if kind in SKIPPED else pytest.fail)(found["error"])
    assert "refused" not in found, found["refused"]
    benchmark.group = "-".join([*map(str, case[:3]), part])
    benchmark.extra_info |= {"provider": case[3], "dtype": OPTIONS.dtype, **found}
    forward = synchronised(step.forward)
    targets = {
        "forward": (forward, None),
        "backward": (synchronised(step.backward), lambda: ((forward(),), {})),
        "both": (synchronised(lambda: call(step)), None),
    }
    target, setup = targets[part]
    benchmark.pedantic(target, setup=setup, rounds=OPTIONS.repeats, warmup_rounds=1)
