"""The doctor among several ranks: what each sees, and in what they differ."""

from dataclasses import replace

import pytest
from ranks import ranks

from fastdpo import doctor
from fastdpo.cli import main
from fastdpo.config import TrainConfig
from fastdpo.parallel.survey import Seen, differences, numbers, table

ONE = Seen(
    rank=0,
    host="alpha",
    device="NVIDIA H100 80GB HBM3",
    memory="79 GiB",
    free=78.0,
    fastdpo="1.0",
    torch="2.13.0",
    transformers="5.24.0",
    python="3.12.1",
    cuda="13.0, NCCL 2.28.3",
)
EIGHT = [
    replace(ONE, rank=rank, host="alpha" if rank < 4 else "beta", free=78 - rank / 10)
    for rank in range(8)
]


def reported() -> str | None:
    """On each rank, without what a process of its own would say."""
    doctor.report = lambda config: "Versions"
    return doctor.report_of_ranks(TrainConfig(use_cpu=True))


def test_the_first_rank_tells_what_all_of_them_see():
    with ranks(2) as started:
        first, second = started(2, reported)
    assert second is None
    title, head, row, alike, speed, *rest = first.splitlines()
    assert title == "Ranks, 2"
    assert head.split() == ["ranks", "host", "device", "memory", "free"]
    assert row.split()[0] == "0-1" and "CPU" in row
    assert "all ranks are alike: fastdpo" in alike
    assert "all-reduce of 16 MiB over gloo in" in speed and "GB/s" in speed
    assert rest == ["", "Versions"]


def test_a_line_for_the_ranks_of_a_host_that_have_the_same():
    odd = [*EIGHT[:3], replace(EIGHT[3], memory="39 GiB"), *EIGHT[4:]]
    rows = [line.split() for line in table(odd)[1:]]
    assert [(row[0], row[1], row[-2]) for row in rows] == [
        ("0-2", "alpha", "77.8"),
        ("3", "alpha", "77.7"),
        ("4-7", "beta", "77.3"),
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            ["all ranks are alike: fastdpo 1.0, torch 2.13.0, transformers 5.24.0, Python 3.12.1"],
        ),
        ({"torch": "2.12.1"}, ["torch differs: 2.13.0 on 0-4, 6-7; 2.12.1 on 5"]),
        (
            {"memory": "39 GiB", "cuda": "12.9, NCCL 2.28.3"},
            [
                "memory differs: 79 GiB on 0-4, 6-7; 39 GiB on 5",
                "CUDA differs: 13.0, NCCL 2.28.3 on",
            ],
        ),
    ],
)
def test_in_what_ranks_differ(changes, expected):
    lines = differences([replace(one, **changes) if one.rank == 5 else one for one in EIGHT])
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


def test_ranks_as_runs():
    assert numbers([0]) == "0"
    assert numbers([5, 1, 0, 2, 7, 8]) == "0-2, 5, 7-8"


def test_one_process_of_torchrun_is_told_of_alone(monkeypatch, capsys):
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)):
        monkeypatch.setenv(name, str(value))
    assert main(["doctor", "--use_cpu"]) == 0
    assert capsys.readouterr().out.startswith("Versions")
