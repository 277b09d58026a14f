"""The bench of starts measures what it says, on few rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import start
from bench.jsonl import read_rows, write_rows
from bench.report.start import start_block

PAIRS = [{"prompt": "What color is the sky?", "chosen": "Blue.", "rejected": "Green."}]


def test_no_two_prompts_are_equal() -> None:
    rows = start.numbered(PAIRS)
    assert [next(rows)["prompt"][:6] for _ in range(3)] == ["0. Wha", "1. Wha", "2. Wha"]


def test_a_row_for_each_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def measured(kind: str, file: Path) -> dict[str, Any]:
        asked.append((kind, len(read_rows(file))))
        laps = ("rows", "tokens") if kind == "trl" else ("groups", "plan", "step")
        seconds = {f"{lap}{unit}": 0.5 for lap in laps for unit in ("_s", "_cpu_s")}
        return seconds | {"resident_mib": 512}

    monkeypatch.setenv("FASTDPO_RESULTS", str(tmp_path))
    monkeypatch.setattr(start.data, "gsm8k_pairs", lambda: PAIRS)
    monkeypatch.setattr(start, "measured", measured)
    monkeypatch.setattr("sys.argv", ["start", "--pairs", "5"])
    start.main()
    rows = read_rows(tmp_path / "start.jsonl")
    assert [row["start"] for row in rows] == ["trl", "first", "cached"]
    assert asked == [("trl", 5), ("ours", 5), ("ours", 5)]
    assert all(row["options"]["pairs"] == 5 and row["device"] for row in rows)
    monkeypatch.setattr("sys.argv", ["start", "--pairs", "5", "--without", "trl"])
    start.main()
    assert asked[3:] == [("ours", 5), ("ours", 5)]
    page = start_block(tmp_path)
    assert "| first start | 5 | 1.50 (1.50–1.50) | 1.50 (1.50–1.50) | 0.50" in page
    assert "| TRL's preparation | 5 | 1.00 | 1.00 |  | 0.50 |" in page


def test_a_start_is_measured_from_rows_to_a_step(datasets_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    numbered = start.numbered(PAIRS)
    write_rows(file, [next(numbered) for _ in range(20)])
    found = json.loads(json.dumps(start.ours(file)))
    assert (found["groups"], found["steps"]) == (20, 3)
    assert all(
        found[f"{lap}{unit}"] >= 0
        for lap in ("groups", "plan", "step")
        for unit in ("_s", "_cpu_s")
    )
