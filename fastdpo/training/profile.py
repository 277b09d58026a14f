"""A trace of a few steps, for a browser: `profile_steps`."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 2
"""Steps at the start, in which kernels are compiled and memory is first touched."""


def profiler(steps: int, path: Path, device: torch.device) -> AbstractContextManager[Any]:
    """Trace `steps` steps after the first two into `path`, which ui.perfetto.dev opens; with 0,
    nothing. What the block is given wants `step()` to be called where a step ends.
    """
    if steps == 0:
        return nullcontext(SimpleNamespace(step=lambda: None))
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(
        activities=activities,
        schedule=schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(path)),
    )
