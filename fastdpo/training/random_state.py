"""The state of every random generator of a process, as tensors, exactly."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """That of this process."""
    state: Any = np.random.get_state()
    _, keys, position, has_gauss, gauss = state
    _, internal, spare = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor(internal),
        "python_spare": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def joined_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Those of all ranks; the names of the first one's are its own."""
    return {
        f"{rank}.{name}" if rank else name: tensor
        for rank, tensors in enumerate(states)
        for name, tensor in tensors.items()
    }


def state_of(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """One rank's of `joined_states`; empty where there was none of that number."""
    prefix = f"{rank}." if rank else ""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and ("." in name) == bool(prefix)
    }


def restore_random_state(tensors: Mapping[str, Tensor], python: Any = None) -> None:
    """Put back what `random_state` gave; `python` is Python's own state where the tensors lack it,
    as those of earlier versions do.
    """
    torch.set_rng_state(tensors["torch"])
    position, has_gauss, gauss = tensors["numpy_rest"].tolist()
    keys = tensors["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    if python is None:
        [spare] = tensors["python_spare"].tolist() or [None]
        python = 3, tensors["python"].tolist(), spare
    version, internal, spare = python
    random.setstate((version, tuple(internal), spare))
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
