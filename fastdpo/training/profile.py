"""A trace of a few steps, for a browser: `profile_steps`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity

SKIPPED = 2
"""Steps at the start, in which kernels are compiled and memory is first touched."""


class Profiler(Protocol):
    """What wants to know where steps end."""

    def step(self) -> None:
        """A step has ended."""


class _Nothing:
    def step(self) -> None:
        pass


@contextmanager
def profiler(steps: int, path: Path, device: torch.device) -> Iterator[Profiler]:
    """Trace `steps` steps after the first two into `path`, which ui.perfetto.dev opens; with 0,
    nothing.
    """
    if steps == 0:
        yield _Nothing()
        return
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    def write(profile: Any) -> None:
        profile.export_chrome_trace(str(path))

    schedule = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=write
    ) as profile:
        yield profile
