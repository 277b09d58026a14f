"""What a rank sends: counted at torch's collectives, and read from the loopback's own counter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_COUNTERS = Path("/proc/net/dev")


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends in every collective of torch.distributed inside, by its
    kind, as an algorithm sends them that sends no byte twice.

    Of N ranks each sends 2·(N−1)/N of what it adds up everywhere (a ring), (N−1)/N of what is
    gathered, broadcast, or added up and shared out, and of an all-to-all what is for others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its collectives come back, on plain tensors
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional"):
            for kind, sent in _sent(space, name, args):
                self.bytes[kind] = self.bytes.get(kind, 0.0) + sent
        return func(*args, **(kwargs or {}))

    def take(self) -> dict[str, float]:
        """What was sent since the last call."""
        taken, self.bytes = self.bytes, {}
        return taken


def _sent(space: str, name: str, args: Sequence[Any]) -> list[tuple[str, float]]:
    """Kind and bytes of a collective; nothing for those that carry no tensors."""
    if space == "_c10d_functional":
        return _sent_functional(name, args)
    if name == "allreduce_":
        return [("all_reduce", 2 * _others(args[1]) * _size(args[0]))]
    if name == "_allgather_base_":
        return [("all_gather", args[0].nbytes - args[1].nbytes)]
    if name == "allgather_":
        return [("all_gather", _others(args[2]) * sum(map(_size, args[0])))]
    if name == "_reduce_scatter_base_":
        return [("reduce_scatter", args[1].nbytes - args[0].nbytes)]
    if name == "broadcast_":
        return [("broadcast", _others(args[1]) * _size(args[0]))]
    if name == "scatter_":
        return [("scatter", _others(args[2]) * sum(map(_size, args[1])))]
    if name == "alltoall_base_":
        group, counts = _group(args[2]), args[4]
        if not counts:
            return [("all_to_all", _others(args[2]) * args[1].nbytes)]
        kept = counts[group.rank()] / sum(counts) if sum(counts) else 1.0
        return [("all_to_all", (1 - kept) * args[1].nbytes)]
    if name in ("barrier", "monitored_barrier_"):
        return []
    raise NotImplementedError(f"{name}: what a rank sends of it is not known here")


def _sent_functional(name: str, args: Sequence[Any]) -> list[tuple[str, float]]:
    """The same of the collectives that DTensors use."""
    if name.startswith("all_reduce"):
        return [("all_reduce", 2 * _others(args[2]) * args[0].nbytes)]
    if name.startswith("all_gather_into_tensor"):
        return [("all_gather", (args[1] - 1) * args[0].nbytes)]
    if name.startswith("reduce_scatter_tensor"):
        return [("reduce_scatter", (args[2] - 1) / args[2] * args[0].nbytes)]
    if name in ("wait_tensor", "_wrap_tensor_autograd"):
        return []
    raise NotImplementedError(f"{name}: what a rank sends of it is not known here")


def _group(named: Any) -> Any:
    if isinstance(named, str):
        return dist.distributed_c10d._resolve_process_group(named)
    return named if isinstance(named, dist.ProcessGroup) else dist.ProcessGroup.unbox(named)


def _others(boxed: Any) -> float:
    size: int = _group(boxed).size()
    return (size - 1) / size


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def loopback_bytes() -> int | None:
    """What this machine has sent itself over TCP since it started, headers included; None where
    the counter is not there.
    """
    if not _COUNTERS.exists():
        return None
    for line in _COUNTERS.read_text(encoding="utf-8").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    return None
