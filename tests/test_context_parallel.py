"""A row over a group of ranks gives the numbers of one device."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from context_ranks import CASES, WORLD, run

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    """Of each rank the errors of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        # One process imports everything, and the ranks are copies of it.
        multiprocessing.set_forkserver_preload(["context_ranks"])
        mp.start_processes(run, (folder,), WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_have_the_numbers_of_one_device(
    case: str, seen: list[dict[str, dict[str, float]]]
) -> None:
    for rank in seen:
        wrong = {name: error for name, error in rank[case].items() if not error <= TOLERANCE}
        assert not wrong
