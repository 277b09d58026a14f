"""What has to be the same on every rank although each reads it from its own host's disk."""

import socket

import torch
from torch import nn

from ..errors import DataError, FastDPOError, ModelError
from .world import World


def same_data(world: World, digest: str, name: str) -> None:
    """Compare the data that ranks have read, under a key's `name`.

    Raises:
        DataError: a rank has other data than the first one; on all ranks.
    """
    _same(
        world, digest, f"{name}: other rows, or a tokenizer that reads them otherwise,", DataError
    )


def same_weights(world: World, model: nn.Module) -> None:
    """Compare the weights that ranks have read, by a sum of their bits.

    Raises:
        ModelError: a rank has other weights than the first one; on all ranks.
    """
    if world.size == 1:
        return
    sums = [torch.hash_tensor(weight.detach().reshape(-1)) for weight in model.parameters()]
    digest = str(torch.stack(sums).tolist()) if sums else ""
    _same(world, digest, "model_name_or_path: other weights", ModelError)


def _same(world: World, digest: str, what: str, kind: type[FastDPOError]) -> None:
    found = world.gather_all((digest, socket.gethostname()))
    expected, first = found[0]
    for rank, (other, host) in enumerate(found):
        if other != expected:
            raise kind(f"{what} on rank {rank} ({host}) than on rank 0 ({first})")
