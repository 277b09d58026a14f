"""What is known of devices: GPUs by name, from their vendors' data sheets, and the one at hand.

A card reports less than its data sheet says: the driver keeps some (an "80 GB" H100 reports 79.1 to
79.6 GiB, a "24 GB" RTX 4090 23.5 to 24.0), and cards with GDDR memory and error correction on store
its codes there (an L4 reports 22.2 of 24 GiB, an L40S 44.4 of 48). `usable` is that part.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .errors import ConfigError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

GIB = 2**30

CUDA_OVERHEAD = 600 << 20
"""Bytes that a process takes of a GPU beside its tensors: the CUDA context, some 300 MB since
kernels are loaded lazily (https://github.com/pytorch/pytorch/issues/107667), the kernels that a run
loads and cuBLAS' workspace, 32 MiB on Hopper (CUBLAS_WORKSPACE_CONFIG in PyTorch's documentation).
"""

HEADROOM = 0.05
"""The share of the memory that a plan leaves free: freed blocks of the wrong size cannot be used.
"""

_HBM, _GDDR_ECC = 0.985, 0.92


@dataclass(frozen=True)
class Device:
    """What a plan has to know of a device; rates are those of the data sheet, None if unknown."""

    name: str
    kind: str
    """"cuda" or "cpu"."""
    memory: int
    """Bytes that a process can have, the context included."""
    bf16: float | None = None
    """Dense products in bf16, operations a second."""
    fp32: float | None = None
    """Products in fp32 without TensorFloat-32, operations a second."""
    bandwidth: float | None = None
    """Of its memory, bytes a second."""
    host_link: float | None = None
    """To the host's memory and back, bytes a second each way."""
    link: str | None = None
    """What joins the devices of a host, one of `LINKS`."""
    total: int = 0
    """Bytes of a GPU that is there, what others have taken included; 0 where that is `memory`."""

    @property
    def overhead(self) -> int:
        """Bytes beside the tensors: `CUDA_OVERHEAD` on a GPU. On a CPU `memory` is without it."""
        return CUDA_OVERHEAD if self.kind == "cuda" else 0

    @property
    def workspace_mib(self) -> int:
        """MiB that the head takes for its tiles unless it is told."""
        from fastdpo_kernels.head import default_workspace_mib

        return default_workspace_mib(max(self.memory, self.total) if self.kind == "cuda" else 0)

    @property
    def budget(self) -> int:
        """Bytes that tensors may take: the memory without `HEADROOM` and `overhead`."""
        return int(self.memory * (1 - HEADROOM)) - self.overhead


LINKS = {
    # NVIDIA's data sheets of A100, H100 and B200 give 600, 900 and 1,800 GB/s for both ways.
    "nvlink3": 300e9,
    "nvlink4": 450e9,
    "nvlink5": 900e9,
    # PCI-SIG: 16 and 32 GT/s on each of 16 lanes, with 128b/130b codes.
    "pcie4": 32e9,
    "pcie5": 64e9,
}
"""What joins the GPUs of a host: bytes a second each way, one of them."""

NETWORKS = {
    # NVIDIA's data sheets of ConnectX-6 (HDR100, HDR), ConnectX-7 (NDR) and ConnectX-8 (XDR).
    "100g": 12.5e9,
    "200g": 25e9,
    "400g": 50e9,
    "800g": 100e9,
}
"""What joins hosts: bytes a second each way, of the one port of InfiniBand that each GPU has."""


def _gpu(
    name: str,
    gib: int,
    usable: float,
    bf16: float,
    fp32: float,
    gb_s: float,
    pcie: int,
    nvlink: int = 0,
) -> Device:
    """Units of the data sheets: GB, TFLOP/s, GB/s. PCIe ×16 of generation 4 or 5 moves 32 or 64
    GB/s, of which about 80 % arrive.
    """
    host = LINKS[f"pcie{pcie}"] * 0.8
    link = f"nvlink{nvlink}" if nvlink else f"pcie{pcie}"
    rates = (bf16 * 1e12, fp32 * 1e12, gb_s * 1e9, host)
    return Device(name, "cuda", int(gib * GIB * usable), *rates, link)


# Dense, not sparse; GeForce cards with fp32 accumulation.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 40, _HBM, 312, 19.5, 1555, 4, 3),
        _gpu("a100-80gb", 80, _HBM, 312, 19.5, 2039, 4, 3),
        _gpu("h100-80gb", 80, _HBM, 989.4, 67, 3350, 5, 4),
        _gpu("h200-141gb", 141, _HBM, 989.4, 67, 4800, 5, 4),
        _gpu("b200-180gb", 180, _HBM, 2250, 75, 7700, 5, 5),
        _gpu("l4-24gb", 24, _GDDR_ECC, 121, 30.3, 300, 4),
        _gpu("l40s-48gb", 48, _GDDR_ECC, 362, 91.6, 864, 4),
        _gpu("rtx3090-24gb", 24, _HBM, 71, 35.6, 936, 4),
        _gpu("rtx4090-24gb", 24, _HBM, 165.2, 82.6, 1008, 4),
        _gpu("rtx5090-32gb", 32, _HBM, 209.5, 104.8, 1792, 5),
    )
}
"""GPUs that `fastdpo plan --gpu` knows."""


def named(name: str) -> Device:
    """The GPU of that name. ConfigError for one that is not in `GPUS`."""
    return _of(GPUS, name, "--gpu")


def link_rate(name: str) -> float:
    """Bytes a second of a link of `LINKS`. ConfigError for one that is not there."""
    return _of(LINKS, name, "--link")


def network_rate(name: str) -> float:
    """Bytes a second of a network of `NETWORKS`. ConfigError for one that is not there."""
    return _of(NETWORKS, name, "--network")


def _of(table: Mapping[str, T], name: str, flag: str) -> T:
    if name not in table:
        nearest = get_close_matches(name, table, n=1, cutoff=0.0)[0]
        known = ", ".join(table)
        raise ConfigError(f"{flag}: expected one of {known}, got {name} (near {nearest})")
    return table[name]


def at_hand(device: torch.device) -> Device:
    """The device of this machine, with the memory that is free on it now."""
    if device.type != "cuda":
        return Device("this machine's CPU", "cpu", free_host_memory())
    import torch

    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_reserved(device)
    title, known = torch.cuda.get_device_name(device), known_gpu(device)
    # The context exists by now, and a device's budget takes it off once.
    memory = free + taken + CUDA_OVERHEAD
    if known is None:
        return Device(title, "cuda", memory, total=total)
    return replace(known, name=title, memory=memory, total=total)


def known_gpu(device: torch.device | None = None) -> Device | None:
    """The entry of `GPUS` whose model stands in the name that the driver gives for a GPU (default:
    the current one); None for another device.
    """
    import torch

    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    words = torch.cuda.get_device_name(device).lower().replace(" ", "")
    total = torch.cuda.get_device_properties(device or 0).total_memory
    fitting = [gpu for name, gpu in GPUS.items() if name.split("-")[0] in words]
    return min(fitting, key=lambda gpu: abs(gpu.memory - total), default=None)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: allocated on the GPU, or resident in this process on a CPU. MiB."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins with that of the process that started this one
        lines = status.read_text().splitlines()
        found = next((line for line in lines if line.startswith("VmHWM:")), None)
        if found is not None:
            return int(found.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def total_host_memory() -> int:
    """Bytes of RAM of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_host_memory() -> int:
    """Bytes of RAM that can be had without swapping, dropped caches included, within the limit of
    the process's control group.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = [line for line in meminfo.read_text().splitlines() if line.startswith("MemAvail")]
        free = int(found[0].split()[1]) * 1024 if found else free
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no control group, or one without a limit
        return free
