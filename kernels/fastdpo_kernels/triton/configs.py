"""Block shapes, warps and pipeline stages by architecture: a small table and no autotuning.

An architecture is its compute capability times ten: 80 serves every card from Ampere on that has no
entry of its own, 90 is Hopper, 100 Blackwell; 0 is Triton's interpreter. An entry has one family
for each kind of call, with its candidates; the first is used, `make gpu-check` times all of them,
and `python -m fastdpo_kernels.triton.compile` shows what each needs of the hardware.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..head import Head, transposed


@dataclass(frozen=True)
class Config:
    """How the product of a kernel is cut: (block_t, block_v) of logits, block_h of H at a time."""

    block_t: int
    block_v: int
    block_h: int
    warps: int
    stages: int
    descriptors: bool = False
    """Operands and the tile go through tensor memory descriptors (TMA)."""
    persistent: bool = False
    """As many programs as multiprocessors, each walking over many blocks of logits."""


WIDE = 1500
"""Hidden sizes from which the product is long enough to hide an epilogue by itself."""

# With H < WIDE two programs share a multiprocessor, one's epilogue behind the other's product: at
# most 128 registers and 113 KiB each. A wide block reads its operands less often, but its logits
# fill the registers: bias, soft cap, Σp² and sums under a running maximum need a smaller one.
_PAIRED = Config(128, 128, 64, 8, 2, descriptors=True)
_WIDE_BLOCK = Config(128, 256, 64, 8, 3, descriptors=True)
_SMALL = Config(64, 128, 64, 8, 3, descriptors=True)
_POINTERS = Config(64, 128, 64, 8, 3)
_FLOAT32 = Config(64, 128, 32, 8, 3)
# A transposed weight needs an address an element; larger blocks than this spill some of them.
_COLUMNS = Config(64, 64, 32, 8, 3)
_AMPERE = (Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 2))
_AMPERE_SMALL = (Config(64, 128, 32, 4, 3), Config(64, 64, 32, 4, 3))
_INTERPRETED = Config(16, 32, 16, 1, 1)
TABLE: dict[int, dict[str, tuple[Config, ...]]] = {
    0: {
        "narrow": (_INTERPRETED,),
        "wide": (Config(32, 64, 64, 1, 1, descriptors=True, persistent=True),),
        "rich": (Config(16, 32, 16, 1, 1, descriptors=True),),
        "pointers": (_INTERPRETED,),
        "float32": (_INTERPRETED,),
        "columns": (_INTERPRETED,),
    },
    80: {
        "narrow": _AMPERE,
        "wide": _AMPERE,
        "rich": _AMPERE_SMALL,
        "pointers": _AMPERE_SMALL,
        "float32": (Config(64, 64, 32, 8, 3),),
        "columns": (_COLUMNS,),
    },
    90: {
        "narrow": (_PAIRED, _WIDE_BLOCK, Config(128, 128, 64, 8, 3, True)),
        "wide": (_WIDE_BLOCK, Config(128, 256, 64, 8, 3, True, True), _PAIRED),
        "rich": (_PAIRED, _SMALL),
        "pointers": (_POINTERS,),
        "float32": (_FLOAT32,),
        "columns": (_COLUMNS,),
    },
    100: {
        "narrow": (_PAIRED, _WIDE_BLOCK),
        "wide": (_WIDE_BLOCK, _PAIRED),
        "rich": (_SMALL,),
        "pointers": (_POINTERS,),
        "float32": (_FLOAT32,),
        "columns": (_COLUMNS,),
    },
}


def architecture(device: torch.device) -> int:
    """The key of `TABLE` for a device: the newest entry that is not newer than the device."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch in TABLE if 0 < arch <= 10 * major + minor]
    if not known:
        raise ValueError(f"compute capability {major}.{minor}: the kernels need 8.0 or newer")
    return max(known)


def family(
    head: Head,
    hidden: Tensor,
    outputs: tuple[str, ...] = (),
    *,
    online: bool = False,
    descriptors: bool = True,
) -> str:
    """Which kind of call this is, a key of `TABLE`'s entries.

    `online`: with running maxima; `descriptors`: the kernel uses them where the alignment allows.
    """
    if transposed(head.weight):
        return "columns"
    if hidden.dtype == torch.float32:
        return "float32"
    if not (descriptors and describable(hidden) and describable(head.weight)):
        return "pointers"
    sums = {"log_sum_sq_prob", "entropy", "mean_logit"} if online else {"log_sum_sq_prob"}
    if head.softcap is not None or head.bias is not None or sums & set(outputs):
        return "rich"
    return "wide" if hidden.shape[1] >= WIDE else "narrow"


def choose(
    head: Head,
    hidden: Tensor,
    outputs: tuple[str, ...] = (),
    *,
    online: bool = False,
    descriptors: bool = True,
) -> Config:
    """The configuration of a call; arguments as in `family`."""
    kind = family(head, hidden, outputs, online=online, descriptors=descriptors)
    return TABLE[architecture(hidden.device)][kind][0]


def describable(matrix: Tensor) -> bool:
    """Whether the copy engine can read a matrix: contiguous rows that do not overlap, 16-byte pitch
    and base address.
    """
    pitch = matrix.stride(0)
    rows = matrix.stride(1) == 1 and pitch >= matrix.shape[1]
    aligned = pitch * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    return rows and aligned


def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs at once, at one a multiprocessor; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
