"""Micro-benchmarks of the head: one a provider, regime, head, number of tokens and direction.

    python -m pytest bench/heads/test_micro.py --benchmark-only
    FASTDPO_BENCH="--heads llama-3.1-8b --tokens 4096,16384" python -m pytest \
        bench/heads/test_micro.py --benchmark-only --benchmark-json heads.json

They are for comparing two versions of one provider (`--benchmark-compare`), and for a profiler;
tables come from `bench.heads`, whose providers take turns. The variable `FASTDPO_BENCH` has the
options of `bench.heads`; the default is small enough for a CPU. A provider that cannot be had here
is skipped with its reason; one whose numbers are wrong fails. They run only when asked for by name.
"""

import itertools
import os
import shlex
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from .cases import REGIMES, Inputs, Problem
from .measure import call, examine, failure, memory_as_errors, own_graphs
from .providers import Passes, release
from .run import DTYPES, PROVIDERS, parse

DEFAULT = "--heads smollm2 --tokens 64 --regimes frozen,dpo --repeats 3"
OPTIONS = parse(shlex.split(os.environ.get("FASTDPO_BENCH", DEFAULT)))
DEVICE = torch.device(OPTIONS.device)
SKIPPED = ("NotInstalled", "Unsupported", "OutOfMemory")
# Directions innermost, then providers: inputs and passes are made once.
CASES = [
    (*case, part)
    for case in itertools.product(OPTIONS.heads, OPTIONS.tokens, OPTIONS.regimes, OPTIONS.providers)
    for part in ("forward", "backward", "both")
    if part == "forward" or REGIMES[case[2]].hidden
]


@pytest.fixture(scope="module", autouse=True)
def limits() -> Iterator[None]:
    """As in the runner."""
    with memory_as_errors(DEVICE), own_graphs():
        yield


@lru_cache(1)
def inputs(head: str, tokens: int) -> Inputs:
    """Made once for all providers and regimes, and its fp64 numbers with it."""
    return Inputs.make(head, tokens, DTYPES[OPTIONS.dtype], DEVICE)


@lru_cache(1)
def checked(head: str, tokens: int, regime: str, name: str) -> tuple[Passes | None, dict[str, Any]]:
    """The passes, warmed up, and what is known of them; or None and why there are none."""
    release()
    problem = Problem.make(inputs(head, tokens), REGIMES[regime], OPTIONS.workspace_mib)
    try:
        facts = examine(problem, PROVIDERS[name])
        passes = PROVIDERS[name](problem)
        call(passes)
    except Exception as error:
        return None, {"error": failure(error)}
    return passes, facts


def wait() -> None:
    """Until the device has done its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


@pytest.mark.parametrize(("head", "tokens", "regime", "name", "part"), CASES)
def test_head(benchmark: Any, head: str, tokens: int, regime: str, name: str, part: str) -> None:
    """Time one direction; the backward gets a fresh forward every time."""
    passes, facts = checked(head, tokens, regime, name)
    if passes is None:
        kind = facts["error"].partition(":")[0]
        (pytest.skip if kind in SKIPPED else pytest.fail)(facts["error"])
    assert "refused" not in facts, facts["refused"]
    benchmark.group = f"{head}-{tokens}-{regime}-{part}"
    benchmark.extra_info |= {"provider": name, "dtype": OPTIONS.dtype, **facts}

    def timed(*output: Any) -> None:
        kept: Any = passes.backward(*output) if output else passes.forward()
        if part == "both":
            kept = passes.backward(kept)
        wait()
        del kept

    def forward() -> tuple[Any, dict[str, Any]]:
        output = passes.forward()
        wait()
        return (output,), {}

    setup = forward if part == "backward" else None
    benchmark.pedantic(timed, setup=setup, rounds=OPTIONS.repeats, warmup_rounds=1)
