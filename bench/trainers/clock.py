"""What is measured of a trainer's run: its steps, its memory, and what the machine could do.

The interpreters of other trainers import this too, so it needs the standard library and torch
alone.
"""

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

Metrics = Mapping[str, float | None]


class NotInstalled(Exception):
    """What this trainer needs is not here."""


class Unsupported(Exception):
    """This trainer has no such setting."""


class Clock:
    """The duration, the metrics and the computed tokens of every optimizer step; of fastdpo also a
    trace where one was asked for, and the peak memory that `fastdpo plan` predicts, on a GPU.

    A step is timed from the end of the one before to its own end, with the device idle at both, so
    that loading the rows and logging are in it; the first one begins where the model is first
    called with gradients. The embedding that is called there tells how many tokens are computed.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.metrics: list[Metrics] = []
        self.tokens: list[int] = []
        self.attention = ""
        self.trace: dict[str, Any] = {}
        self.planned_mib: float | None = None
        self._computed = 0
        self._last = 0.0
        self._find = register_module_forward_pre_hook(self._start)

    def _start(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        config = getattr(module, "config", None)
        self.attention = self.attention or getattr(config, "_attn_implementation", "")
        self._last = self._last or _now()
        if isinstance(module, torch.nn.Embedding):
            self._find.remove()
            module.register_forward_pre_hook(self._count)
            self._count(module, inputs)

    def _count(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._computed += inputs[0].numel()

    def stop(self, metrics: Metrics | None = None) -> None:
        """A step ends now; what was logged of it, where that is known already."""
        now = _now()
        self.seconds.append(now - self._last)
        self.tokens.append(self._computed)
        self._last, self._computed = now, 0
        if metrics is not None:
            self.metrics.append(metrics)

    def restart(self) -> None:
        """The next step begins now, not where the last one ended."""
        self._last = _now()

    def callback(self) -> Any:
        """A callback for trainers that are built on that of Transformers."""
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):
            def on_step_end(self, *arguments: Any, **more: Any) -> None:
                clock.stop()

            def on_log(self, *arguments: Any, logs: Any = None, **more: Any) -> None:
                if logs and "loss" in logs:
                    clock.metrics.append(logs)

        return Steps()

    def report(self, dtype: str) -> dict[str, Any]:
        """What a run's process prints: figures of every step, the peak of memory, and the speed of
        the machine's matrix products.
        """
        return {
            "step_s": self.seconds,
            "tokens": self.tokens,
            "loss": [metrics["loss"] for metrics in self.metrics],
            "grad_norm": [metrics.get("grad_norm") for metrics in self.metrics],
            "head_passes": [metrics.get("head_passes") for metrics in self.metrics],
            "attention": self.attention,
            "peak_mib": peak_mib(),
            "product_tflops": product_tflops(dtype),
        }


def print_report(report: Mapping[str, Any]) -> None:
    """As the last line of the output, where whoever started this process reads it."""
    sys.stderr.flush()
    print("\n" + json.dumps(report), flush=True)


def device() -> torch.device:
    """What is trained on here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_mib() -> float:
    """The most memory so far: allocated on a GPU, otherwise resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins with that of the process that started this one
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 1024 if sys.platform != "darwin" else kib / 2**20


def product_tflops(dtype: str) -> float:
    """What a large matrix product of this dtype reaches here, in TFLOP/s: the best of five."""
    size = 8192 if torch.cuda.is_available() else 2048
    a = torch.ones(size, size, device=device(), dtype={"bf16": torch.bfloat16}.get(dtype))
    best = float("inf")
    for _ in range(5):
        start = _now()
        torch.mm(a, a)
        best = min(best, _now() - start)
    return 2 * size**3 / best / 1e12


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
