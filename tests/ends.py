"""What runs on the ranks of tests/test_ranks_faults.py: runs that end badly on one of them."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from training import heard

from fastdpo import TrainConfig, train
from fastdpo.errors import DataError
from fastdpo.model.layers import layers_of
from fastdpo.parallel import arbiter, watch
from fastdpo.training.loop import Trainer

ODD = 1
"""The rank on which something happens."""

STEP = 2
"""And after which step."""

Ending = dict[str, Any]


def _a_bug() -> None:
    raise ZeroDivisionError("a bug")


def _a_users_error() -> None:
    raise DataError("rows.jsonl: gone")


def _interrupt() -> None:
    raise KeyboardInterrupt


def _late() -> None:
    """Until the others have given up."""
    while any(one.verdict is None for one in list(watch._OPEN)):
        time.sleep(0.1)


HAPPENS: dict[str, Callable[[], None]] = {
    "bug": _a_bug,
    "error": _a_users_error,
    "interruption": _interrupt,
    "late": _late,
}


def ended(keys: dict[str, Any], other: dict[str, Any], what: str, everywhere: bool) -> Ending:
    """How a run ends for this rank; `other` are the keys of the odd one."""
    rank = int(os.environ["RANK"])
    odd = rank == ODD
    arbiter.SPEAK_S, arbiter.CAUSE_S = 0.2, 0.5
    weights: list[list[Tensor]] = []

    def on_step(step: int, _: dict[str, float]) -> None:
        if step == STEP and what in HAPPENS and (odd or everywhere):
            HAPPENS[what]()

    trains = Trainer.train

    def trained(trainer: Trainer, steps: Any) -> dict[str, float]:
        if what == "slow" and odd:
            _slow(trainer)
        if what == "nan" and odd:
            _not_a_number(trainer)
        read = trainer.output.require

        def required() -> None:
            weights[:] = [_weights(trainer)]
            read()

        trainer.output.require = required  # type: ignore[method-assign]
        try:
            return trains(trainer, steps)
        except BaseException:
            weights.append(_weights(trainer))
            raise

    found: Ending = {"error": None}
    with _written() as written, heard() as said, mock.patch.object(Trainer, "train", trained):
        try:
            found["step"] = train(
                TrainConfig.from_dict(keys | (other if odd else {})), on_step=on_step
            ).step
        except BaseException as error:
            found["error"], found["text"] = type(error).__name__, str(error)
            found["said"] = getattr(error, "said", False)
    found |= {"written": written[0], "logged": [line for line in said if "is slow" in line]}
    if len(weights) == 2:
        found["unchanged"] = all(torch.equal(*both) for both in zip(*weights, strict=True))
    return found


def _weights(trainer: Trainer) -> list[Tensor]:
    shares = (p.to_local() if isinstance(p, DTensor) else p for p in trainer.model.parameters())
    return [share.detach().clone() for share in shares]


def _slow(trainer: Trainer) -> None:
    """A layer that takes long to compute, with nobody to wait for."""
    layer = layers_of(trainer.model)[0]
    compute = layer.forward

    def slow(*args: Any, **keys: Any) -> Any:
        time.sleep(0.15)
        return compute(*args, **keys)

    layer.forward = slow


def _not_a_number(trainer: Trainer) -> None:
    score = trainer.objective.score

    def spoilt(*args: Any, **keys: Any) -> Tensor:
        loss = score(*args, **keys)
        return loss * float("nan") if trainer.step == STEP else loss

    trainer.objective.score = spoilt  # type: ignore[method-assign]


@contextmanager
def _written() -> Iterator[list[str]]:
    """What the process writes to stdout and stderr in the block."""
    found: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            for number, handle in enumerate(kept, 1):
                os.dup2(handle, number)
                os.close(handle)
            file.seek(0)
            found.append(file.read().decode())
