"""The connection of this rank to the others, and how a run of several ranks ends."""

from __future__ import annotations

import gc
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from ..config import TrainConfig
from .faults import Fault, OtherRankError, raised
from .meeting import Card, meet, open_store
from .watch import Watch


@contextmanager
def connected(config: TrainConfig, rank: int, size: int, cuda: bool) -> Iterator[None]:
    """With torch's process group of all ranks, which is the caller's where there is one already.

    What one rank raises inside ends the run on all of them: each raises what came first, and one
    of them says it.

    Raises:
        FastDPOError: ranks that have not come, or do not do the same.
    """
    ours = not dist.is_initialized()
    timeout = float(config.ddp_timeout)
    whole = open_store(timeout) if ours else dist.distributed_c10d._get_default_store()
    cards, store = meet(whole, rank, size, Card.of(config.to_dict()), timeout)
    watch = Watch(store, rank, [card.host for card in cards], timeout)
    try:
        if ours:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )
        yield
    except BaseException as error:
        fault = watch.report(Fault.of(error, rank, socket.gethostname()))
        # Others wait until the last reference to a group has gone, and its connections with it.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        _leave(ours)
        ending = raised(error, fault, rank)
        if isinstance(ending, OtherRankError) and ending.said:
            watch.wait_for_speaker()
        if ending is error:
            raise
        raise ending from None
    watch.close()
    _leave(ours)


def _leave(ours: bool) -> None:
    if ours and dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
