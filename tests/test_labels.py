"""What is said of the labels of responses before a run is trained on them."""

import json

import pytest
from training import run

RESPONSES = [" a cat", " one dog", " the mat", " old hills", " far", " a small mat"]


@pytest.fixture
def said_of(tiny_model, tmp_path):
    """Lines about the labels, for so many desirable and undesirable responses."""

    def noted(good: int, bad: int, **keys) -> list[str]:
        labels = [True] * good + [False] * bad
        rows = [
            {"prompt": f"question {number} ", "completion": RESPONSES[number % 6], "label": label}
            for number, label in enumerate(labels)
        ]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        keys = {"loss_type": ["kto"], "max_steps": 1, "overwrite_output_dir": True, **keys}
        _, said = run(tiny_model, file, tmp_path / "out", **keys)
        return [line for line in said if "desirable" in line]

    return noted


@pytest.mark.parametrize("loss", ["kto", "bco", "apo_zero_unpaired"])
def test_labels_of_one_kind_are_trained_on_and_noted(said_of, loss):
    (line,) = said_of(6, 0, loss_type=[loss])
    assert line.startswith("note: ")
    expected = f"rows.jsonl: all 6 responses are desirable; {loss} is made for undesirable ones too"
    assert line.endswith(expected)
    (line,) = said_of(0, 4, loss_type=[loss])
    assert "all 4 responses are undesirable; " in line


def test_weights_that_do_not_make_up_for_the_numbers_are_noted(said_of):
    """1 to 4/3 for desirable times its weight over undesirable times its own."""
    (line,) = said_of(3, 9)
    assert line.endswith(
        "3 desirable and 9 undesirable responses; the KTO paper recommends a desirable_weight from "
        "3 to 4, or an undesirable_weight from 0.25 to 0.333"
    )
    (line,) = said_of(9, 3, desirable_weight=2.0)
    assert "desirable_weight from 0.333 to 0.444, or an undesirable_weight from 4.5 to 6" in line


@pytest.mark.parametrize(
    ("good", "bad", "keys"),
    [
        (6, 6, {}),
        (8, 6, {}),
        (3, 9, {"desirable_weight": 3.5}),
        (9, 3, {"undesirable_weight": 2.5}),
        (9, 3, {"undesirable_weight": 0.0}),
        (6, 6, {"desirable_weight": 2.0}),
    ],
)
def test_nothing_is_said_otherwise(said_of, good, bad, keys):
    assert said_of(good, bad, **keys) == []


def test_batches_of_one_label_are_noted(tiny_model, pairs_file, tmp_path):
    keys = {"loss_type": "kto", "convert": "unpair", "max_steps": 1}
    _, said = run(tiny_model, pairs_file, tmp_path / "out", **keys)
    assert any("8 of 8 batches of 6 have one label only, in the order of" in line for line in said)
