"""Which engine computes the tiles of a head."""

from collections.abc import Callable
from functools import cache

import torch

from .head import Head, Tiles
from .tiles import TorchTiles

BACKENDS = ("auto", "triton", "torch", "reference")
_NARROWEST_FUSED_HEAD = 16


@cache
def _triton_tiles() -> Callable[[Head, int], Tiles] | None:
    """`TritonTiles`, or None without Triton; imported where it is first used, which takes time."""
    try:
        from .triton import TritonTiles
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None
    return TritonTiles


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, width: int = 1024
) -> str:
    """What "auto" stands for, for a head of `width` H that computes in `dtype` on `device`."""
    if backend != "auto":
        return backend
    fits = device.type == "cuda" and width >= _NARROWEST_FUSED_HEAD and dtype != torch.float64
    return "triton" if fits and _triton_tiles() is not None else "torch"


def make_tiles(backend: str, head: Head, workspace_mib: int) -> Tiles:
    """The tiles of a head that is in the dtype it computes in; `backend` is "torch" or "triton"."""
    if backend == "torch":
        return TorchTiles(head, workspace_mib)
    engine = _triton_tiles()
    if engine is None:
        raise RuntimeError('backend "triton": Triton cannot be imported here; use "torch"')
    return engine(head, workspace_mib)
