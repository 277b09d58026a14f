"""What becomes of memory that a step has freed, on a machine with glibc."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from fastdpo.memory.allocator import keep_freed_memory, return_freed_memory

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS"))

assert keep_freed_memory(int(sys.argv[1]))
blocks = [torch.ones(1 << 20) for _ in range(64)]  # of 4 MiB
above = torch.ones(1 << 10)
full = resident()
del blocks
freed = full - resident()
return_freed_memory()
print(freed > 200, full - resident() > 200)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator")
@pytest.mark.parametrize(
    ("row_tokens", "expected"), [(1024, "False True"), (16384, "True True")], ids=["short", "long"]
)
def test_blocks_stay_with_short_rows_and_go_with_long_ones(row_tokens: int, expected: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(row_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == expected
