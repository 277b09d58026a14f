"""Processes that are started once and then are the ranks of one run after another."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest
import torch

SECONDS = 120
"""How long a case may take before it counts as one that hangs."""


PRELOADED = (
    "context_ranks",
    "fastdpo.training.run",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)


def forking() -> ForkServerContext:
    """Starts processes as copies of one that has imported everything, with one thread each."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()
    return context


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """Processes that call functions as torchrun would have started them for that."""

    def __init__(self, processes: int) -> None:
        context = forking()
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, size: int, function: Callable[..., Any], *args: Any, **keys: Any) -> list:
        """What a function returns on each of `size` ranks, in their order.

        Raises:
            AssertionError: it raised on one of them, or did not come back.
        """
        port = free_port()
        for rank, pipe in enumerate(self.pipes[:size]):
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            where |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            pipe.send(({name: str(value) for name, value in where.items()}, function, args, keys))
        results = []
        for rank, pipe in enumerate(self.pipes[:size]):
            assert pipe.poll(SECONDS), f"rank {rank} of {size} hangs in {function.__name__}"
            ok, result = pipe.recv()
            assert ok, f"rank {rank} of {size}: {result}"
            results.append(result)
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def ranks(processes: int) -> Iterator[Ranks]:
    """So many processes for the time of the block."""
    made = Ranks(processes)
    try:
        yield made
    finally:
        made.close()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            where, function, args, keys = pipe.recv()
        except EOFError:
            return
        os.environ.update(where)
        try:
            pipe.send((True, function(*args, **keys)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
