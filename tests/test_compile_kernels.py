"""Every configuration that can be selected, compiled for each architecture without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from fastdpo_kernels.triton.compile import TENSOR_CORE

KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_spills_shared_memory_fits_and_tensor_cores_are_used(arch):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(KERNELS), environment.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "fastdpo_kernels.triton.compile",
        "--json",
        "--arch",
        str(arch),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) > 15
    limit = {80: 99, 90: 227, 100: 227}[arch] << 10  # 99: the smallest of Ampere and Ada
    instruction = TENSOR_CORE[arch]
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= limit, row
        assert row["registers"] <= 255, row
        if row["dtype"] == "fp32":  # split in tf32 products
            assert row["tensor_core"] in TENSOR_CORE.values(), row
        else:
            assert row["tensor_core"] == instruction, row
