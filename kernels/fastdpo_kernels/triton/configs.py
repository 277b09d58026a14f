"""Block shapes, warps and pipeline stages by card: a small table and no autotuning.

An entry is named after the oldest card that it serves: "sm_90" after a compute capability, "gfx942"
after an architecture of AMD, "interpreter" after Triton's. It has one family for each kind
of call, with its candidates from the best to the smallest; the first that fits into the shared
memory of the device at hand is used. `make gpu-check` times all of them, and
`python -m fastdpo_kernels.triton.compile` shows what each needs of the hardware.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

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
    max_registers: int | None = None
    """What a thread may have of registers: the compiler spills rather than take more."""

    @property
    def name(self) -> str:
        """Tokens × columns × hidden, and what follows, as tables name it."""
        marks = " TMA" * self.descriptors + " persistent" * self.persistent
        if self.max_registers is not None:
            marks += f" ≤{self.max_registers}"
        block = f"{self.block_t}×{self.block_v}×{self.block_h}"
        return f"{block}, {self.warps} warps, {self.stages} stages{marks}"

    @property
    def launch(self) -> dict[str, int]:
        """What Triton's compiler is told beside the block."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


WIDE = 1500
"""Hidden sizes from which the product is long enough to hide an epilogue by itself."""

# Two programs share a multiprocessor of sm_90 and sm_100, one's epilogue behind the other's
# product: at most 113 KiB of shared memory each, and 128 registers a thread of eight warps or 255
# of four. Outputs, a bias or a soft cap need registers: fewer columns where there are several.
_PAIRED = Config(128, 128, 64, 8, 3, descriptors=True, max_registers=128)
_UNLIMITED = replace(_PAIRED, max_registers=None)  # no more on sm_100, where the limit spills
_PAIRED_FULL = Config(128, 64, 64, 4, 4, descriptors=True)
# One program, which reads its operands less often: H is long enough to hide the epilogue.
_WIDE_BLOCK = Config(128, 256, 64, 8, 4, descriptors=True)
_POINTERS = Config(64, 128, 32, 8, 3)
_FLOAT32 = Config(64, 64, 32, 8, 3)
# A transposed weight needs an address an element; larger blocks than this spill some of them.
_COLUMNS = Config(32, 64, 32, 8, 2)
_INTERPRETED = Config(16, 32, 16, 1, 1)
# What a card that reports little shared memory still has room for, and nothing spills.
_LEAST = Config(64, 64, 32, 8, 2)
_LEAST_FLOAT32 = Config(32, 64, 16, 8, 2)

Family = tuple[Config, ...]
"""Candidates for one kind of call, the best first."""


def _entry(
    *,
    plain: Family,
    wide: Family = (),
    rich: Family,
    full: Family = (),
    pointers: Family,
    float32: Family,
    columns: Family = (_COLUMNS,),
    most_registers: int | None = None,
) -> dict[str, Family]:
    """One card's families; those of the largest blocks end with a smallest candidate. What has no
    descriptors may take `most_registers`.
    """
    families = {"narrow": plain, "wide": wide or plain, "rich": rich, "full": full or rich}
    families["pointers"] = pointers
    least = {kind: tuple(dict.fromkeys((*family, _LEAST))) for kind, family in families.items()}
    entry = {**least, "float32": (*float32, _LEAST_FLOAT32), "columns": columns}
    return {
        kind: tuple(
            config if config.descriptors else replace(config, max_registers=most_registers)
            for config in family
        )
        for kind, family in entry.items()
    }


def _nvidia(**families: Family) -> dict[str, Family]:
    """`_entry` with all the registers that a thread can have: left to itself, ptxas would rather
    spill some bytes than run a program less on a multiprocessor.
    """
    return _entry(**families, most_registers=255)


# Where operands go through registers, eight warps share even a small block: with four, or with a
# larger one, hidden sizes that are no multiple of 16 spill.
_CDNA = _entry(
    plain=(Config(128, 128, 32, 8, 2),),
    rich=(Config(64, 128, 32, 8, 2),),
    pointers=(Config(64, 128, 32, 8, 2),),
    float32=(Config(64, 64, 32, 8, 2),),
)
_CDNA_4 = _CDNA | dict.fromkeys(("narrow", "wide"), (Config(128, 128, 64, 8, 2), *_CDNA["wide"]))
TABLE: dict[str, dict[str, Family]] = {
    "interpreter": {
        "narrow": (_INTERPRETED,),
        "wide": (Config(32, 64, 64, 1, 1, descriptors=True, persistent=True),),
        "rich": (Config(16, 32, 16, 1, 1, descriptors=True),),
        "full": (Config(16, 64, 16, 1, 1, descriptors=True),),
        "pointers": (_INTERPRETED,),
        "float32": (_INTERPRETED,),
        "columns": (_INTERPRETED,),
    },
    "sm_80": _nvidia(
        plain=(Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 2)),
        rich=(Config(128, 64, 32, 8, 3),),
        pointers=(Config(64, 64, 32, 8, 3),),
        float32=(Config(32, 64, 32, 8, 2),),
    ),
    "sm_90": _nvidia(
        plain=(_PAIRED, _WIDE_BLOCK),
        wide=(_WIDE_BLOCK, Config(128, 256, 64, 8, 3, True, persistent=True), _PAIRED),
        rich=(_PAIRED_FULL, _PAIRED),
        full=(_PAIRED_FULL, Config(128, 64, 64, 8, 4, descriptors=True)),
        pointers=(_POINTERS,),
        float32=(_FLOAT32,),
    ),
    "sm_100": _nvidia(
        plain=(_UNLIMITED, _WIDE_BLOCK),
        wide=(_WIDE_BLOCK, _UNLIMITED),
        rich=(_PAIRED_FULL,),
        pointers=(_POINTERS,),
        float32=(_FLOAT32,),
    ),
    "sm_120": _nvidia(
        plain=(Config(128, 128, 32, 8, 3),),
        rich=(Config(128, 64, 32, 8, 3),),
        pointers=(Config(64, 64, 32, 8, 3),),
        float32=(Config(32, 64, 32, 8, 2),),
    ),
    "gfx942": _CDNA,
    "gfx950": _CDNA_4,
    "gfx1100": _entry(
        plain=(Config(64, 128, 32, 8, 2),),
        rich=(),
        pointers=(),
        float32=(),
        columns=(_LEAST_FLOAT32,),
    ),
    "gfx1201": _entry(
        plain=(Config(128, 128, 32, 8, 2),),
        rich=(Config(64, 128, 32, 8, 2),),
        pointers=(),
        float32=(),
        columns=(_LEAST_FLOAT32,),
    ),
}


class UnsupportedDevice(ValueError):
    """The fused kernels cannot run on a device; says why in one line."""


def card(device: torch.device) -> str:
    """The key of `TABLE` for a device: its own entry, or the newest of an older card, where every
    family has a candidate that fits.

    Raises:
        UnsupportedDevice: there is none.
    """
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda":
        raise UnsupportedDevice(f"no fused kernels for {device.type}")
    if torch.version.hip:
        reported: str | tuple[int, int] = torch.cuda.get_device_properties(device).gcnArchName
    else:
        reported = torch.cuda.get_device_capability(device)
    return _card(reported, shared_memory(device))


@cache  # every launch asks
def _card(reported: str | tuple[int, int], room: int) -> str:
    """The card of a GPU that reports the name of an instruction set, or a compute capability, and
    so many bytes of shared memory.
    """
    for name in _nearest(reported):
        if all(_fitting(family, kind, room) for kind, family in TABLE[name].items()):
            return name
    raise UnsupportedDevice(f"no block of the fused kernels fits in {room} bytes of shared memory")


def describe(device: torch.device) -> str:
    """In one line: the device's entry, whom it was made for, and what does not fit."""
    name, room = card(device), shared_memory(device)
    text = f"blocks of {name}"
    if not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        text += f" for compute capability {major}.{minor}" * (name != f"sm_{major}{minor}")
    entry = TABLE[name]
    if any(_fitting(family, kind, room)[0] != family[0] for kind, family in entry.items()):
        text += f", smaller ones where {room >> 10} KiB of shared memory are too few"
    return text


def _nearest(reported: str | tuple[int, int]) -> list[str]:
    """Keys of `TABLE` whose machine code or source a GPU runs, the nearest first."""
    if isinstance(reported, str):
        name = reported.partition(":")[0]
        if name in TABLE:
            return [name]
        known = ", ".join(name for name in TABLE if name.startswith("gfx"))
        raise UnsupportedDevice(f"no fused kernels for {name}, only for {known}")
    major, minor = reported
    versions = {int(name[3:]): name for name in TABLE if name.startswith("sm_")}
    older = sorted((number for number in versions if number <= 10 * major + minor), reverse=True)
    if not older:
        raise UnsupportedDevice(
            f"compute capability {major}.{minor}, and the fused kernels need 8.0"
        )
    return [versions[number] for number in older]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have, as the driver reports them."""
    properties = torch.cuda.get_device_properties(device)
    # Under ROCm there is nothing to opt in to, and torch has no such property.
    most = getattr(properties, "shared_memory_per_block_optin", 0)
    return max(most, properties.shared_memory_per_block)


def shared_bytes(config: Config, itemsize: int) -> int:
    """At most so many bytes of shared memory a program needs, for operands of `itemsize` bytes: a
    pipeline of blocks, the block of E that a descriptor stores, and the sums across warps.
    """
    stages = config.stages * (config.block_t + config.block_v) * config.block_h * itemsize
    stored = config.block_t * config.block_v * itemsize
    across = 4 * config.warps * config.block_t + 1024
    # Only in a loop is the block that is stored beside the pipeline of the next.
    return (stages + stored if config.persistent else max(stages, stored)) + across


def _itemsize(kind: str) -> int:
    """Bytes of the widest operand that a family is for."""
    return 4 if kind in ("float32", "columns") else 2


def _fitting(family: Family, kind: str, room: float) -> Family:
    """The candidates of a family that fit into so many bytes of shared memory."""
    return tuple(c for c in family if shared_bytes(c, _itemsize(kind)) <= room)


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
    vectors = hidden.shape[1] % 16 == 0 and describable(hidden) and describable(head.weight)
    if not (descriptors and vectors):
        return "pointers"
    sums = {"log_sum_sq_prob", "entropy", "mean_logit"} | (set() if online else {"is_top1"})
    asked = (head.bias is not None) + (not sums.isdisjoint(outputs))
    if asked == 2 or head.softcap is not None:
        return "full"
    if asked:
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
    return candidates(hidden.device, kind)[0]


def candidates(device: torch.device, kind: str) -> Family:
    """What of a family of the device's entry fits it, the best first.

    Raises:
        UnsupportedDevice: the device has no entry that fits.
    """
    room = shared_memory(device) if device.type == "cuda" else math.inf
    return _fitting(TABLE[card(device)][kind], kind, room)


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
