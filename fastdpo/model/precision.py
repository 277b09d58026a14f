"""Which floating-point type to compute in; on a CPU, by measuring it.

A CPU with AMX or AVX512-BF16 units may multiply bf16 several times as fast as fp32; one without
them, or behind a slow path, is slower. The processor's flags do not tell which (a Xeon that lists
avx512_bf16 ran at half the speed), a product of matrices does.
"""

import time
from functools import lru_cache

import torch

from ..errors import ConfigError

CLOCK = (
    time.thread_time if time.get_clock_info("thread_time").resolution < 1e-5 else time.perf_counter
)
SIZE = 512
"""Rows, columns and depth of the products: big enough for the units to show, about 2 ms each."""
BUDGET_SECONDS = 0.05
"""Time spent on the products of both types together, after one of each that warms it up."""
WORTH_IT = 1.2
"""How many times as fast bf16 must be: the casts between the products cost some of the gain."""


@lru_cache(maxsize=1)
def cpu_bf16_is_faster() -> tuple[bool, str]:
    """Time products of matrices in both types for about 50 ms, once a process.

    One thread's own processor time is measured, the best of each type, in turns: other processes on
    the machine must not decide in which type a run computes.

    Returns:
        Whether to compute in bf16 on the CPU, and the measured ratio in words.
    """
    generator = torch.Generator().manual_seed(0)
    single = torch.randn(SIZE, SIZE, generator=generator)
    half = single.to(torch.bfloat16)
    best = {single.dtype: float("inf"), half.dtype: float("inf")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _seconds(single), _seconds(half)
        stop = time.perf_counter() + BUDGET_SECONDS
        while best[half.dtype] == float("inf") or time.perf_counter() < stop:
            for matrix in (single, half):
                best[matrix.dtype] = min(best[matrix.dtype], _seconds(matrix))
    finally:
        torch.set_num_threads(threads)
    ratio = best[single.dtype] / best[half.dtype]
    how = f"bf16 products run at {ratio:.2f} times the speed of fp32, measured"
    if ratio >= WORTH_IT:
        return True, how
    return False, f"{how}; {WORTH_IT} would be worth it"


def _seconds(matrix: torch.Tensor) -> float:
    """Processor time of one product of a matrix with itself."""
    start = CLOCK()
    torch.mm(matrix, matrix)
    return CLOCK() - start


def choose_precision(bf16: bool | None, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The type to compute in under autocast, None for that of the weights, and why.

    Args:
        bf16: what the configuration asks for, None to decide here.
        device: where the model runs.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    native = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if bf16 and not native:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"bf16: expected false or unset, since {name} has no bf16 units")
    if bf16 is not None:
        return (torch.bfloat16 if bf16 else None), f"bf16 is {str(bf16).lower()}"
    if device.type == "cuda":
        why = "the GPU has bf16 units" if native else "the GPU has no bf16 units"
        return (torch.bfloat16 if native else None), why
    faster, why = cpu_bf16_is_faster()
    return (torch.bfloat16 if faster else None), why
