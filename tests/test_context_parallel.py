"""A row over a group of ranks has the numbers of one device, and each rank its share of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from context_ranks import CASES, WORLD, Case, Row, run
from ranks import forking

from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.context import ContextGroup
from fastdpo.model.forward import batch_states
from fastdpo.model.layout import Layout

TOLERANCE = 1e-12
BEYOND = 1.1
"""What a rank may hold as a multiple of its share."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank saw: the errors of each case, and its shares in groups of two and of four."""
    folder = tmp_path_factory.mktemp("ranks")
    forking()
    mp.start_processes(run, (folder,), WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_have_the_numbers_of_one_device(case: str, ranks: list[Any]) -> None:
    seen = [errors[case] for errors, _ in ranks if case in errors]
    assert len(seen) == CASES[case].ranks
    for errors in seen:
        assert not {name: e for name, e in errors.items() if not e <= TOLERANCE}


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_has_its_share(size: int, ranks: list[Any]) -> None:
    for _, shares in ranks:
        assert not {name: s for name, s in shares[size].items() if not s <= BEYOND / size}


def test_padded_batches_are_refused() -> None:
    row = Row(Case(layout="padded"))
    row.scorer.layout = Layout("padded", "padded: layers of type linear_attention")
    row.scorer.context = ContextGroup(dist.ProcessGroup(0, 2))
    with pytest.raises(ConfigError, match=r"cp_size: .*linear_attention.*set cp_size to 1"):
        row.scorer.token_logps(row.batch)


def test_a_stretch_without_its_group_is_refused() -> None:
    row = Row(Case())
    stretch = ContextGroup(dist.ProcessGroup(0, 2)).stretch(row.batch)
    with pytest.raises(ModelError, match=r"one row of 50 tokens over 1 device\(s\), got 1 of 25"):
        batch_states(row.model, replace(row.batch, **stretch._asdict()))
