"""The inputs of recomputed layers, kept elsewhere between forward and backward: those of a GPU in
the host's memory, those of a CPU in a file.

A checkpointed layer keeps its input, hidden states of S × H values, until its backward: for many
layers and long rows that is most of what a step holds. Here a layer's input is copied to the host
while the next layers run, and fetched back one layer ahead of its backward. On the device remain
two inputs that are on their way out, or one in use and one on its way in.

`Offloader` decides what is copied and when; a `Transfer` copies. All copies run on one side stream
in the order in which they were asked for, so a host buffer can be handed on at once. Device memory
is allocated and freed on the computing stream alone, which waits for a copy before it frees what is
copied; so no memory is marked as used by two streams and the host waits for nothing.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import FastDPOError

MIN_BYTES = 1 << 20
"""Smaller tensors stay on the device: their copies would cost more than their memory is worth."""

LEAVING = 2
"""Inputs whose copies may be under way in the forward, besides which all have left the device."""


class Transfer(Protocol):
    """Copies between a device and the host's buffers, in the order of the calls, beside the
    computation.
    """

    def buffer(self, size: int) -> Tensor:
        """A new host buffer, uint8 (size,)."""

    def send(self, tensor: Tensor, host: Tensor) -> Any:
        """Start copying what the computation has made so far in `tensor` to `host`; the copy."""

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        """Start copying `host` to a new tensor on the device; that tensor and the copy."""

    def wait(self, copy: Any) -> None:
        """Let the computation, not the host, wait for a copy."""


class SideStream:
    """`Transfer` of a CUDA device, through pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def buffer(self, size: int) -> Tensor:
        """Pinned bytes; torch rounds what it allocates up to a power of two."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def send(self, tensor: Tensor, host: Tensor) -> torch.cuda.Event:
        """The copy starts when what has been queued on the computing stream is done."""
        return self._copy(tensor, host)

    def fetch(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """The memory is the computing stream's, whose queued work may still be using it."""
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        return tensor, self._copy(host, tensor)

    def wait(self, copy: torch.cuda.Event) -> None:
        """Queue the wait on the computing stream."""
        torch.cuda.current_stream(self.device).wait_event(copy)

    @torch.no_grad()
    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()


class ScratchFile:
    """`Transfer` of a CPU: a file without a name, gone with the process.

    It is mapped, and a mapping that is not in use holds no memory of the process: the kernel keeps
    the pages as long as it has room and writes them to the disk when it has none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()

    def buffer(self, size: int) -> Tensor:
        """Bytes of a file of their own. FastDPOError where the disk has no room for them."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:  # a mapping that finds the disk full later kills the process
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise FastDPOError(f"activation_offloading: {self.folder}: {error}") from error
            mapped = mmap.mmap(file.fileno(), size)
        host = torch.frombuffer(mapped, dtype=torch.uint8)
        self.maps[host.data_ptr()] = mapped
        return host

    @torch.no_grad()
    def send(self, tensor: Tensor, host: Tensor) -> None:
        """Done on return."""
        host.copy_(tensor)
        self._unload(host)

    @torch.no_grad()
    def fetch(self, host: Tensor) -> tuple[Tensor, None]:
        """Done on return."""
        tensor = host.clone()
        self._unload(host)
        return tensor, None

    def wait(self, copy: None) -> None:
        """Return at once: `fetch` has copied everything when it returns."""

    def _unload(self, host: Tensor) -> None:
        self.maps[host.data_ptr()].madvise(mmap.MADV_DONTNEED)


def transfer_of(device: torch.device, folder: Path) -> Transfer:
    """The `Transfer` of a device; files are made in `folder`."""
    return SideStream(device) if device.type == "cuda" else ScratchFile(folder)


class Pool:
    """Host buffers that serve one step after the other, as many as were ever in use at once."""

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self.allocate = allocate
        self.free: list[Tensor] = []
        """From small to large."""

    def take(self, size: int) -> Tensor:
        """The smallest free buffer of `size` bytes at least, or a new one in place of a free one
        that is too small.
        """
        place = bisect_left(self.free, size, key=Tensor.numel)
        if place < len(self.free):
            return self.free.pop(place)
        del self.free[:1]
        return self.allocate(size)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        insort(self.free, buffer, key=Tensor.numel)


class _Kept:
    """One input: on its way to the host, there, on its way back, or back."""

    def __init__(self, tensor: Tensor, pool: Pool, transfer: Transfer) -> None:
        self.pool, self.transfer = pool, transfer
        self.buffer = pool.take(tensor.nbytes)
        self.host = self.buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.device: Tensor | None = tensor
        self.copy: Any = transfer.send(tensor, self.host)

    def leave(self) -> None:
        """Free the device's tensor once its copy is done."""
        self._settle()
        self.device = None

    def fetch(self) -> None:
        """Start the way back, unless the tensor is on the device or on its way."""
        if self.device is None:
            self.device, self.copy = self.transfer.fetch(self.host)

    def take(self) -> Tensor:
        """The tensor on the device. It is not held here, so a second use fetches it again."""
        self.fetch()
        self._settle()
        tensor, self.device = self.device, None
        assert tensor is not None
        return tensor

    def _settle(self) -> None:
        if self.copy is not None:
            self.transfer.wait(self.copy)
        self.copy = None

    def __del__(self) -> None:
        # Of a backward that never came, or was broken off: memory that is still being copied to
        # must not be handed on.
        if hasattr(self, "copy"):
            self._settle()
            self.pool.give(self.buffer)


class Offloader:
    """Checkpoints layers as `torch.utils.checkpoint` does, their inputs kept on the host.

    Put it in place of a model's checkpointing function. What it holds belongs to the graph: when
    that goes, after a backward or without one, buffers return to the pool.
    """

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.pool = Pool(transfer.buffer)
        self.order: list[weakref.ref[_Kept]] = []
        self.leaving: deque[weakref.ref[_Kept]] = deque()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), recomputed in the backward from args, of which the first is offloaded.

        What else the layer was given (positions, masks) is shared with other layers and stays.
        """
        if not torch.is_grad_enabled():
            return function(*args)
        hidden: Any = args[0] if args else None
        plain = isinstance(hidden, Tensor) and not isinstance(hidden, nn.Parameter)
        # The graph holds the hooks: by its address, not by itself, they may know the input.
        wanted = None
        if plain and hidden.nbytes >= MIN_BYTES:
            wanted = (hidden.data_ptr(), hidden.shape)
        # Within the layer the checkpoint's own hooks are the ones in force: these see its inputs.
        with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, wanted), self._unpack):
            return checkpoint(function, *args, use_reentrant=False)

    def _pack(self, wanted: Any, saved: Tensor) -> Tensor | _Kept:
        if wanted != (saved.data_ptr(), saved.shape):
            return saved
        while len(self.leaving) >= LEAVING:
            oldest = self.leaving.popleft()()
            if oldest is not None:
                oldest.leave()
        kept = _Kept(saved, self.pool, self.transfer)
        while self.order and self.order[-1]() is None:
            self.order.pop()
        self.order.append(weakref.ref(kept))
        self.leaving.append(self.order[-1])
        return kept

    def _unpack(self, packed: Tensor | _Kept) -> Tensor:
        if not isinstance(packed, _Kept):
            return packed
        tensor = packed.take()
        alive = [kept for ref in self.order if (kept := ref()) is not None]
        place = alive.index(packed)
        if place:  # the backward of the layer before comes next
            alive[place - 1].fetch()
        return tensor
