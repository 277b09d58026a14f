"""Which rank is slow: ranks wait for each other, so all of them seem to be.

What counts is what a rank does alone. With the whole model on each rank that is every forward and
backward of a step, up to the first exchange of gradients. With shares of it (FSDP), where every
layer waits for the others' shares, it is what is inside of layers once those are there. The wait
for a step's rows, which are made on the host, counts in both.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from .world import World

T = TypeVar("T")

SLOW = 1.3
"""How many times as long as the median a rank takes before it is named."""

NOTICED_S = 0.05
"""And by how many seconds a step: less is the noise of hosts."""

STEPS = 5
"""Steps that are measured together; the first ones, in which everything is made, do not count."""

EVERY = 100
"""Steps between two lines about it."""


class Pace:
    """Seconds that this rank spends alone, and a line about the slowest of all ranks."""

    def __init__(self, world: World, device: torch.device, layers: Sequence[nn.Module]) -> None:
        self.world, self.cuda = world, device.type == "cuda"
        self.seconds = 0.0
        self._open: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []
        self._read_at: int | None = None
        self._said_at = -EVERY
        self.inside_layers = world.size > 1 and world.sharded
        for layer in layers if self.inside_layers else ():
            # After FSDP's own hook before a layer, and before its hook after it.
            layer.register_forward_pre_hook(lambda *_: self._begin())
            layer.register_forward_hook(lambda *_: self._end(), prepend=True)

    @contextmanager
    def rows(self) -> Iterator[None]:
        """While a step's rows are computed."""
        if self.world.size == 1 or self.inside_layers:
            yield
            return
        self._begin()
        yield
        self._end()

    def waits(self, items: Iterable[T]) -> Generator[T, None, None]:
        """The same items; the wait for each counts."""
        start = time.perf_counter()
        for item in items:
            self.seconds += time.perf_counter() - start
            yield item
            start = time.perf_counter()

    def slowest(self, step: int) -> str | None:
        """A line about the slowest rank where it is slow enough; all ranks call it, right after
        the device has been read.
        """
        if self.world.size == 1:
            return None
        if self._read_at is None:  # the first steps
            self._read()
            self._read_at = step
        count = step - self._read_at
        if count < STEPS:
            return None
        taken = self._read() / count
        self._read_at = step
        found = self.world.gather_all((taken, socket.gethostname()))
        times = [seconds for seconds, _ in found]
        usual, most = statistics.median_low(times), max(times)
        if step - self._said_at < EVERY or most < max(SLOW * usual, usual + NOTICED_S):
            return None
        self._said_at = step
        rank = times.index(most)
        return (
            f"rank {rank} ({found[rank][1]}) is slow, and the others wait for it: {most:.3g} s a "
            f"step where the median rank takes {usual:.3g} s"
        )

    def _begin(self) -> None:
        self._open.append(self._now())

    def _end(self) -> None:
        if self._open:
            self._spans.append((self._open.pop(), self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> float:
        for start, end in self._spans:
            if not self.cuda:
                self.seconds += end - start
            elif end.query():  # what is not there yet is left out: nothing waits for it
                self.seconds += start.elapsed_time(end) / 1000
        total, self.seconds = self.seconds, 0.0
        self._spans, self._open = [], []
        return total
