"""What each rank of a run sees, side by side: `fastdpo doctor` under torchrun.

Ranks that differ (another torch, another GPU, less memory) are a common cause of runs that hang or
run out of memory on one rank alone.
"""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from ..devices import GIB, free_host_memory, total_host_memory
from ..version import __version__
from .world import World

COMPARED = {
    "device": "device",
    "memory": "memory",
    "fastdpo": "fastdpo",
    "torch": "torch",
    "transformers": "transformers",
    "python": "python",
    "cuda": "CUDA",
}
"""What all ranks should have alike, and what it is called."""

_MIB = 2**20
_SENT = {"cuda": 256 * _MIB, "cpu": 16 * _MIB}
_TIMES = 3


@dataclass(frozen=True)
class Seen:
    """What one rank sees.

    Attributes:
        device: its name.
        memory: its size, to a GiB.
        free: GiB of it that can be had now.
        cuda: torch's CUDA, and its NCCL.
    """

    rank: int
    host: str
    device: str
    memory: str
    free: float
    fastdpo: str
    torch: str
    transformers: str
    python: str
    cuda: str


def look(world: World, device: torch.device) -> Seen:
    """What this rank sees; `device` is its own."""
    from transformers import __version__ as transformers_version

    cuda = "none"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, total = properties.name, properties.total_memory
        free = torch.cuda.mem_get_info(device)[0]
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        cuda = f"{torch.version.cuda}, NCCL {nccl}"
    else:
        name, total, free = f"CPU ({platform.machine()})", total_host_memory(), free_host_memory()
    return Seen(
        rank=world.rank,
        host=socket.gethostname(),
        device=name,
        memory=f"{total / GIB:.0f} GiB",
        free=free / GIB,
        fastdpo=__version__,
        torch=torch.__version__,
        transformers=transformers_version,
        python=platform.python_version(),
        cuda=cuda,
    )


def measured(world: World, device: torch.device) -> tuple[int, float]:
    """Bytes of an all-reduce over all ranks, and the seconds that it took: the best of a few."""
    size = _SENT[device.type]
    tensor = torch.zeros(size // 4, device=device)
    seconds = []
    for _ in range(_TIMES + 1):  # the first one connects the ranks
        world.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return size, min(seconds[1:])


def survey(world: World, device: torch.device) -> list[str]:
    """The lines of the report; every rank has to call it, and gets the same."""
    found: list[Seen] = world.gather_all(look(world, device))
    size, seconds = max(world.gather_all(measured(world, device)), key=lambda one: one[1])
    sent = 2 * (world.size - 1) / world.size * size
    backend = "nccl" if device.type == "cuda" else "gloo"
    return [
        *table(found),
        *differences(found),
        f"all-reduce of {size // _MIB} MiB over {backend} in {seconds * 1e3:.3g} ms: "
        f"{sent / seconds / 1e9:.3g} GB/s from each rank",
    ]


def table(found: Sequence[Seen]) -> list[str]:
    """One line for the ranks of a host that have the same device, with the least that is free."""
    groups: dict[tuple[str, str, str], list[Seen]] = {}
    for one in found:
        groups.setdefault((one.host, one.device, one.memory), []).append(one)
    rows = [("ranks", "host", "device", "memory", "free")]
    for (host, device, memory), ones in groups.items():
        free = f"{min(one.free for one in ones):.1f} GiB"
        rows.append((numbers([one.rank for one in ones]), host, device, memory, free))
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, wide)).rstrip() for row in rows]


def differences(found: Sequence[Seen]) -> list[str]:
    """One line for each thing in which ranks differ, or one that says that none does."""
    lines = []
    assert set(COMPARED) < {item.name for item in fields(Seen)}
    for name, title in COMPARED.items():
        ranks: dict[str, list[int]] = {}
        for one in found:
            ranks.setdefault(getattr(one, name), []).append(one.rank)
        if len(ranks) > 1:
            parts = (f"{value} on {numbers(where)}" for value, where in ranks.items())
            lines.append(f"{title} differs: {'; '.join(parts)}")
    first = found[0]
    alike = f"fastdpo {first.fastdpo}, torch {first.torch}, transformers {first.transformers}"
    return lines or [f"all ranks are alike: {alike}, Python {first.python}, CUDA {first.cuda}"]


def numbers(ranks: Sequence[int]) -> str:
    """Ranks as runs: 0-3, 6."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
