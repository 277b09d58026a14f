"""`fastdpo check --label_errors`: the pairs of a file in the order in which a model doubts them."""

import json

import pytest

from fastdpo import TrainConfig, score
from fastdpo.cli import main

PAIRS = [
    {"prompt": f"the {word} ", "chosen": chosen, "rejected": rejected}
    for word in ("cat", "dog", "bird")
    for chosen, rejected in (("sat", "ran far"), ("ran far", "sat"), ("sat on a mat", "slept"))
]
KEYS = {"use_cpu": True, "bf16": False, "disable_tqdm": True}
FLAGS = ["--use_cpu", "--no_bf16", "--disable_tqdm"]


@pytest.fixture
def check(tmp_path, capsys):
    """Run the command over rows; its findings by name, and the rows of its file of suspects."""

    def run(rows, *words):
        data, out = tmp_path / "pairs.jsonl", tmp_path / "suspects.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["check", str(data), "--suspects", str(out), "--json", *FLAGS, *words]
        assert main(words) == 0
        found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
        return found, [json.loads(line) for line in out.read_text().splitlines()]

    return run


@pytest.mark.parametrize("reference", [True, False])
def test_pairs_are_in_the_order_of_the_margins_that_score_gives(
    check, reference, tiny_model, adapter
):
    model = str(adapter if reference else tiny_model)
    found, suspects = check(PAIRS, "--model_name_or_path", model)
    columns = score(TrainConfig(model_name_or_path=model, **KEYS), PAIRS).columns
    margins = columns["margin"]
    if not reference:
        sides = (
            [logp / n for logp, n in zip(columns[f"{s}_logp"], columns[f"{s}_tokens"], strict=True)]
            for s in ("chosen", "rejected")
        )
        margins = [a - b for a, b in zip(*sides, strict=True)]
    order = sorted(range(len(PAIRS)), key=margins.__getitem__)
    assert [one["row"] for one in suspects] == [place + 1 for place in order]
    assert [one["margin"] for one in suspects] == pytest.approx(sorted(margins), abs=1e-6)
    assert all(one["chosen"] == PAIRS[one["row"] - 1]["chosen"] for one in suspects)
    assert all(one["rejected"] == PAIRS[one["row"] - 1]["rejected"] for one in suspects)
    turned = [place + 1 for place in order if margins[place] < 0]
    finding = found["label_error"]
    assert 0 < finding["count"] == len(turned) < len(PAIRS) and finding["rows"] == turned
    measure = "implicit reward" if reference else "log-probability a token"
    assert f"of 9 pairs are the other way round by the model's {measure}" in finding["text"]
    first = finding["examples"][0]
    assert first["row"] == turned[0] and f"not {suspects[0]['chosen']!r}" in first["text"]


def test_rows_that_cannot_be_read_keep_the_numbers_of_the_others(check, tiny_model):
    rows = [PAIRS[0] | {"chosen": None}, *PAIRS[:3]]
    found, suspects = check(rows, "--model_name_or_path", str(tiny_model))
    assert found["unreadable"]["rows"] == [1]
    assert {one["row"]: one["chosen"] for one in suspects} == {
        number: rows[number - 1]["chosen"] for number in (2, 3, 4)
    }


def test_groups_have_a_line_for_each_comparison(check, tiny_model):
    rows = [{"prompt": "a ", "responses": ["sat", "ran far", "slept"], "scores": [1, 3, 2]}]
    _, suspects = check(rows, "--model_name_or_path", str(tiny_model))
    assert {(one["chosen"], one["rejected"]) for one in suspects} == {
        ("ran far", "slept"), ("ran far", "sat"), ("slept", "sat"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        (PAIRS, ["--label_errors"], "model_name_or_path"),
        (
            PAIRS,
            ["--suspects", "out.txt", "--model_name_or_path", "MODEL"],
            "expected a file named",
        ),
        (PAIRS, ["--suspects", "DATA", "--model_name_or_path", "MODEL"], "is read here"),
        (
            [{"prompt": "a ", "completion": "sat", "label": True}],
            ["--label_errors", "--model_name_or_path", "MODEL"],
            "states no pairs",
        ),
    ],
)
def test_what_is_wrong_is_one_line(rows, words, said, tmp_path, capsys, tiny_model):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, places = data.read_text(), {"MODEL": str(tiny_model), "DATA": str(data)}
    words = [places.get(word, word) for word in words]
    assert main(["check", str(data), *FLAGS, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert data.read_text() == before
