"""`fastdpo_kernels` is for other people's trainers, so its import must not bring anything along."""

import os
import subprocess
import sys
from pathlib import Path

import fastdpo_kernels

PROGRAM = """
import sys
import torch

before = set(sys.modules)
import fastdpo_kernels

fastdpo_kernels.LinearDPOLoss()
names = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(names - set(sys.stdlib_module_names)))
"""


def test_the_kernels_import_torch_alone() -> None:
    path = str(Path(fastdpo_kernels.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.stdout.split() == ["fastdpo_kernels"], run.stderr
