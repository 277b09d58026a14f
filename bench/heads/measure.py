"""What is measured of one provider on one problem: time, memory, errors, and how it failed."""

import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import Problem
from .providers import Output, Passes, Provider, release

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

Facts = dict[str, Any]
_OURS = ("bench", "fastdpo", "fastdpo_kernels")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def call(passes: Passes) -> tuple[Output, tuple[Tensor, ...]]:
    """One forward and backward."""
    output = passes.forward()
    return output, passes.backward(output)


def clock(passes: Passes, device: torch.device) -> dict[str, float]:
    """Seconds of a forward, of its backward, and of both together."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        output = passes.forward()
        events[1].record()
        gradients = passes.backward(output)
        events[2].record()
        torch.cuda.synchronize(device)
        forward, backward = (a.elapsed_time(b) / 1e3 for a, b in pairwise(events))
    else:
        times = [time.perf_counter()]
        output = passes.forward()
        times.append(time.perf_counter())
        gradients = passes.backward(output)
        times.append(time.perf_counter())
        forward, backward = (b - a for a, b in pairwise(times))
    del gradients
    return {"forward_s": forward, "backward_s": backward, "total_s": forward + backward}


def peak_bytes(function: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """The most that `function` has allocated at one time, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    # The profiler reports its start and stop on stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    gc.collect()  # what earlier calls left in circles would count as given back by this one
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result


def _tensors(output: Output, gradients: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor for tensor in (*output, *gradients) if tensor is not None]


def examine(problem: Problem, build: Provider) -> Facts:
    """Memory, errors, whether two calls give the same bits, and whether the errors are too large
    for the time to count.
    """
    passes = build(problem)
    first = call(passes)
    release()
    peak, (output, gradients) = peak_bytes(lambda: call(passes), problem.inputs.weight.device)
    held = sum(g.numel() * g.element_size() for g in gradients)
    facts: Facts = {
        "peak_mib": peak / 2**20,
        "gradient_mib": held / 2**20,
        "workspace_mib": (peak - held) / 2**20,
        "deterministic": all(map(torch.equal, _tensors(*first), _tensors(output, gradients))),
    }
    if output.logps is not None:
        if gradients and problem.regime.hidden:
            gradients = (passes.in_order(gradients[0]), *gradients[1:])
        loss = output.value.detach() if problem.regime.dpo else None
        if loss is not None:
            facts["loss"] = loss.item()
        errors = problem.errors(output.logps.detach(), gradients, loss)
        reason = problem.refusal(errors)
        facts |= errors | ({"refused": reason} if reason else {})
    return facts


def failure(error: BaseException) -> str:
    """What became of a provider, in one line: `NotInstalled` (a package that is not ours cannot be
    imported), `Unsupported`, `OutOfMemory`, or else the type of the error, and its reason.
    """
    text = str(error).strip() or "-"
    kind = type(error).__name__
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in _OURS:
        kind = "NotInstalled"
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in text.lower() for words in _OUT_OF_MEMORY
    ):
        # A compiler wraps what happens under it, the CPU's allocator raises a RuntimeError.
        kind = "OutOfMemory"
    return f"{kind}: {text.splitlines()[0][:200].replace('|', '/')}"


@contextmanager
def memory_as_errors(device: torch.device) -> Iterator[None]:
    """On a CPU, let an allocation beyond the memory that is free now fail.

    Otherwise Linux grants it and ends the process when it is written. Elsewhere nothing is done.
    """
    status, meminfo = Path("/proc/self/status"), Path("/proc/meminfo")
    if device.type != "cpu" or resource is None or not (status.exists() and meminfo.exists()):
        yield
        return
    kib: dict[str, int] = {}
    for file in (status, meminfo):
        kib |= {
            name: int(size) for name, size in re.findall(r"(\w+):\s+(\d+) kB", file.read_text())
        }
    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = (kib["VmData"] + kib["MemAvailable"]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextmanager
def own_graphs() -> Iterator[None]:
    """Let whatever is compiled meanwhile have a graph for each shape that it meets.

    A compiler that has seen another shape before would make its graph for any shape, and stop
    compiling after some cases.
    """
    import torch._dynamo

    torch.compiler.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield
