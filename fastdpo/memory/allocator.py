"""Memory that a training step gives back is needed again by the next one: keep it in the process.

glibc returns large blocks to the kernel when they are freed, and the kernel hands them out again
page by page, zeroed. Kept in the heap, a block serves the next tensor at once. But torch asks for
aligned blocks, for which glibc needs a hole a little larger than the one that the last tensor of
that size left, so the heap grows; with the large blocks of long rows, to several times what is in
use. Those are returned: what is computed in them takes far longer than their zeroing.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_TOP_PAD = 64 << 20
_RETURNED, _RETURNED_OF_LONG_ROWS = 8 << 20, 1 << 20
"""Bytes of a block from which on it is returned. 1024 tokens × 1536 values in fp32 are 6 MiB."""
_LONG_ROW = 4096


def keep_freed_memory(row_tokens: int = 0) -> bool:
    """Make glibc reuse freed blocks of less than 8 MiB instead of returning them, 1 MiB with rows
    of more than 4096 tokens; False where there is no glibc.

    Worth it on a CPU; a GPU's memory has its own cache.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (
            _M_MMAP_THRESHOLD,
            _RETURNED if row_tokens <= _LONG_ROW else _RETURNED_OF_LONG_ROWS,
        ),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, _TOP_PAD),
    )
    return all(mallopt(name, value) == 1 for name, value in settings)


def return_freed_memory() -> None:
    """Give the kernel what lies free in the heap, such as what loading a model has left there."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
