"""Memory that a training step gives back is needed again by the next one: keep it in the process.

glibc returns every large block to the kernel when it is freed, and the kernel hands it out again
page by page, zeroed: for the logits tile of one head call that costs more than its matrix product.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Make glibc reuse freed blocks instead of returning them; False where there is no glibc.

    The peak stays what the largest step needs. Worth it on a CPU; a GPU's memory has its own cache.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _TOP_PAD))
    return all(mallopt(name, value) == 1 for name, value in settings)
