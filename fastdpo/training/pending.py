"""Metrics of the steps since the last line of the log.

On a GPU they stay there until they are asked for: reading a number makes the host wait for every
kernel before it, and the device then waits for the host. A step whose loss or gradient is not
finite must not touch the weights all the same, and none after it. So the fused optimizers are
handed a flag on the device that makes them leave everything as it is, and that never goes down.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import FastDPOError
from . import metrics
from .step import StepBatches


class Pending:
    """Collects steps; `read` brings them to the host, `line` averages what was read."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self.values: dict[str, list[float]] = {}
        self.optimizer = optimizer
        self.waits = device.type != "cuda" or not getattr(optimizer, "defaults", {}).get("fused")
        """Whether every step is read before its optimizer's."""
        self.in_backward = False
        """Whether weights are stepped before the norm of all gradients is known."""
        self._unread: list[tuple[int, StepBatches, metrics.StepSums, Tensor, float]] = []
        self._bad = torch.zeros((), device=device)
        self._seconds = 0.0

    def check(
        self, number: int, step: StepBatches, sums: metrics.StepSums, norm: Tensor, rate: float
    ) -> None:
        """Take the figures of step `number` before its optimizer's; FastDPOError where they are
        read at once and not finite.
        """
        self._unread.append((number, step, sums, norm, rate))
        if self.waits:
            self._values()
            return
        self.flag(norm, sums.sums[0])

    def flag(self, *values: Tensor) -> None:
        """From the first value that is not finite on, the optimizer leaves everything as it is."""
        for value in values:
            bad = (~torch.isfinite(value)).to(self._bad)
            self._bad = torch.maximum(self._bad, bad)
        self.optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    def guard(self, step: int, loss: Tensor) -> None:
        """Take a loss before a backward that steps weights; FastDPOError where it is read at once
        and not finite.
        """
        if not self.waits:
            self.flag(loss.detach())
        elif not math.isfinite(value := loss.item()):
            raise self._not_finite(step, "loss", value)

    def took(self, seconds: float) -> None:
        """What the host spent on the step."""
        self._seconds += seconds

    def read(self, rates: Callable[..., dict[str, float]]) -> dict[str, float]:
        """The figures of the last step; every step before it is read with it.

        `rates` makes the throughput of all of them together from their units, tokens of
        sequences, computed tokens and seconds.

        Raises:
            FastDPOError: the loss or the gradient of a step was not finite; the weights are those
                before it.
        """
        start = time.perf_counter()
        steps = self._values()
        self._seconds += time.perf_counter() - start
        taken = [step for _, step, *_ in self._unread]
        counts = ("units", "pair_tokens", "computed_tokens")
        total = [sum(getattr(step, name) for step in taken) for name in counts]
        speed = rates(*total, self._seconds)
        for values in steps:
            for name, value in (values | speed).items():
                self.values.setdefault(name, []).append(value)
        self._unread, self._seconds = [], 0.0
        return steps[-1] | speed

    def _values(self) -> list[dict[str, float]]:
        """One transfer for all steps that are not yet read."""
        table = torch.stack(
            [
                torch.cat([sums.sums, norm.detach().double().view(1)])
                for _, _, sums, norm, _ in self._unread
            ]
        )
        steps = []
        for (step, taken, sums, _, rate), row in zip(self._unread, table.tolist(), strict=True):
            values: dict[str, Any] = sums.means(row[:-1]) | {"grad_norm": row[-1]}
            for name in ("loss", "grad_norm"):
                if not math.isfinite(values[name]):
                    raise self._not_finite(step, name, values[name])
            if taken.head_passes is not None:
                values["head_passes"] = taken.head_passes
            steps.append(values | {"learning_rate": rate})
        return steps

    def _not_finite(self, step: int, name: str, value: float) -> FastDPOError:
        left = f"stopped with the weights of step {step}"
        if self.in_backward and name == "grad_norm":
            left = (
                "stopped, but optimizer_in_backward had stepped weights by then, so those of step "
                f"{step} are gone: go on from the last checkpoint"
            )
        return FastDPOError(
            f"step {step + 1}: {name} is {value}; {left} (try a lower learning_rate, or fp32: "
            "--bf16 false)"
        )

    def line(self) -> dict[str, float]:
        """Means of what was read since the last line; of the gradient norm and the learning rate,
        the last.
        """
        result = {name: sum(values) / len(values) for name, values in self.values.items()}
        result |= {name: self.values[name][-1] for name in ("grad_norm", "learning_rate")}
        self.values = {}
        return result
