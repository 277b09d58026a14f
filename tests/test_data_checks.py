"""What a run says of its data before the first step, and leaves for its report."""

import json
import math

import datasets
import pytest
from fastdpo_kernels import LOSSES
from training import heard, settings

from fastdpo import TrainConfig, train
from fastdpo.checks.check import check_quickly
from fastdpo.errors import FastDPOError
from fastdpo.report.page import write_report

ROWS = [
    {"prompt": f"the {animal} ", "chosen": verb, "rejected": other}
    for animal in ("cat", "dog", "bird", "fish")
    for verb, other in (("sat on a mat", "ran"), ("slept", "ran far"), ("ran far", "sat"))
]
FAULTY = [
    *ROWS,
    ROWS[2] | {"prompt": ROWS[2]["prompt"].upper()},
    ROWS[0] | {"chosen": ROWS[0]["rejected"], "rejected": ROWS[0]["chosen"]},
]
FILE = "data_checks.json"


@pytest.fixture
def go(tiny_model, tmp_path):
    """Train on rows; the lines on the checks, and what was written of them."""

    def go(rows, *, given=False, output="out", **keys):
        data, out = tmp_path / "pairs.jsonl", tmp_path / output
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = settings(tiny_model, data, out, **{"max_steps": 1, "check_data": True, **keys})
        with heard() as said:
            train(TrainConfig.from_dict(config), rows if given else None)
        file = out / FILE
        lines = [line for line in said if line.startswith("checks: ")]
        return lines, json.loads(file.read_text()) if file.exists() else None, said

    return go


@pytest.mark.parametrize("given", [False, True], ids=["file", "rows"])
def test_a_run_begins_with_what_the_checks_find(go, given):
    lines, written, said = go(FAULTY, given=given)
    expected = check_quickly(datasets.Dataset.from_list(FAULTY), "rows").as_dict()
    assert written["findings"] == expected["findings"] and written["lengths"] == expected["lengths"]
    assert lines == [
        "checks: 14 rows: 1 error, 1 warning; fastdpo check looks at more",
        "checks: 2 rows contradict another one: of one prompt, the same two responses the other "
        "way round",
        "checks: 1 rows repeat an earlier one",
    ]
    assert sum(line.startswith("layout: ") for line in said) == 1
    assert said.index(lines[-1]) < next(i for i, line in enumerate(said) if "training: " in line)


def test_rows_without_faults_are_a_line(go):
    lines, written, _ = go(ROWS)
    assert lines == ["checks: 12 rows: nothing was found; fastdpo check looks at more"]
    assert written["summary"]["error"] == written["summary"]["warning"] == 0


def test_there_are_five_lines_at_most_and_of_many_rows_a_part_is_read(go, monkeypatch):
    monkeypatch.setattr("fastdpo.training.data_checks.LINES", 1)
    monkeypatch.setattr("fastdpo.checks.check.QUICK_ROWS", 14)
    lines, written, _ = go([*FAULTY, *FAULTY])
    assert len(lines) == 2 and written["summary"]["read"] == 14
    assert lines[0].startswith("checks: 28 rows, of which 14 were looked at: ")
    assert "more in data_checks.json" in lines[0]


def test_prompts_that_are_evaluated_on_too_are_named(go, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(ROWS[4]) + "\n")
    lines, written, _ = go(ROWS, do_eval=True, eval_dataset_name=str(held))
    assert "checks: 1 rows to evaluate on have a prompt that is trained on" in lines
    assert written["findings"][0]["name"] == "shared_prompt"


def test_layouts_and_mixtures_are_read_as_the_run_reads_them(go, tmp_path):
    alpaca = [
        {"instruction": row["prompt"], "input": "", "chosen": row["chosen"],
         "rejected": row["rejected"]}
        for row in FAULTY
    ]  # fmt: skip
    lines, _, _ = go(alpaca)
    assert lines[0].startswith("checks: 14 rows: 1 error,")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parts = [{"path": str(tmp_path / "pairs.jsonl")}, {"path": str(other), "weight": 3.0}]
    lines, _, _ = go(FAULTY, output="mixed", datasets=parts, dataset_name=None)
    assert lines[0].startswith("checks: 26 rows: ")


def test_checks_that_fail_stop_nothing(go, monkeypatch, tmp_path):
    def fails(*arguments):
        raise KeyError("what")

    monkeypatch.setattr("fastdpo.training.data_checks.check_quickly", fails)
    lines, written, _ = go(FAULTY)
    assert len(lines) == 1 and written is None and (tmp_path / "out/model.safetensors").exists()
    assert "were not looked at (KeyError: 'what'); training goes on" in lines[0]


def test_without_the_key_nothing_is_said_and_what_was_written_goes(go):
    assert go(FAULTY)[1] is not None
    lines, written, _ = go(FAULTY, check_data=False, overwrite_output_dir=True)
    assert lines == [] and written is None


def test_nothing_is_written_before_the_first_step(go, monkeypatch, tmp_path):
    def nan(pairs, *, beta, label_smoothing):
        return pairs.margins * math.nan

    monkeypatch.setitem(LOSSES, "nan", nan)
    with pytest.raises(FastDPOError, match="loss is nan"):
        go(FAULTY, loss_type=["nan"])
    assert not (tmp_path / "out").exists()


def test_the_report_of_a_run_shows_them(go, tmp_path):
    go(FAULTY)
    write_report(tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "rows contradict another one" in page and "as row 3: THE CAT" in page


def test_a_stream_is_not_read_again(tiny_model, tmp_path):
    rows = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    config = settings(tiny_model, tmp_path, tmp_path / "out", max_steps=1, check_data=True)
    with heard() as said:
        train(TrainConfig.from_dict(config), rows)
    assert any("rows are a stream" in line for line in said)
