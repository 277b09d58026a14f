"""How a run's model and rows lie over its devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..config import TrainConfig
from ..config.optimizer import BITSANDBYTES


@dataclass(frozen=True)
class Spread:
    """Devices, and what each of them holds; the default is one device.

    Attributes:
        name: "replicate", "fsdp" or "hsdp".
        devices: of all hosts together.
        local: of one host.
        replicas: how many whole models there are.
        cp_size: devices that compute each row together.
        vocabulary: whether the output head stays sharded over the vocabulary.
        reason: why it is this one, where that was decided here.
    """

    name: str = "replicate"
    devices: int = 1
    local: int = 1
    replicas: int = 1
    cp_size: int = 1
    vocabulary: bool = False
    reason: str = field(default="", compare=False)

    @property
    def hosts(self) -> int:
        """How many hosts there are."""
        return self.devices // self.local

    @property
    def ranks(self) -> int:
        """How many devices, or groups of `cp_size` of them, have rows of their own."""
        return self.devices // self.cp_size

    @property
    def shards(self) -> int:
        """In how many shares a model lies."""
        return 1 if self.name == "replicate" else self.devices // self.replicas

    def share(self, size: int) -> int:
        """A device's share of so many bytes, rounded up."""
        return -(-size // self.shards)


ONE = Spread()

TIED = "vocabulary needs a head of its own, and this model's is the embedding too; use gathered"
"""Why a head that is tied to the embedding cannot stay sharded."""


def spread_of(config: TrainConfig, devices: int, local: int, name: str) -> Spread:
    """The spread of a run over so many devices, `local` of them on a host.

    Args:
        name: "replicate", "fsdp" or "hsdp": what `data_parallel` says, or what was chosen for auto.

    Raises:
        ConfigError: devices that do not divide as the configuration says, or a key that cannot be
            honoured there.
    """
    config.check_contexts(devices)
    for key, problem in obstacles(config, devices, name):
        raise config.error(key, problem)
    replicas = devices if name == "replicate" else 1
    if name == "hsdp":
        replicas = config.dp_replicate_size or devices // local
        if devices % replicas:
            problem = f"expected a divisor of the {devices} devices, got {replicas}"
            raise config.error("dp_replicate_size", problem)
        if replicas in (1, devices):
            group = "all devices are" if replicas == 1 else "each device is"
            raise config.error(
                "data_parallel",
                f"hsdp keeps a model in each of several groups of devices, and here {group} one; "
                f"take fsdp or replicate, or another dp_replicate_size that divides {devices}",
            )
    vocabulary = config.head_parallel == "vocabulary" and devices > replicas
    return Spread(name, devices, local, replicas, config.cp_size, vocabulary)


def obstacles(config: TrainConfig, devices: int, name: str) -> Iterator[tuple[str, str]]:
    """Keys that cannot be honoured on so many devices, each with what is wrong."""
    if devices == 1:
        return
    for key in ("optimizer_in_backward", "optimizer_offload"):
        if getattr(config, key):
            yield key, "cannot go with several devices: they add gradients up"
    if config.head_parallel == "vocabulary" and config.cp_size > 1:
        yield "head_parallel", "vocabulary goes with cp_size 1"
    if name != "replicate":
        yield from cannot_shard(config)


def cannot_shard(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Keys for which the model has to be whole on each device, each with why."""
    if config.load_in_4bit:
        yield "load_in_4bit", "a base in 4 bits cannot be sharded; take data_parallel replicate"
    if config.use_liger_kernel:
        yield "use_liger_kernel", "layers with Liger's kernels cannot be checked before sharding"
    if config.torch_compile:
        yield "torch_compile", "compiled layers cannot be sharded"
    if config.optim in BITSANDBYTES:
        yield "optim", f"the states of {config.optim} cannot be sharded; adamw_torch_8bit's can"
