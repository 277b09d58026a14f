"""A run of the trainer in a process of its own that can be killed at any moment.

The runs are forked from a server that has imported everything once. Each notes what it is doing in
a file, which outlives it, and counts the calls that change the disk: files that are opened to be
written, renamed, removed or brought to the disk, directories, safetensors. A `Kill` is either after
a time, from outside, or at such a call, from inside. A run of several ranks is as many processes,
told what torchrun would tell them; when one of them ends otherwise than well, so do the others.
"""

import builtins
import functools
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOADED = (
    "fastdpo.training.run",
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
)
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
_WRITES = os.O_WRONLY | os.O_RDWR
_MOMENT = 0.2


@dataclass(frozen=True)
class Kill:
    """When a run is killed: `seconds` after its start, or at a call that changes the disk, with
    nothing of it done or with `half` of it: the one of number `call`, or the first one whose phase
    and name begin as `place` says. Of several ranks it is one, or all of them at once.
    """

    seconds: float | None = None
    call: int | None = None
    place: str | None = None
    half: bool = False
    rank: int = 0
    all_ranks: bool = False


@dataclass(frozen=True)
class Run:
    """How a run ended: its exit code (-9 where it was killed), how long it took, the phase and the
    call it was in, of the rank that was to be killed, and the phase and name of every call that
    each rank made.
    """

    code: int
    seconds: float
    phase: str
    call: str
    by_rank: list[list[tuple[str, str]]]
    text: str

    @property
    def calls(self) -> list[tuple[str, str]]:
        """Those of the first rank."""
        return self.by_rank[0]


class Processes:
    """Starts runs; their notes are kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # What the server inherits: one thread, so that runs repeat; no device, which cannot fork.
        inherited = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        with _environment(inherited):
            self.context = multiprocessing.get_context("forkserver")
            self.context.set_forkserver_preload(list(PRELOADED))
            self.context.Process(target=time.time).start()

    def run(self, values: dict[str, Any], kill: Kill | None = None, ranks: int = 1) -> Run:
        """Train with this configuration until the end, or until the kill."""
        kill, port = kill or Kill(), _free_port()
        (self.folder / "text").write_text("")
        processes = []
        start = time.perf_counter()
        for rank in range(ranks):
            for name in ("status", "calls.json"):
                (self.folder / f"{rank}-{name}").write_text("")
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            where |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            told = {name: str(value) for name, value in where.items()} if ranks > 1 else {}
            own = kill if rank == kill.rank else Kill()
            arguments = (values, self.folder, own, rank, told)
            processes.append(self.context.Process(target=_run, args=arguments))
            processes[-1].start()
        self._wait(processes, kill)
        seconds = time.perf_counter() - start
        phase, _, call = self._note(kill.rank, "status").strip().partition(": ")
        calls = [json.loads(self._note(rank, "calls.json") or "[]") for rank in range(ranks)]
        codes = [process.exitcode or 0 for process in processes]
        return Run(
            code=-9 if -9 in codes else next((code for code in codes if code), 0),
            seconds=seconds,
            phase=phase or "loading",
            call=call,
            by_rank=[[tuple(call) for call in one] for one in calls],
            text=(self.folder / "text").read_text(),
        )

    def _note(self, rank: int, name: str) -> str:
        return (self.folder / f"{rank}-{name}").read_text()

    def _wait(self, processes: list[Any], kill: Kill) -> None:
        """Until all have ended, or the kill has come; then the others are ended too."""
        end = math.inf if kill.seconds is None else time.perf_counter() + kill.seconds
        while any(process.is_alive() for process in processes):
            if time.perf_counter() >= end:
                for process in processes if kill.all_ranks else [processes[kill.rank]]:
                    process.kill()
                    process.join()
                end = math.inf
            if any(process.exitcode for process in processes):
                for process in processes:
                    if not kill.all_ranks:  # the launcher gives them a moment
                        process.join(_MOMENT)
                    process.kill()
                    process.join()
            time.sleep(0.002)


class Watch:
    """Notes phases and calls of this process, and kills it where it is to be killed."""

    def __init__(self, folder: Path, kill: Kill, rank: int) -> None:
        self.folder, self.kill = folder, kill
        self.status = os.open(folder / f"{rank}-status", os.O_WRONLY)
        self.threads = threading.local()
        self.calls: list[tuple[str, str]] = []
        self.noting = True

    @property
    def phase(self) -> str:
        """What this thread is doing."""
        return getattr(self.threads, "phase", "loading")

    def note(self, text: str) -> None:
        """Leave a text for the parent."""
        os.pwrite(self.status, text.ljust(120).encode(), 0)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase, and afterwards the one around it."""
        outer, self.threads.phase = self.phase, phase
        self.note(phase)
        yield
        self.threads.phase = outer
        self.note(outer)

    def inside(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are a phase."""

        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            with self.during(phase):
                return function(*arguments, **named)

        return called

    def call(self, name: str, half: Callable[[], object] | None = None) -> None:
        """A call that changes the disk is about to be made."""
        if not self.noting:
            return
        self.calls.append((self.phase, name))
        here = f"{self.phase}: {name}"
        placed = self.kill.place is not None and here.startswith(self.kill.place)
        if len(self.calls) != self.kill.call and not placed:
            return
        self.noting = False
        if self.kill.half and half is not None:
            half()
            name = f"half of {name}"
        self.note(f"{self.phase}: {name}")
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: Python calls it before it changes the disk itself."""
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & _WRITES:
            path, _, flags = arguments
            self.call(f"open {Path(path).name}", functools.partial(_half_of_open, path, flags))
        elif event in _EVENTS:
            self.call(f"{event} {Path(os.fsdecode(arguments[0])).name}")

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`os.fsync`, which has no audit event."""

        def called(*arguments: Any) -> Any:
            self.call("os.fsync")
            return function(*arguments)

        return called

    def written(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`serialize_file` of safetensors, which may be killed when half of the file is there."""

        def called(tensors: Any, filename: Any, metadata: Any = None) -> Any:
            def half() -> None:
                function(tensors, filename, metadata)
                os.truncate(filename, os.path.getsize(filename) // 2)

            self.call(f"write {Path(filename).name}", half)
            return function(tensors, filename, metadata)

        return called


def _half_of_open(path: str, flags: int) -> None:
    """What is there when only a part of what was to be written has been."""
    file = os.open(path, flags, 0o666)
    if not flags & os.O_RDWR:
        os.write(file, b'{"step": 1, "lo')
    os.close(file)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _run(values: dict[str, Any], folder: Path, kill: Kill, rank: int, told: dict[str, str]) -> None:
    """Of the child: train, as `fastdpo train` would."""
    os.environ.update(told)
    output = os.open(folder / "text", os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import datasets
    import safetensors.numpy
    import safetensors.torch
    import torch

    from fastdpo import cli, reference
    from fastdpo.training import checkpoint, loop, references, saves
    from fastdpo.training.output import Output

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(values["output_dir"]).parent / "datasets"
    reference.SECONDS_BETWEEN_WRITES = 0.0
    watch = Watch(folder, kill, rank)
    for place, name, phase in (
        (references, "fill_reference", "reference"),
        (Output, "begin", "starting"),
        (loop.Trainer, "train", "training"),
        (loop.Trainer, "_evaluate", "evaluating"),
        (checkpoint, "save_checkpoint", "saving"),
        (saves.Saves, "_write", "saving"),
        (checkpoint, "rotate", "rotating"),
        (Output, "finish", "final save"),
    ):
        setattr(place, name, watch.inside(phase, getattr(place, name)))
    os.fsync = watch.counted(os.fsync)
    for module in (safetensors.numpy, safetensors.torch):
        module.serialize_file = watch.written(module.serialize_file)
    sys.addaudithook(watch.hook)
    lists = {k: v if isinstance(v, list) else [v] for k, v in values.items()}
    code = cli.main(["train", *(str(p) for k, v in lists.items() for p in (f"--{k}", *v))])
    watch.noting = False
    with builtins.open(folder / f"{rank}-calls.json", "w") as file:
        json.dump(watch.calls, file)
    sys.exit(code)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
