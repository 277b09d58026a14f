"""The best checkpoint: which it is, that it is kept and loaded, that a run stops for want of a
better one, and that all of it goes on from a checkpoint as if nothing had happened.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks, ranks
from training import assert_same_weights, heard, metrics, run, settings
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from fastdpo import TrainConfig, train
from fastdpo.errors import ConfigError
from fastdpo.training.best import Best

EVERY_STEP = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "max_steps": 6,
}
"""Steps so large that losses go up and down."""


@pytest.fixture
def go(tiny_model: Path, pairs_file: Path) -> Any:
    return partial(run, tiny_model, pairs_file, eval_dataset_name=str(pairs_file))


def evaluations(output: Path, name: str = "eval_loss") -> dict[int, float]:
    return {int(row["step"]): row[name] for row in metrics(output) if name in row}


def checkpoints(output: Path) -> set[int]:
    return {int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")}


@pytest.mark.parametrize("greater", [False, True])
def test_a_run_ends_with_the_weights_that_were_evaluated_best(
    go: Any, tmp_path: Path, greater: bool
) -> None:
    keys = {"load_best_model_at_end": True, "greater_is_better": greater}
    found, _ = go(tmp_path / "out", **EVERY_STEP, **keys)
    values = evaluations(tmp_path / "out")
    best = (max if greater else min)(values, key=values.__getitem__)
    assert best < 6, "another learning rate would make it a test"
    assert_same_weights(tmp_path / "out", tmp_path / "out" / f"checkpoint-{best}")
    assert found["eval_loss"] == values[best]
    assert f"{values[best]:.4f}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("limit", "left"), [(1, 1), (2, 2), (3, 3)])
def test_the_best_checkpoint_is_kept_beside_the_newest(
    go: Any, tmp_path: Path, limit: int, left: int
) -> None:
    keys = {"load_best_model_at_end": True, "greater_is_better": False}
    go(tmp_path / "out", **EVERY_STEP, **keys, save_total_limit=limit)
    values = evaluations(tmp_path / "out")
    best = min(values, key=values.__getitem__)
    newest = [] if limit == 1 else [6, 5][: limit - 1]
    assert checkpoints(tmp_path / "out") == {best, *newest} and len({best, *newest}) == left


def test_a_checkpoint_follows_each_better_evaluation_and_no_other(go: Any, tmp_path: Path) -> None:
    keys = EVERY_STEP | {"save_strategy": "best"}
    go(tmp_path / "out", **keys)
    values, better, least = evaluations(tmp_path / "out"), set(), float("inf")
    for step, value in values.items():
        if value < least:
            better, least = better | {step}, value
    assert 0 < len(better) < len(values)
    assert checkpoints(tmp_path / "out") == better


class Limits:
    """Our rule and transformers' callback, fed the same evaluations."""

    def __init__(self, tmp_path: Path, **keys: Any) -> None:
        self.config = TrainConfig.from_dict(
            {"eval_strategy": "steps", "metric_for_best_model": "loss", **keys}
        )
        self.ours = Best(self.config)
        patience = keys["early_stopping_patience"]
        threshold = keys.get("early_stopping_threshold", 0.0)
        self.theirs = EarlyStoppingCallback(patience, threshold)
        self.state, self.control = TrainerState(), TrainerControl()
        self.args = TrainingArguments(
            str(tmp_path),
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="loss",
            greater_is_better=keys.get("greater_is_better"),
            use_cpu=True,
        )

    def both(self, step: int, value: float) -> tuple[bool, bool]:
        found = {"eval_loss": value}
        self.theirs.on_evaluate(self.args, self.state, self.control, metrics=found)
        better = np.greater if self.args.greater_is_better else np.less
        worst = -np.inf if self.args.greater_is_better else np.inf
        known = self.state.best_metric
        if better(value, worst if known is None else known):
            self.state.best_metric = value
        self.ours.saw(found, step)
        return self.ours.stops, self.control.should_training_stop


@pytest.mark.parametrize(
    "keys",
    [
        {"early_stopping_patience": 1},
        {"early_stopping_patience": 3},
        {"early_stopping_patience": 2, "early_stopping_threshold": 0.5},
        {"early_stopping_patience": 2, "greater_is_better": True, "early_stopping_threshold": 0.1},
    ],
)
def test_it_stops_when_the_callback_of_transformers_does(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    stopped = 0
    for seed in range(20):
        limits = Limits(tmp_path, **keys)
        values = np.random.default_rng(seed).normal(size=12).round(1).tolist()
        for step, value in enumerate(values, 1):
            ours, theirs = limits.both(step, float(value))
            assert ours == theirs, (seed, step)
            if ours:
                stopped += 1
                break
        assert limits.ours.value == limits.state.best_metric
    assert stopped


def test_what_is_not_a_number_is_never_best() -> None:
    best = Best(TrainConfig(eval_strategy="steps", early_stopping_patience=2))
    assert not best.saw({"eval_loss": float("nan")}, 1)
    assert best.saw({"eval_loss": 5.0}, 2) and best.waited == 0
    assert not best.saw({"eval_loss": float("nan")}, 3) and best.value == 5.0


STOPPING = EVERY_STEP | {
    "greater_is_better": True,
    "metric_for_best_model": "rewards/accuracies",
    "early_stopping_patience": 2,
    "early_stopping_threshold": 2.0,
    "load_best_model_at_end": True,
}
"""No accuracy is better by 2, so evaluations 2 and 3 stop the run."""


def test_a_stopped_run_is_finished_and_goes_on_with_more_patience(go: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, said = go(out, **STOPPING)
    assert [row["step"] for row in metrics(out) if "loss" in row] == [1, 2, 3]
    assert any("stopped at step 3 of 6" in line for line in said)
    _, said = go(out, **STOPPING, resume_from_checkpoint=True)
    assert any("nothing is left to do" in line for line in said)
    patient = STOPPING | {"early_stopping_patience": 4}
    go(out, **patient, resume_from_checkpoint=True)
    assert [row["step"] for row in metrics(out) if "loss" in row] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_best_and_patience_go_with_a_checkpoint(go: Any, tmp_path: Path, step: int) -> None:
    """Elsewhere too; gone on from the step that stopped it, the run takes no step more."""
    go(tmp_path / "whole", **STOPPING)
    torch.manual_seed(99)
    source = tmp_path / "whole" / f"checkpoint-{step}"
    go(tmp_path / "rest", **STOPPING, resume_from_checkpoint=str(source))
    assert_same_weights(tmp_path / "rest", tmp_path / "whole")
    taken = [row["step"] for row in metrics(tmp_path / "rest") if "loss" in row]
    assert taken == list(range(step + 1, 4))
    newest = tmp_path / ("rest" if step < 3 else "whole") / "checkpoint-3" / "trainer_state.json"
    state = json.loads(newest.read_text())["best"]
    whole = tmp_path / "whole" / "checkpoint-3" / "trainer_state.json"
    assert state | {"kept": ""} == json.loads(whole.read_text())["best"] | {"kept": ""}


def test_with_another_metric_it_is_compared_anew(go: Any, tmp_path: Path) -> None:
    go(tmp_path / "out", **STOPPING | {"max_steps": 2})
    keys = STOPPING | {"metric_for_best_model": "loss", "greater_is_better": False}
    source = tmp_path / "out" / "checkpoint-2"
    _, said = go(tmp_path / "more", **keys, resume_from_checkpoint=str(source))
    assert any("compared by eval_loss from here on, anew" in line for line in said)


def test_a_best_checkpoint_that_is_gone_leaves_the_last_weights(go: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(out, **STOPPING | {"max_steps": 2})
    (out / "checkpoint-1" / "manifest.json").unlink()
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["best"]
    best = Best(TrainConfig.from_dict(STOPPING))
    with heard() as said:
        best.resume(out / "checkpoint-2", {**state, "kept": str(out / "checkpoint-1")})
    assert best.kept is None and best.value == state["value"]
    assert said == ["best: checkpoint-1, evaluated best, is gone or damaged"]


def test_a_metric_that_is_never_logged_is_named_before_the_first_step(
    go: Any, tmp_path: Path
) -> None:
    message = (
        "metric_for_best_model: eval_rewards/accuracy is no metric of this evaluation; the nearest "
        "are eval_rewards/accuracies, "
    )
    with pytest.raises(ConfigError, match=message):
        go(tmp_path / "out", **STOPPING | {"metric_for_best_model": "eval_rewards/accuracy"})
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"load_best_model_at_end": True},
            "compares evaluations while training: set eval_strategy",
        ),
        ({"early_stopping_patience": 2}, "compares evaluations while training: set eval_strategy"),
        ({"save_strategy": "best"}, "compares evaluations while training: set eval_strategy"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            "expected save_strategy epoch, that of evaluation, or best, got steps",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 25},
            "expected save_steps to be a multiple of eval_steps 10, got 25",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 0.5},
            "both as steps or both as shares of the run, got 0.5 and 10",
        ),
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 0.2,
                "save_steps": 0.5,
            },
            "expected save_steps to be a multiple of eval_steps 0.2, got 0.5",
        ),
        ({"early_stopping_patience": 0}, "expected a whole number of at least 1"),
        ({"early_stopping_threshold": -1}, "expected a number of at least 0"),
    ],
)
def test_keys_that_cannot_go_together(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        TrainConfig.from_dict(keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 20},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "best"},
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 0.1,
            "save_steps": 0.3,
        },
    ],
)
def test_keys_that_can(keys: dict[str, Any]) -> None:
    assert TrainConfig.from_dict(keys).finds_best


def test_settings_that_compare_nothing_are_named() -> None:
    config = TrainConfig.from_dict({"metric_for_best_model": "loss", "greater_is_better": True})
    assert len(config.idle_settings()) == 2
    assert TrainConfig(early_stopping_threshold=1.0).idle_settings() == [
        "early_stopping_threshold has no effect: early_stopping_patience is null"
    ]


def test_the_direction_is_that_of_the_name() -> None:
    def of(name: str | None, greater: bool | None = None) -> tuple[str, bool]:
        return TrainConfig(metric_for_best_model=name, greater_is_better=greater).best_metric

    assert of(None) == ("eval_loss", False)
    assert of("eval_nll_loss") == ("eval_nll_loss", False)
    assert of("rewards/margins") == ("eval_rewards/margins", True)
    assert of("rewards/margins", False) == ("eval_rewards/margins", False)


@pytest.fixture(scope="module")
def started() -> Iterator[Ranks]:
    with ranks(2) as processes:
        yield processes


def _trained(keys: dict[str, Any]) -> tuple[int, dict[str, float]]:
    result = train(TrainConfig.from_dict(keys))
    return result.step, result.metrics


@pytest.mark.parametrize("spread", ["replicate", "fsdp"])
def test_ranks_stop_together_and_load_the_same(
    started: Ranks, tiny_model: Path, pairs_file: Path, tmp_path: Path, spread: str
) -> None:
    keys = settings(tiny_model, pairs_file, tmp_path / "out", **STOPPING, data_parallel=spread)
    keys |= {"eval_dataset_name": str(pairs_file), "per_device_train_batch_size": 3}
    found = started(2, _trained, keys)
    values = evaluations(tmp_path / "out", "eval_rewards/accuracies")
    best = max(values, key=values.__getitem__)
    assert [step for step, _ in found] == [3, 3] and set(values) == {1, 2, 3}
    assert {row["eval_rewards/accuracies"] for _, row in found} == {values[best]}
    assert_same_weights(tmp_path / "out", tmp_path / "out" / f"checkpoint-{best}")
