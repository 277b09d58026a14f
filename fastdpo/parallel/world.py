"""The processes of a run, one a device, as torchrun started them.

A rank has three coordinates: which replica of the model it belongs to, which share of that replica
it holds, and which stretch of a row it computes. Ranks that differ in the last alone are given the
same rows; every other rank has rows of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from .connect import connected
from .meeting import refused

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..config import TrainConfig

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What torchrun tells each process that it starts."""


@dataclass(frozen=True)
class World:
    """This process among those of the run; the default is a run of one process.

    Attributes:
        rank, size: this process's number and how many there are.
        local_rank, local_size: the same on this host.
        cp_size: ranks that compute each row together.
        mesh: (replicas, shares) of ranks; None where each has the whole model.
        vocabulary: whether the head stays sharded, over the vocabulary.
        context: the ranks that share this one's rows, where there are others.
        data: the ranks with rows of their own that have this one's place in the context.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    cp_size: int = 1
    mesh: DeviceMesh | None = None
    vocabulary: bool = False
    context: Any = None
    data: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether ranks hold shares of the weights and run every forward together."""
        return self.mesh is not None

    @property
    def data_rank(self) -> int:
        """Which of the ranks with rows of their own this is."""
        return self.rank // self.cp_size

    @property
    def data_size(self) -> int:
        """How many ranks have rows of their own."""
        return self.size // self.cp_size

    @property
    def hosts(self) -> int:
        """How many hosts there are, each with as many ranks as this one."""
        return max(1, self.size // self.local_size)

    def with_shares(self, replicas: int, device: torch.device, vocabulary: bool = False) -> World:
        """The world with so many replicas of the model, each in shares of the ranks of it; the head
        too, over the `vocabulary`.
        """
        from torch.distributed.device_mesh import DeviceMesh

        ranks = torch.arange(self.size).view(replicas, -1)
        mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("replicate", "shard"))
        return replace(self, mesh=mesh, vocabulary=vocabulary)

    def share(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks with rows of their own, on every rank."""
        if self.data_size == 1:
            return [value]
        values: list[Any] = [None] * self.data_size
        dist.all_gather_object(values, value, group=self.data)
        return values

    def gather_all(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks with rows of their own, in place."""
        if self.data_size > 1:
            dist.all_reduce(tensor, group=self.data)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """What the first rank of each host makes is there when its other ranks begin."""
        if self.local_rank == 0:
            yield
        self.barrier()
        if self.local_rank != 0:
            yield
        self.barrier()


ALONE = World()


@contextmanager
def joined(config: TrainConfig) -> Iterator[World]:
    """The processes of this run, connected for the time of the block.

    Raises:
        ConfigError: what torchrun says does not fit the configuration.
    """
    try:
        world, cuda = _found(config)
    except ConfigError as error:
        raise refused(error) if "WORLD_SIZE" in os.environ else error from None
    if world.size == 1:
        yield world
        return
    with connected(config, world.rank, world.size, cuda):
        yield _with_groups(world)


def _found(config: TrainConfig) -> tuple[World, bool]:
    """This process among the others, not yet connected, and whether they have a GPU each."""
    numbers = _numbers()
    if numbers is None:
        if (config.devices or 1) > 1:
            raise config.error(
                "devices",
                f"a script is one process; start it with torchrun --nproc_per_node "
                f"{config.devices}",
            )
        config.check_contexts(1)
        return ALONE, False
    rank, size, local_rank, local_size = numbers
    if config.devices not in (None, local_size):
        raise config.error(
            "devices", f"torchrun started {local_size} on this host, got {config.devices}"
        )
    config.check_contexts(size)
    cuda = torch.cuda.is_available() and not config.use_cpu
    if cuda and size > 1:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"expected a GPU for each of the {local_size} processes of this host, found "
                f"{torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
    return World(rank, size, local_rank, local_size, config.cp_size), cuda


def _numbers() -> tuple[int, int, int, int] | None:
    """Rank, size and the same on this host; None for a process that stands alone."""
    if "WORLD_SIZE" not in os.environ:
        return None
    found = {}
    for name in sorted(VARIABLES, key="WORLD_SIZE".__ne__):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            if os.environ["WORLD_SIZE"] == "1":
                return None
            raise ConfigError(
                f"{name}: expected a number, as torchrun sets it, got {text or 'nothing'}"
            )
        found[name] = int(text)
    rank, size, local_rank, local_size = (found[name] for name in VARIABLES)
    return rank, size, local_rank, local_size


def _with_groups(world: World) -> World:
    """The world with its groups of ranks, which every rank has to make in the same order."""
    if world.cp_size == 1:
        return world  # torch's default group; a reference would keep its connections open
    context = data = None
    for start in range(0, world.size, world.cp_size):
        ranks = list(range(start, start + world.cp_size))
        group = dist.new_group(ranks)
        context = group if world.rank in ranks else context
    for start in range(world.cp_size):
        ranks = list(range(start, world.size, world.cp_size))
        group = dist.new_group(ranks)
        data = group if world.rank in ranks else data
    return replace(world, context=context, data=data)
