"""`python -m bench.check`: what is planted is counted right, and the pages say it."""

import random
from pathlib import Path

import numpy as np
import pytest

from bench import check
from bench.jsonl import write_rows
from bench.report.checks import faults_block, labels_block, speed_block
from fastdpo.checks.near import SAME, similarity

ORIGIN = {
    "device": "EPYC, 2 threads",
    "versions": {"torch": "2.13.0"},
    "date": "2026-11-28",
    "commit": "abc1234",
    "command": "python -m bench.check",
}


def made_up(count: int) -> list[check.Row]:
    rng = random.Random(5)
    words = [f"word{i}" for i in range(2000)]
    return [{key: " ".join(rng.choices(words, k=80)) for key in check.KEYS} for _ in range(count)]


def test_planted_faults_are_counted(monkeypatch):
    monkeypatch.setattr(check, "single_pairs", lambda: made_up(300))
    rows = {(row["fault"], row.get("longer_wins")): row for row in check.faults(random.Random(0))}
    for name in ("exact_duplicate", "contradiction"):
        assert rows[name, None] == {"fault": name, "planted": 10, "found": 10, "right": 10}
    shared = rows["shared_prompt", None]
    assert shared["planted"] == shared["found"] == shared["right"] == 50
    near = rows["near_duplicate", None]
    assert near["reworded"] == 40 and 10 < near["planted"] < 40
    assert near["right"] == near["found"] >= 0.9 * near["planted"]
    assert [rows["length_bias", share]["warned"] for share in (0.5, 0.75)] == [False, True]


def test_rows_that_the_time_is_taken_of(monkeypatch):
    monkeypatch.setattr(check, "single_pairs", lambda: made_up(30))
    first, *others = [" ".join(row.values()) for row in check.mixed(20, random.Random(0))]
    assert max(similarity(first, other) for other in others) < SAME
    again = [row["prompt"] for row in check.repeated(31, random.Random(0))]
    assert again[0].removeprefix("0. ") == again[30].removeprefix("30. ")


def test_labels_are_judged_by_the_other_half(monkeypatch, tmp_path):
    """A policy that knows every pair of the other half, and its own half wrongly."""
    rows = [{"prompt": f"{i} ", "chosen": "good", "rejected": "bad"} for i in range(40)]
    trained: dict[str, set[str]] = {}

    def train(config, given):
        trained[config.output_dir] = {row["prompt"] for row in given}

    def score(config, given):
        known = trained.get(config.model_name_or_path, set())
        right = [1.0 if row["chosen"] == "good" else -1.0 for row in given]
        margins = [-m if row["prompt"] in known else m for m, row in zip(right, given, strict=True)]
        ones = np.ones(len(given))
        return type("Result", (), {"columns": {
            "margin": margins, "chosen_logp": -ones, "rejected_logp": -2 * ones,
            "chosen_tokens": ones, "rejected_tokens": 2 * ones,
        }})  # fmt: skip

    monkeypatch.setattr(check, "train", train)
    monkeypatch.setattr(check, "score", score)
    monkeypatch.setattr(check, "demo_model_path", lambda: Path("base"))
    keys = {"num_train_epochs": 1.0}
    found = check.labels(rows, random.Random(0), tmp_path, **keys)
    assert found["swapped"] == 4
    assert found["auc"] == {"logp": 0.5, "logp_per_token": 0.5, "reward": 1.0}
    assert "reward" not in check.labels(rows, random.Random(0), tmp_path, num_train_epochs=0)["auc"]


@pytest.mark.parametrize("block", [faults_block, labels_block, speed_block])
def test_pages_without_rows(block, tmp_path):
    write_rows(tmp_path / "check.jsonl", [])
    assert block(tmp_path) == "Not measured yet."


def test_pages_sum_over_repetitions(tmp_path):
    fault = {"part": "faults", **ORIGIN}
    counted = {"fault": "near_duplicate", "planted": 20, "found": 16, "right": 15}
    speed = {"part": "speed", "rows": "mixed", "pairs": 100000, **ORIGIN}
    labels = {"part": "labels", "data": "demo", "pairs": 271, "swapped": 27, **ORIGIN}
    write_rows(
        tmp_path / "check.jsonl",
        [
            {**fault, "commit": "0", **counted, "right": 1},
            {**fault, **counted},
            {**fault, **counted, "right": 13},
            {**fault, "fault": "length_bias", "longer_wins": 0.75, "warned": True},
            {**speed, "seconds": 104.37, "cpu_seconds": 34.88},
            {**labels, "auc": {"logp": 0.5, "reward": 0.5}, "command": "an earlier one"},
            {**labels, "auc": {"logp": 1.0, "reward": 0.95}},
            {**labels, "auc": {"logp": 0.75}},
        ],
    )
    assert "| 40 | 0.7000 | 0.8750 |" in faults_block(tmp_path)
    assert "longer response wins 75% in 1 of 1 sets" in faults_block(tmp_path)
    assert "| mixed | 100000 | 34.9 | 104 |" in speed_block(tmp_path)
    assert "| 271 | 27 | 1.00 |  | 0.950 |" in labels_block(tmp_path)
    assert "| 271 | 27 | 0.750 |  |  |" in labels_block(tmp_path)
    assert "0.500" not in labels_block(tmp_path)
