"""The card of a trained model names the loss's method and what it was trained on."""

import json

import pytest
from training import run

from bench.jsonl import read_rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def layouts(pairs_file, tmp_path_factory):
    """Few rows of each layout."""
    folder, pairs = tmp_path_factory.mktemp("rows"), read_rows(pairs_file)[:6]
    labels = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    groups = [
        {
            "prompt": f"{number} {pair['prompt']}",
            "responses": [pair["chosen"], pair["rejected"]],
            "scores": [2, 1],
        }
        for number, pair in enumerate(pairs)
    ]
    made = {"pairs": pairs, "labels": labels, "groups": groups}
    return {name: write(folder / f"{name}.jsonl", rows) for name, rows in made.items()}


@pytest.mark.parametrize(
    ("loss", "layout", "short", "method", "units"),
    [
        ("sigmoid", "pairs", "DPO", "Direct Preference Optimization", "6 comparisons"),
        ("ipo", "groups", "DPO", "Direct Preference Optimization", "6 comparisons"),
        ("orpo", "pairs", "ORPO", "Odds Ratio Preference Optimization", "6 comparisons"),
        ("cpo_ipo", "pairs", "CPO", "Contrastive Preference Optimization", "6 comparisons"),
        ("kto", "labels", "KTO", "Kahneman-Tversky Optimization", "12 responses"),
        ("sppo", "groups", "SPPO", "Self-Play Preference Optimization", "12 responses"),
        ("dapo", "groups", "GRPO", "Group Relative Policy Optimization", "12 responses"),
        ("listwise", "groups", "DPO", "Direct Preference Optimization", "6 groups"),
    ],
)
def test_card(tiny_model, layouts, tmp_path, loss, layout, short, method, units):
    keys = {"loss_type": [loss], "max_steps": 1, "per_device_train_batch_size": 4}
    _, said = run(tiny_model, layouts[layout], tmp_path / "out", **keys)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"# {tiny_model.name}, tuned with {short}\n" in card
    assert f"\n- {short.lower()}\n" in card
    assert f" with [{method}](https://arxiv.org/abs/2" in card
    assert f" on `{layout}.jsonl` ({units}), by fastdpo " in card
    assert f"Loss `{loss}`, " in card
    assert any(line.startswith(f"training: {units}, 4 a step, 1 steps, ") for line in said)
    assert any(f" responses, {units}" in line for line in said if line.startswith("data: "))
