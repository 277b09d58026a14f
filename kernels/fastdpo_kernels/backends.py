"""Which engine computes the tiles of a head, and the memory that they take."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from .head import OUTPUTS, Head, Layout, Tiles, WorkspaceBytes, workspace_of
from .sharded.tiles import ShardLayout
from .tiles import TorchLayout, TorchTiles
from .triton.configs import UnsupportedDevice, card, describe
from .triton.layout import TritonLayout, TritonShardLayout

BACKENDS = ("auto", "triton", "torch", "naive")
_NARROWEST_FUSED_HEAD = 16


@cache
def _triton_tiles() -> Callable[[Head, int, tuple[str, ...]], Tiles] | None:
    """`TritonTiles`, or None without Triton; imported where it is first used, which takes time."""
    try:
        from .triton.tiles import TritonTiles
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None
    return TritonTiles


def backend_name(backend: str) -> str:
    """One of `BACKENDS`; "reference" is another spelling of "naive".

    Raises:
        ValueError: an unknown backend, naming the known ones.
    """
    name = "naive" if backend == "reference" else backend
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    return name


class Choice(NamedTuple):
    """An engine and, in one line, why it is that one."""

    name: str
    reason: str


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, width: int = 1024
) -> str:
    """What "auto" stands for, for a head of `width` H that computes in `dtype` on `device`."""
    return explain_backend(backend, device, dtype, width).name


def explain_backend(
    backend: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, width: int = 1024
) -> Choice:
    """`choose_backend` with the reason: the table of configurations in use, or what the fused
    kernels lack.

    Raises:
        ValueError: an unknown backend, or "triton" for a device that its kernels do not run on.
    """
    backend = backend_name(backend)
    if backend == "triton" and not _absent(device):
        try:
            card(device)
        except UnsupportedDevice as error:
            raise ValueError(f'backend "triton": {error}; use "torch"') from None
    if backend != "auto":
        return Choice(backend, "asked for")
    try:
        return Choice("triton", _fused(device, dtype, width))
    except UnsupportedDevice as error:
        return Choice("torch", str(error))


def _fused(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Which of the fused kernels' configurations serve a head.

    Raises:
        UnsupportedDevice: none, and why.
    """
    if device.type == "cpu":
        raise UnsupportedDevice("the fused kernels are for GPUs")
    if dtype == torch.float64:
        raise UnsupportedDevice("the fused kernels have no fp64")
    if width < _NARROWEST_FUSED_HEAD:
        raise UnsupportedDevice(f"the fused kernels need H of {_NARROWEST_FUSED_HEAD} or more")
    blocks = "" if _absent(device) else describe(device)
    if _triton_tiles() is None:
        raise UnsupportedDevice("Triton cannot be imported")
    return f"fused kernels, {blocks}" if blocks else "fused kernels"


def _absent(device: torch.device) -> bool:
    """Whether a plan is made for a GPU on a machine that has none."""
    return device.type == "cuda" and not torch.cuda.is_available()


def _interpreted() -> bool:
    """Whether Triton's kernels are Python, which runs on any device."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def make_tiles(
    backend: str, head: Head, workspace_mib: int, outputs: tuple[str, ...] = OUTPUTS
) -> Tiles:
    """The tiles of a head that is in the dtype it computes in, for calls that ask for `outputs`;
    `backend` is "torch" or "triton".

    Raises:
        RuntimeError: "triton" without Triton.
        ValueError: "triton" in fp64, or on a CPU without Triton's interpreter.
    """
    if backend == "torch":
        return TorchTiles(head, workspace_mib, outputs)
    engine = _triton_tiles()
    if engine is None:
        raise RuntimeError('backend "triton": Triton cannot be imported here; use "torch"')
    if head.weight.device.type == "cpu" and not _interpreted():
        raise ValueError('backend "triton": no GPU, and TRITON_INTERPRET is not 1; use "torch"')
    return engine(head, workspace_mib, outputs)


def workspace_bytes(
    tokens: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    workspace_mib: int | None = None,
    outputs: tuple[str, ...] = (),
    softcap: bool = False,
    shards: int = 1,
    backend: str = "auto",
) -> WorkspaceBytes:
    """Bytes that a call takes for its tiles, by the rules that lay them out, before it runs.

    Hidden states, weight and their gradients come on top, with the copies of them that rounding to
    another dtype makes.

    Args:
        tokens: how many are scored: a host leaves out ignored ones.
        vocab, width: V and H of the head.
        dtype: what the head computes in.
        device: "cpu" or "cuda", which need not be there, where `workspace_mib` is given; nor need
            Triton for backend "triton".
        outputs, workspace_mib, backend: as in `linear_logprob`.
        softcap: whether the head has a soft cap.
        shards: over how many ranks the head is spread (`vocab_parallel_loss`), about evenly; what a
            rank takes, and `tokens` are those of all ranks.

    Raises:
        ValueError: an unknown backend, or "naive", which has the whole logits and no tiles.
    """
    layout = layout_of(
        *(vocab, width, dtype, device),
        workspace_mib=workspace_mib,
        outputs=outputs,
        shards=shards,
        backend=backend,
    )
    return layout.bytes(tokens, softcap)


def layout_of(
    vocab: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    workspace_mib: int | None = None,
    outputs: tuple[str, ...] = (),
    shards: int = 1,
    backend: str = "auto",
) -> Layout:
    """How the tiles of a call are cut; arguments and errors as in `workspace_bytes`."""
    engine = choose_backend(backend, device, dtype, width)
    if engine not in _LAYOUTS:
        raise ValueError(f'backend: expected "auto", "triton" or "torch", got {backend!r}')
    sizes = (-(-vocab // shards), width, dtype, device.type, workspace_of(workspace_mib, device))
    if shards == 1:
        return _LAYOUTS[engine](*sizes, outputs)
    if engine == "triton":
        return TritonShardLayout(*sizes, outputs)
    return ShardLayout(*sizes, outputs, shards)


_LAYOUTS: dict[str, type[Layout]] = {"torch": TorchLayout, "triton": TritonLayout}
