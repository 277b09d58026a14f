"""The tile of a forward, kept for its backward: of tokens that fit one tile, any gradient then
costs 6TVH operations instead of 8.

It stays in the workspace, at most one on a device, until the graph is freed or another call needs
the workspace; a backward that finds it gone projects again. So a call takes no more memory than
without it. Nothing is kept while a compiler traces, or where what autograd saves is watched
(recomputed, or moved to the host): a tile is no tensor of the graph, and must not stay behind.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor


@dataclass
class Kept:
    """A tile E (t, V) and its `row_scale` (t,), as `Tiles.exponentials` returns them; `tile` is
    None once another call has needed the workspace.
    """

    tile: Tensor | None
    row_scale: Tensor


class _Call(threading.local):
    """What a forward says to the operator inside it, and that to its autograd rule."""

    wanted = False
    kept: Kept | None = None


_call = _Call()
_on_device: "dict[torch.device, ref[Kept]]" = {}


def keeping(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that may keep its tile, where nothing watches what autograd saves."""

    def call(*arguments: Any, **options: Any) -> Any:
        _call.wanted = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        try:
            return operator(*arguments, **options)
        finally:
            _call.wanted, _call.kept = False, None

    return call


def wanted() -> bool:
    """Whether the operator that runs may keep its tile."""
    return _call.wanted


def keep(tile: Tensor, row_scale: Tensor) -> None:
    """Keep the tile that the workspace of its device holds."""
    _call.kept = kept = Kept(tile, row_scale)
    _on_device[tile.device] = ref(kept)


def taken() -> Kept | None:
    """What the operator has kept, for the autograd rule to hold as long as its graph."""
    kept, _call.kept = _call.kept, None
    return kept


def give_up(device: torch.device) -> None:
    """Let a call have the workspace of a device, or of a CPU its memory."""
    found = _on_device.pop(device, None)
    kept = None if found is None else found()
    if kept is not None:
        kept.tile = None
