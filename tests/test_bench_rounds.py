"""The bench of rounds: what it compares after a kill, and what its page shows."""

import json

import datasets
from safetensors.torch import save_file
from torch import zeros

from bench.report.rounds import rounds_demo_block, rounds_kills_block, rounds_sampling_block
from bench.rounds import left_by


def rows(what, *some):
    common = {"commit": "c", "command": "python -m bench.rounds", "date": "2026-11-28"}
    common |= {"device": "CPU", "versions": {}, "options": {"what": what}, "clean": True}
    return "".join(json.dumps(row | common) + "\n" for row in some)


def test_runs_are_compared_by_samples_scores_weights_and_lines(tmp_path):
    def made(name, text="a", weight=0.0, score=1.0, seconds=2.0):
        model = tmp_path / name / "round-1" / "model"
        model.mkdir(parents=True)
        save_file({"w": zeros(2) + weight}, model / "model.safetensors")
        datasets.Dataset.from_dict({"responses": [[text]], "scores": [[score]]}).to_parquet(
            str(model.parent / "scored.parquet")
        )
        line = json.dumps({"round": 1, "score": score, "seconds": {"training": seconds}})
        (tmp_path / name / "rounds.jsonl").write_text(line + "\n")
        return left_by(tmp_path / name)

    whole = made("whole")
    assert made("later", seconds=9.0) == whole
    for name, change in (("a", {"text": "b"}), ("b", {"weight": 1e-7}), ("c", {"score": 0.5})):
        assert made(name, **change) != whole


def test_the_page_shows_rounds_speeds_and_kills(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.report.rounds.origins", lambda rows: [])
    for block in (rounds_demo_block, rounds_sampling_block, rounds_kills_block):
        assert block(tmp_path) == "Not measured yet."
    round_of = {"win_rate": 0.5, "tokens": 20, "kl": 0.0, "demo_seconds": 90}
    spent = {"sampling": 30.0, "training": 10.0}
    (tmp_path / "rounds.jsonl").write_text(
        rows(
            "demo",
            {"round": 0, "score": 0.1} | round_of,
            {"round": 1, "score": 0.25, "seconds": spent} | round_of,
        )
        + rows(
            "sampling",
            {"way": "one", "repetition": 0, "tokens": 100, "seconds": 10},
            {"way": "two", "repetition": 0, "tokens": 300, "seconds": 10},
        )
        + rows(
            "kills", {"killed": True, "bit_for_bit": True}, {"killed": False, "bit_for_bit": False}
        )
    )
    demo = rounds_demo_block(tmp_path)
    assert "| start | 0.100 |" in demo and "1.5 minutes in all." in demo
    assert "| 0.250 | 50% | 20.0 | 0.000 | 40 | sampling 75%, training 25% |" in demo
    assert "| two | 30.0 | 3.00 |" in rounds_sampling_block(tmp_path)
    assert rounds_kills_block(tmp_path).startswith("1 of 2 runs of two rounds were killed")
    assert ": 1 ended with the same" in rounds_kills_block(tmp_path)
