"""The search for the longest pair, and the rows and keys that it needs."""

import math
from pathlib import Path
from typing import Any

import pytest

from bench.report.memory import memory_table
from bench.report.rows import read
from bench.trainers import memory
from bench.trainers import run as trainers
from bench.trainers.job import keys_for
from bench.trainers.memory import search
from bench.workloads import pairs_of

LN2 = math.log(2)
NANO = ["--model_config", "nano", "--shortest", "64"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes where the measurements are."""
    monkeypatch.setenv("FASTDPO_RESULTS", str(tmp_path / "results"))


@pytest.mark.parametrize("limit", [8, 9, 11, 100, 127, 128, 1000])
def test_the_search_ends_within_an_eighth(limit: int) -> None:
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    found = search(fits, 8, 1 << 20)
    assert found <= limit < found * 1.125 + 1
    assert len(tried) == len(set(tried)) <= 16


def test_the_search_stops_where_enough_or_nothing_fits() -> None:
    assert search(lambda tokens: True, 8, 100) == 100
    assert search(lambda tokens: False, 8, 100) == 0


def test_a_pair_of_so_many_tokens() -> None:
    (row,) = pairs_of("pair-16384", 1)
    lengths = [len(row[name].split()) for name in ("prompt", "chosen", "rejected")]
    assert lengths == [14336, 1024, 1024]
    (row,) = pairs_of("pair-64", 1)
    assert len(" ".join(row.values()).split()) == 64


def test_keys_for_one_trainer_alone() -> None:
    keys = ["fastdpo.layer_tile_tokens=512", "trl.activation_offloading=true", "fastdpo.optim=sgd"]
    assert keys_for("fastdpo", keys) == {"layer_tile_tokens": 512, "optim": "sgd"}
    assert keys_for("trl", keys) == {"activation_offloading": True}
    assert keys_for("trl-patched", keys) == {}


def test_every_try_and_the_answer_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(workload: Any, provider: str, *arguments: Any) -> dict[str, Any]:
        longest = {"fastdpo": 200, "trl": 70}[provider]
        fits = int(workload.case["data"].removeprefix("pair-")) <= longest
        return {"peak_mib": 1.0} if fits else {"error": "OutOfMemory: killed"}

    monkeypatch.setattr(trainers, "run", run)
    memory.main([*NANO, "--providers", "fastdpo,trl", "--longest", "512"])
    rows = read(tmp_path / "results", "memory-*.jsonl")
    answers = {row["provider"]: row["tokens"] for row in rows if row["kind"] == "longest"}
    assert answers == {"fastdpo": 192, "trl": 64}
    assert [row["tokens"] for row in rows if row["kind"] == "try"][:2] == [64, 128]
    assert all(row["case"]["data"] == f"pair-{row['tokens']}" for row in rows if "error" in row)


def test_another_error_than_memory_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "run", lambda *arguments: {"error": "ValueError: no"})
    with pytest.raises(SystemExit, match="fastdpo, 64 tokens: ValueError: no"):
        memory.main([*NANO, "--providers", "fastdpo"])


def row(provider: str, **changes: Any) -> dict[str, Any]:
    """A row of one pair, as `bench.trainers` writes it."""
    case = {
        "model": "smollm2-135m",
        "data": "pair-16384",
        "dtype": "fp32",
        "lora": False,
        "gradient_checkpointing": True,
        "reference": "precomputed",
        "steps": 1,
        "keys": ["fastdpo.layer_tile_tokens=1024"],
    }
    figures = {
        "peak_mib": 9000.0,
        "planned_mib": None,
        "loss": [LN2, 0.6],
        "grad_norm": [9.0, 10.0],
    }
    return {"kind": "try", "provider": provider, "device": "H", "case": case, **figures, **changes}


def test_peaks_stand_beside_those_of_trl() -> None:
    older = row("fastdpo", peak_mib=8000.0)
    # What differs in the first step is not compared.
    figures = {"loss": [0.5, 0.60001], "grad_norm": [7.0, 10.001]}
    ours = row("fastdpo", peak_mib=3000.0, planned_mib=2900.0, **figures)
    text = memory_table([older, row("trl"), ours])
    assert "8000" not in text
    label = "smollm2-135m, pair-16384, fp32, gradient checkpointing"
    assert (
        f"| {label} | fastdpo | layer_tile_tokens=1024 | 3000 | 0.33 | 2900 | 1.0e-05 | 1.0e-04 |"
    ) in text
    assert f"| {label} | trl |  | 9000 | 1.00 |" in text


def test_what_proves_nothing_is_told() -> None:
    once = {"loss": [LN2], "grad_norm": [9.0]}
    text = memory_table([row("trl", **once), row("fastdpo", **once)])
    assert text.count("| 1.00 |  | one step proves nothing |  |") == 2
    still = {"loss": [LN2, LN2 + 1e-5]}
    text = memory_table([row("trl", **still), row("fastdpo", **still)])
    assert "| 0.0e+00; losses within 1.0e-05 of ln 2 prove nothing | 0.0e+00 |" in text


def test_out_of_memory_and_the_longest_pairs_are_in_the_table() -> None:
    failed = {key: value for key, value in row("trl").items() if key != "peak_mib"}
    rows = [
        {**failed, "error": "OutOfMemory: killed"},
        row("fastdpo"),
        row("fastdpo", kind="longest", tokens=65536),
        row("trl", kind="longest", tokens=0),
    ]
    text = memory_table(rows)
    assert "| trl |  | out of memory |" in text and "| 9000 |  |" in text
    assert "| fastdpo | layer_tile_tokens=1024 | 65536 |" in text and "| trl |  | 0 |" in text
