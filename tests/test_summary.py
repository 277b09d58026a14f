"""The last lines of a run: right, five of them, and readable on any terminal."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from training import settings

from fastdpo.cli import main
from fastdpo.training.run import TrainResult
from fastdpo.training.summary import summary

ACCURACY = "eval_rewards/accuracies"


@pytest.fixture
def result(tmp_path: Path) -> TrainResult:
    rows = [{"step": 0, ACCURACY: 0.5, "eval_loss": 0.7}, {"step": 9, ACCURACY: 0.9}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    return TrainResult(9, {ACCURACY: 0.9, "eval_loss": 0.4}, tmp_path, None, 90.0, 180_000)


def test_five_lines_say_what_came_of_it(result: TrainResult) -> None:
    folder = result.output_dir
    assert summary(result, 1000).splitlines() == [
        "Held out  accuracy 0.500 before, 0.900 after",
        "Took      1 min 30 s for the steps up to 9, 2,000 tokens/s",
        f"Model     {folder}",
        f"Figures   {folder / 'metrics.jsonl'}",
        f"Try it    fastdpo chat {folder}",
    ]
    (folder / "report.html").touch()
    lines = summary(result, 1000).splitlines()
    assert lines[3] == f"Figures   {folder / 'report.html'} and {folder / 'metrics.jsonl'}"


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, "not evaluated (do_eval or eval_strategy evaluates)"),
        ({"eval_loss": 0.4}, "loss 0.700 before, 0.400 after"),
    ],
)
def test_without_accuracy_it_is_the_loss(
    result: TrainResult, metrics: dict[str, float], expected: str
) -> None:
    made = TrainResult(9, metrics, result.output_dir)
    assert summary(made, 1000).splitlines()[0] == f"Held out  {expected}"


def test_what_was_not_measured_before_is_not_made_up(result: TrainResult) -> None:
    (result.output_dir / "metrics.jsonl").write_text('{"step": 3, "loss": 1}\n')
    first = summary(result, 1000).splitlines()[0]
    assert first == "Held out  accuracy 0.900 (eval_on_start evaluates before the first step too)"


@pytest.mark.parametrize("width", [1, 10, 39, 40, 60, 80, 200])
def test_it_is_as_narrow_as_the_terminal(result: TrainResult, width: int) -> None:
    """But for a word that is longer than that, which is never broken."""
    text = summary(result, width)
    assert str(result.output_dir) in text and re.search(r"fastdpo\s+chat", text)
    for line in text.splitlines():
        assert len(line) <= width or len(line.split()) <= 2, line


def test_labels_are_bold_where_that_is_asked_for(result: TrainResult) -> None:
    text = summary(result, 80, bold=True)
    assert text.count("\033[1m") == 5
    assert re.sub(r"\033\[\d?m", "", text) == summary(result, 80)


def test_a_command_ends_with_it(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: Any
) -> None:
    found = settings(tiny_model, pairs_file, tmp_path / "out", do_eval=True, eval_on_start=True)
    found["eval_dataset_name"] = pairs_file
    assert main(["train", *[f"--{name}={value}" for name, value in found.items()]]) == 0
    lines = capsys.readouterr().out.split("Held out")[1].splitlines()
    assert re.match(r"  accuracy 0\.\d+ before, [01]\.\d+ after", lines[0])
    text = " ".join(" ".join(lines).split())
    assert "\033" not in text and text.endswith(f"fastdpo chat {tmp_path / 'out'}")


def test_evaluation_begins_where_it_is_cheap(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    from training import metrics, run

    for steps, expected in ((2, []), (80, [0])):
        keys = {"do_eval": True, "eval_dataset_name": str(pairs_file), "max_steps": steps}
        run(tiny_model, pairs_file, tmp_path / str(steps), **keys, logging_steps=100)
        rows = metrics(tmp_path / str(steps))
        assert [r["step"] for r in rows if "eval_loss" in r and r["step"] == 0] == expected
    run(tiny_model, pairs_file, tmp_path / "off", **keys, logging_steps=100, eval_on_start=False)
    assert metrics(tmp_path / "off")[0]["step"] != 0
