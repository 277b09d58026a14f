"""What a process holds between steps, and the most that it holds during one."""

import gc
from collections.abc import Iterable
from typing import Any

import torch
from fastdpo_kernels.tiles import release_workspace
from torch import Tensor
from torch._C._profiler import _EventType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile


def held(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this process, each storage once: of weights, their gradients and states, and of
    every tensor that is alive (`all`). Of a sharded one it is the share that counts.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = {"weights": weights, "gradients": gradients, "states": states}
    found = {name: storage_bytes(values) for name, values in tensors.items()}
    return found | {"all": storage_bytes(_alive())}


def storage_bytes(values: Iterable[Any]) -> int:
    """Of the distinct storages of those that are tensors."""
    storages = {}
    for value in values:
        if isinstance(value, Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            if local.device.type != "meta":
                storage = local.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def optimizer_alive() -> torch.optim.Optimizer:
    """The one optimizer of this process.

    Raises:
        ValueError: there is none, or more than one.
    """
    (found,) = [
        thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer)
    ]
    return found


def _alive() -> list[Tensor]:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return [tensor for tensor in tensors if type(tensor) in (Tensor, torch.nn.Parameter, DTensor)]


class Peak:
    """The most bytes of tensors that are allocated at once from `start` to `stop`, beyond those
    that were there before.
    """

    def start(self) -> None:
        """Begin to record."""
        release_workspace()
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.start()

    def stop(self) -> int:
        """End it; bytes."""
        self.profile.stop()
        found: list[tuple[int, int]] = []
        waiting = list(self.profile.profiler.kineto_results.experimental_event_tree())
        while waiting:
            event = waiting.pop()
            waiting += event.children
            if event.tag == _EventType.Allocation:
                found.append((event.start_time_ns, event.extra_fields.alloc_size))
        now = most = 0
        for _, size in sorted(found, key=lambda entry: entry[0]):
            now += size
            most = max(most, now)
        return most
