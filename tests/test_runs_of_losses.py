"""Runs of losses that score a step first, or that are not of pairs: resumed, repeated where memory
runs out, stopped where a number is not finite.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training import (
    assert_close_metrics,
    assert_resumes,
    assert_same_run,
    assert_same_weights,
    fill,
    run,
)

from bench.jsonl import read_rows
from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.model.scorer import Scorer
from fastdpo.training.step import Objective

LAYOUTS = {
    **dict.fromkeys(("kto", "bco", "apo_zero_unpaired"), "labels"),
    **dict.fromkeys(("grpo", "listwise", "sppo"), "groups"),
}
FIRST = ("kto", "bco", "aot")
"""Losses of which a step is scored before its rows."""


@pytest.fixture(scope="module")
def files(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same responses as pairs, as labelled ones and as scored groups."""
    folder, pairs = tmp_path_factory.mktemp("layouts"), read_rows(pairs_file)
    labels = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    groups = [
        {
            "prompt": some[0]["prompt"],
            "responses": [pair[name] for pair in some for name in ("chosen", "rejected")],
            "scores": [1.0, 0.1, 0.8, 0.3, 0.9, 0.2],
        }
        for some in (pairs[i : i + 3] for i in range(0, len(pairs), 3))
    ]
    found = {"pairs": pairs_file}
    for name, rows in (("labels", labels), ("groups", groups)):
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return found


@pytest.fixture
def go(tiny_model, files):
    """Run a loss over the rows that it needs."""

    def started(loss: str, output: Path, **keys: Any) -> tuple[dict[str, Any], list[str]]:
        size = 2 if loss == "listwise" else 6
        keys = {"per_device_train_batch_size": size, "max_steps": 5, **keys}
        data = files[LAYOUTS.get(loss, "pairs")]
        return run(tiny_model, data, output, loss_type=[loss], **keys)

    return started


@pytest.mark.parametrize("loss", ["kto", "bco", "aot", "orpo", "grpo", "listwise", "sppo", "cpo"])
def test_a_resumed_run_has_the_same_bits(go, tmp_path, loss):
    keys = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    assert_resumes(partial(go, loss), tmp_path, 3, **keys)


def test_running_means_are_in_the_checkpoint(go, tmp_path):
    start = assert_resumes(partial(go, "bco"), tmp_path, 3, gradient_accumulation_steps=2)
    state = json.loads((start / "trainer_state.json").read_text(encoding="utf-8"))
    ((name, (mean, count)),) = state["running"].items()
    assert name == "delta" and mean != 0 and count == 6, "one for each batch of 3 steps"


@pytest.mark.parametrize("loss", FIRST)
def test_an_evaluation_changes_nothing_of_the_run(go, files, tmp_path, loss):
    data = str(files[LAYOUTS.get(loss, "pairs")])
    keys = {"eval_dataset_name": data, "eval_strategy": "steps", "eval_steps": 2}
    _, said = go(loss, tmp_path / "evaluated", **keys, eval_on_start=True)
    assert sum(line.startswith("evaluation at step ") for line in said) == 4, "0, 2, 4, 5"
    go(loss, tmp_path / "plain")
    assert_same_weights(tmp_path / "evaluated", tmp_path / "plain")


@pytest.mark.parametrize(
    ("keys", "layout", "values"),
    [
        ({"loss_type": ["kto"], "per_device_train_batch_size": 4}, "labels", 48 + 48),
        ({"loss_type": ["bco"]}, "labels", 48),
        ({"loss_type": ["sigmoid"], "ld_alpha": 0.5}, "pairs", 48),
        ({"loss_type": ["grpo"]}, "groups", 48),
        ({"loss_type": ["sigmoid", "sft"]}, "pairs", 48),
    ],
    ids=["kto, mismatched too", "bco", "by tokens", "grpo", "a mix"],
)
def test_a_run_finds_all_that_was_precomputed(tiny_model, files, tmp_path, keys, layout, values):
    found, computed = fill(tiny_model, files[layout], tmp_path / "out", **keys)
    least = values - 24 if keys["loss_type"] == ["kto"] else values
    assert found == 0 and least <= computed <= values, "rows of one prompt are each other's"
    _, said = run(tiny_model, files[layout], tmp_path / "out", **keys)
    assert any(f"{computed} found, 0 computed" in line for line in said)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"loss_type": ["orpo"]}, "loss_type: orpo without a reference: nothing to precompute"),
        ({"loss_type": ["simpo", "sft"]}, "loss_type: simpo and sft without a reference: nothing"),
        ({"sync_ref_model": True}, "sync_ref_model: the reference moves: nothing to precompute"),
    ],
)
def test_nothing_is_precomputed_where_no_reference_is_read(
    tiny_model, files, tmp_path, keys, expected
):
    with pytest.raises(ConfigError, match=expected):
        fill(tiny_model, files["pairs"], tmp_path / "out", **keys)
    assert not (tmp_path / "reference").exists()


def test_nothing_is_precomputed_where_the_rows_have_all_that_is_read(tiny_model, files, tmp_path):
    rows = [row | {"logps": [-1.0] * 6} for row in read_rows(files["groups"])]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = {"loss_type": ["grpo"], "beta": 0.0, "importance_sampling_level": "sequence"}
    with pytest.raises(ConfigError, match="beta: is 0 and every row has logps, so no reference"):
        fill(tiny_model, file, tmp_path / "out", **keys)
    _, said = run(tiny_model, file, tmp_path / "out", **keys)
    assert "reference: none, the loss needs none" in said


KEYS: dict[str, Any] = {"max_tokens_per_batch": 300, "optim": "sgd", "learning_rate": 0.05}


def fails_at(monkeypatch, kind: type, name: str, failing: int) -> list[int]:
    """A method that runs out of memory once it is through, in that call."""
    method, calls = getattr(kind, name), []

    def short(self, *given, **named):
        result = method(self, *given, **named)
        calls.append(1)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("no")
        return result

    monkeypatch.setattr(kind, name, short)
    return calls


@pytest.mark.parametrize("where", ["the scoring pass", "after it"])
@pytest.mark.parametrize("loss", FIRST)
def test_a_step_without_memory_is_repeated_with_the_same_numbers(
    go, tmp_path, monkeypatch, loss, where
):
    go(loss, tmp_path / "undisturbed", **KEYS, save_strategy="steps", save_steps=3)
    name = "_scored" if where == "the scoring pass" else "score"
    fails_at(monkeypatch, Objective, name, 4)
    keys = {**KEYS, "memory": "auto", "save_strategy": "steps", "save_steps": 3}
    _, said = go(loss, tmp_path / "out", **keys)
    assert sum("the step is repeated" in line for line in said) == 1
    assert_close_metrics(tmp_path / "out", tmp_path / "undisturbed")
    states = [
        json.loads((tmp_path / run / "checkpoint-3/trainer_state.json").read_text(encoding="utf-8"))
        for run in ("out", "undisturbed")
    ]
    ours, theirs = (state["running"] for state in states)
    assert ours.keys() == theirs.keys() == ({"delta"} if loss == "bco" else set())
    for term in ours:
        assert ours[term][1] == theirs[term][1] == 3
        assert ours[term][0] == pytest.approx(theirs[term][0], abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", FIRST)
def test_what_is_not_finite_in_the_scoring_pass_stops_the_run(
    go, tmp_path, monkeypatch, loss, value
):
    score, calls = Objective._scored, []

    def broken(self, batch):
        places, seen = score(self, batch)
        calls.append(1)
        if len(calls) > 3:
            found = seen.chosen_logps if loss == "aot" else seen.logps
            found[0] = value
        return places, seen

    monkeypatch.setattr(Objective, "_scored", broken)
    expected = r"step \d: (loss|grad_norm) is (nan|-?inf); stopped with the weights of step \d"
    with pytest.raises(FastDPOError, match=expected):
        go(loss, tmp_path / "out", max_tokens_per_batch=4000)


@pytest.mark.parametrize("loss", [*FIRST, "orpo", "grpo", "listwise"])
def test_logps_that_are_not_finite_stop_the_run(go, tmp_path, monkeypatch, loss):
    fails, calls = Scorer.loss, []

    def broken(self, batch, *given):
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                next(self.model.parameters()).fill_(math.nan)
        return fails(self, batch, *given)

    monkeypatch.setattr(Scorer, "loss", broken)
    with pytest.raises(FastDPOError, match=r"step 3: loss is nan; stopped with the weights of st"):
        go(loss, tmp_path / "out", max_tokens_per_batch=4000)


@pytest.mark.parametrize("loss", [*FIRST, "grpo"])
def test_weights_stepped_in_the_backward_are_the_same(go, tmp_path, loss):
    one_row = {"max_tokens_per_batch": 1 << 20, "max_grad_norm": 0}
    go(loss, tmp_path / "plain", **one_row)
    go(loss, tmp_path / "ours", **one_row, optimizer_in_backward=True)
    assert_same_run(tmp_path / "ours", tmp_path / "plain")


@pytest.mark.parametrize("prompts", [("one ", "one "), ("one ", "two "), ("two ", "one ")])
@pytest.mark.parametrize("loss", ["sppo", "listwise"])
def test_rows_may_say_what_is_needed_in_different_ways(tiny_model, tmp_path, loss, prompts):
    said = {"comparisons": [[0, 1], [0, 2]]} if loss == "sppo" else {"rankings": [1, 3, 2]}
    some = {"responses": [" a cat", " a dog", " hills"]}
    rows = [
        {"prompt": prompts[0], **some, **said},
        {"prompt": prompts[1], **some, "scores": [3.0, 1.0, 2.0]},
    ]
    scored = [{"prompt": prompt, **some, "scores": [3.0, 1.0, 2.0]} for prompt in prompts]
    losses = []
    for name, given in (("both", rows), ("scores", scored)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
        keys = {"loss_type": [loss], "max_steps": 1, "per_device_train_batch_size": 6}
        losses.append(run(tiny_model, file, tmp_path / name, **keys)[0]["loss"])
    assert math.isfinite(losses[0])
    assert (losses[0] == losses[1]) == (loss == "listwise"), "win rates differ, ranks do not"
