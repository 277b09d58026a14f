"""Counting the memory of real runs on a CPU, to compare predictions with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fastdpo_kernels.tiles import release_workspace
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


class Saved:
    """Bytes of the distinct storages that autograd keeps, those of `known` tensors left out."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: dict[int, int] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @contextmanager
    def watching(self) -> Iterator["Saved"]:
        """Count what is saved inside; what is counted must stay alive until `total` is read."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield self

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.sizes.values())


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes that `function` has allocated at once, beside what was there before.

    Every allocation of tensors is in the profiler's record, those inside operators included.
    """
    release_workspace()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    found: list[tuple[int, int]] = []
    waiting = list(recorded.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, size in sorted(found, key=lambda entry: entry[0]):
        now += size
        peak = max(peak, now)
    return peak
