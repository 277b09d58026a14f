"""How the checkpoints of a run are written: by the first rank, at once; or, where ranks hold shares
of the model, by all of them, each its own, while training goes on.

Such a checkpoint is filled under a temporary name too. It gets its own once every rank has brought
its files to the disk and said what is in them, so a killed rank leaves none that is half there.
"""

import shutil
import socket
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .. import files
from ..errors import CheckpointError, FastDPOError, one_line
from ..model.save import whole_state
from ..model.shares import named_weights
from ..parallel.shares import staged, tidy_whole, write_shares, write_whole, writer_of
from ..parallel.world import World
from . import checkpoint, optimizer_state
from .random_state import random_state

_MODEL = "model"


class Saves:
    """The checkpoints of one run. As a context, it ends when the last one is written."""

    def __init__(self, world: World, timeout: int) -> None:
        """`timeout`: seconds that a rank waits for the others."""
        self.world = world
        self.group: Any = None
        if world.sharded:  # what is said between steps must not be mixed with what a step says
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def save(
        self,
        path: Path,
        then: Callable[[], None],
        *,
        model: Any,
        tokenizer: Any,
        optimizer: Optimizer | None,
        state: Mapping[str, Any],
        reference: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint as `checkpoint.save_checkpoint` does, `then` what has to follow on the
        first rank. All ranks call it; where they hold shares, they wait for the one before it and
        return before it is written.
        """
        randoms = None if optimizer is None else self.world.gather_all(random_state())
        if self.world.sharded:
            self.wait()
            self._begin(path, then, model, tokenizer, optimizer, state, reference, randoms)
        elif self.world.first:
            checkpoint.save_checkpoint(
                path,
                model=model,
                tokenizer=tokenizer,
                optimizer=optimizer,
                state=state,
                reference=reference,
                randoms=randoms,
            )
            then()

    def wait(self) -> None:
        """Return when the last checkpoint is written.

        Raises:
            FastDPOError: it could not be.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, problem, self._problem = None, self._problem, None
        if problem is not None:
            raise problem

    def _begin(
        self,
        path: Path,
        then: Callable[[], None],
        model: Any,
        tokenizer: Any,
        optimizer: Optimizer | None,
        state: Mapping[str, Any],
        reference: dict[str, Tensor] | None,
        randoms: Any,
    ) -> None:
        """Copy what training is going to change, then write on in a thread."""
        adapter = whole_state(model) if hasattr(model, "peft_config") else None
        tensors = {} if adapter is not None else {_MODEL: named_weights(model)}
        if optimizer is not None:
            tensors[checkpoint.OPTIMIZER], rest = optimizer_state.flatten(optimizer)
            state = {**state, "optimizer": self._joined(rest)}
            tensors |= {} if reference is None else {checkpoint.REFERENCE: reference}
        names = self._names({name: list(own) for name, own in tensors.items()})

        def write_small() -> Path:
            temporary = files.make_temporary(path)
            try:
                checkpoint.save_model(temporary, model, tokenizer, adapter or {})
                if optimizer is not None:
                    checkpoint.write_state(temporary, state, randoms)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            return temporary

        temporary = self._from_first(path, write_small)
        self._require_seen(temporary)
        copies = {name: staged(own) for name, own in tensors.items()}
        write = partial(self._write, path, temporary, copies, names, then)
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(
            target=self._keep_problem, args=(path, write, device), daemon=True
        )
        self._thread.start()

    def _joined(self, rest: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's state without tensors, with what only some ranks know: whose moments are
        in blocks depends on the size of a share.
        """
        for other in self.world.gather_all([part["subclasses"] for part in rest]):
            for part, subclasses in zip(rest, other, strict=True):
                part["subclasses"] |= subclasses
        return rest

    def _names(self, own: dict[str, list[str]]) -> dict[str, list[str]]:
        """The names of the tensors of all ranks, in one order."""
        every = self.world.gather_all(own)
        return {kind: list(dict.fromkeys(n for o in every for n in o[kind])) for kind in own}

    def _from_first(self, path: Path, function: Callable[[], Path]) -> Path:
        """What the first rank's function returns; its FastDPOError, on every rank."""
        made: Path | None = None
        problem: str | None = None
        if self.world.first:
            try:
                with files.explain(path):
                    made = function()
            except FastDPOError as error:
                problem = str(error)
        made, problem = self.world.share((made, problem))
        if made is None:
            raise FastDPOError(problem or f"{path}: cannot be written")
        return made

    def _require_seen(self, temporary: Path) -> None:
        seen = self.world.gather_all((socket.gethostname(), temporary.is_dir()))
        if blind := sorted({host for host, sees in seen if not sees}):
            if self.world.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"output_dir: {temporary.parent} is not seen by {', '.join(blind)}; with "
                "data_parallel fsdp or hsdp every rank writes there, so choose a directory that "
                "all hosts share"
            )

    def _keep_problem(self, path: Path, write: Callable[[], None], device: int | None) -> None:
        if device is not None:  # or else a thread's is the first one
            torch.cuda.set_device(device)
        try:
            with files.explain(path):
                write()
        except FastDPOError as error:
            self._problem = error
        except Exception as error:  # of torch, or of another rank
            self._problem = FastDPOError(f"{path}: could not be written ({one_line(error)})")

    def _write(
        self,
        path: Path,
        temporary: Path,
        tensors: dict[str, dict[str, Tensor]],
        names: dict[str, list[str]],
        then: Callable[[], None],
    ) -> None:
        """In the thread of each rank: write the shares, then say what was written."""
        try:
            for kind, own in tensors.items():
                if kind == _MODEL:
                    write_whole(temporary, own, self.group)
                elif names[kind]:
                    write_shares(temporary / kind, own, names[kind], self.group)
            if _MODEL in tensors:
                self._together(partial(self._tidy, temporary, tensors[_MODEL]))
            digests = self._together(partial(self._digests, temporary))
            every = {name: entry for entries in digests for name, entry in entries.items()}
            self._together(partial(self._appear, temporary, path, every, then))
        finally:
            if self.world.first:
                shutil.rmtree(temporary, ignore_errors=True)

    def _tidy(self, temporary: Path, weights: Mapping[str, Tensor]) -> None:
        if self.world.first:
            tidy_whole(temporary, weights)

    def _digests(self, temporary: Path) -> dict[str, Any]:
        """Fingerprints of the files that this rank wrote."""
        return {
            name: checkpoint.fingerprint(temporary / name)
            for name in files.names_below(temporary)
            if writer_of(name) == self.world.rank
        }

    def _appear(
        self, temporary: Path, path: Path, digests: Mapping[str, Any], then: Callable[[], None]
    ) -> None:
        if self.world.first:
            checkpoint.appear(temporary, path, digests)
            then()

    def _together(self, function: Callable[[], Any]) -> list[Any]:
        """What the function returns on each rank; where it fails on one, it fails on all."""
        result: Any = None
        problem: str | None = None
        try:
            result = function()
        except Exception as error:
            problem = one_line(error)
        found: list[Any] = [None] * self.world.size
        dist.all_gather_object(found, (result, problem), group=self.group)
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                raise RuntimeError(f"rank {rank}: {failed}")
        return [result for result, _ in found]
