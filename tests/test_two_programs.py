"""Two programs a multiprocessor, as `configs` promises, from what the machine code needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = Path(__file__).parents[1] / "kernels"
REGISTERS, SHARED = 1 << 16, 228 << 10
"""Of a multiprocessor of sm_90 and sm_100; a program's shared memory has 1 KiB of the system's."""

# A process of its own, as Triton interprets or compiles from its import on.
COMPILE = """
import json, sys
from fastdpo_kernels.triton import cases, compile, configs
table, paired = configs.TABLE[sys.argv[1]], {"score", "exponential"}
chosen = {table[kind][0] for kind in ("narrow", "rich", "full")}
for case in cases.cases(sys.argv[1]):
    if case.kernel in paired and case.config in chosen and case.dtype == "bf16":
        found = compile.compile_case(case)
        needs = (case.config.warps * 32, found.registers, found.shared, found.spilled)
        print(json.dumps([case.kernel, case.block, case.flags, *needs]))
"""


@pytest.mark.parametrize("card", ["sm_90", "sm_100"])
def test_two_programs_share_a_multiprocessor_whatever_is_asked_for(card):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(KERNELS), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", COMPILE, card]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    asked = {frozenset(f for f in flags if f.startswith("has_")) for _, _, flags, *_ in found}
    assert {frozenset(), frozenset({"has_entropy", "has_mean", "has_top1"})} < asked
    assert all({f"has_{one}"} in asked for one in ("bias", "softcap", "squares", "entropy", "mean"))
    for *case, threads, registers, shared, spilled in found:
        allotted = -(-registers // 8) * 8  # of a thread, in eights
        assert spilled == 0, case
        assert 2 * allotted * threads <= REGISTERS, (case, registers)
        assert 2 * (shared + 1024) <= SHARED, (case, shared)
