"""transformers' callbacks in our loop: called at the events of its Trainer, in its order, with what
it passes, and obeyed as it obeys them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, ranks
from training import assert_same_run, assert_same_weights, heard, metrics, settings
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from bench.jsonl import read_rows
from bench.trainers.with_trl import make_trainer
from bench.workloads import written_out
from fastdpo import TrainConfig, train
from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.training import checkpoint
from fastdpo.training.callbacks import EVENTS


class Recorder(TrainerCallback):
    """Every event, with the step and the epoch at which it came."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, float]] = []
        self.passed: set[str] = set()
        self.state: Any = None
        self.args: Any = None


def _recording(event: str) -> Callable[..., None]:
    def record(self: Recorder, args: Any, state: Any, control: Any, **passed: Any) -> None:
        self.events.append((event, state.global_step, round(state.epoch or 0, 4)))
        self.passed |= {name for name, value in passed.items() if value is not None}
        self.args, self.state = args, state

    return record


for _event in EVENTS:
    setattr(Recorder, _event, _recording(_event))


class Doing(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, what: Callable[[Any], None]) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **passed: Any) -> None:
        if state.global_step == self.step:
            self.what(control)


def ask(**flags: bool) -> Callable[[Any], None]:
    def set_all(control: Any) -> None:
        for name, value in flags.items():
            setattr(control, name, value)

    return set_all


@pytest.fixture
def go(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Any:
    """Train into a folder of that name with these callbacks."""

    def trained(name: str, callbacks: Any = None, **keys: Any) -> Any:
        keys = {"eval_dataset_name": str(pairs_file), **keys}
        config = settings(tiny_model, pairs_file, tmp_path / name, **keys)
        return train(TrainConfig.from_dict(config), callbacks=callbacks)

    return trained


BUSY = {
    "num_train_epochs": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 2,
}


def test_events_are_those_of_the_trainer(
    go: Any, still_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Of TRL's, beside which the same steps are taken with the same keys."""
    from transformers import AutoTokenizer

    rows = written_out(read_rows(pairs_file), AutoTokenizer.from_pretrained(still_model))
    theirs, ours = Recorder(), Recorder()
    trainer = make_trainer(
        still_model,
        rows,
        rows,
        per_device_train_batch_size=6,
        per_device_eval_batch_size=6,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        output_dir=str(tmp_path / "theirs"),
        **BUSY | {"max_steps": -1},
    )
    trainer.add_callback(theirs)
    theirs.events.append(("on_init_end", 0, 0))  # it was added after that
    trainer.train()
    go("ours", [ours], **BUSY, max_steps=-1)

    known = theirs.events
    del known[-2]  # the totals of the run, which the Trainer logs at its end
    assert trainer.state.max_steps == ours.state.max_steps == 8
    found = ours.events
    # Where an epoch ends and something is due, the Trainer acts before the epoch's end is told.
    assert sorted(found) == sorted(known)
    steps = [e for e in found if e[0] in ("on_step_begin", "on_step_end", "on_evaluate", "on_save")]
    assert steps == [e for e in known if e in steps]
    assert {"model", "processing_class", "optimizer", "lr_scheduler"} <= ours.passed


def test_state_and_arguments_say_what_they_say_there(go: Any, tmp_path: Path) -> None:
    seen = Recorder()
    keys = BUSY | {"max_steps": 8, "metric_for_best_model": "loss", "learning_rate": 1e-2}
    result = go("out", [seen], **keys)
    state, args = seen.state, seen.args
    assert (state.global_step, state.max_steps, state.epoch) == (8, 8, 2.0)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (2, 3, 4)
    losses = {r["step"]: r["eval_loss"] for r in metrics(tmp_path / "out") if "eval_loss" in r}
    assert state.best_metric == min(losses.values())
    assert losses[state.best_global_step] == state.best_metric
    assert state.num_input_tokens_seen == result.metrics["num_tokens"]
    logged = [row["loss"] for row in state.log_history if "loss" in row]
    assert logged == [row["loss"] for row in metrics(tmp_path / "out") if "loss" in row]
    assert args.output_dir == str(tmp_path / "out") and args.learning_rate == 1e-2
    assert args.metric_for_best_model == "loss" and args.greater_is_better is False
    assert (args.world_size, args.process_index, args.should_save) == (1, 0, True)
    assert str(args.device) == "cpu" and '"max_steps": 8' in args.to_json_string()


def test_callbacks_that_only_look_change_nothing(go: Any, tmp_path: Path) -> None:
    class Samples(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **passed: Any) -> None:
            model, tokenizer = passed["model"].eval(), passed["processing_class"]
            made = tokenizer("the cat", return_tensors="pt")
            model.generate(**made, max_new_tokens=3, do_sample=True)

    keys = {"use_peft": True, "lora_dropout": 0.3, "lora_target_modules": ["q_proj"]}
    go("plain", **keys)
    go("seen", [Samples], **keys)
    assert_same_run(tmp_path / "seen", tmp_path / "plain")


def test_a_callback_has_the_run_log_evaluate_save_and_stop(go: Any, tmp_path: Path) -> None:
    flags = {"should_log": True, "should_evaluate": True, "should_save": True}
    one, other = Doing(2, ask(**flags)), Doing(3, ask(should_training_stop=True))
    keys = {"logging_steps": 100, "max_steps": 6, "eval_strategy": "epoch"}
    assert go("out", [one, other], **keys).step == 3
    found = [(row["step"], "eval_loss" in row) for row in metrics(tmp_path / "out")]
    assert found == [(2, False), (2, True)]
    assert checkpoint.damage(tmp_path / "out" / "checkpoint-2") is None
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_is_due_can_be_called_off(go: Any, tmp_path: Path) -> None:
    off = Doing(2, ask(should_save=False, should_log=False))
    go("out", [off], save_strategy="steps", save_steps=1, max_steps=3)
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 3]
    names = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert names == {"checkpoint-1", "checkpoint-3"}


def test_early_stopping_of_transformers_stops_where_the_key_does(go: Any, tmp_path: Path) -> None:
    keys = BUSY | {
        "eval_steps": 1,
        "learning_rate": 0.3,
        "max_steps": 8,
        "metric_for_best_model": "rewards/accuracies",
    }
    theirs = go("callback", [EarlyStoppingCallback(2)], **keys)
    ours = go("key", early_stopping_patience=2, **keys)
    assert theirs.step == ours.step < 8
    assert_same_weights(tmp_path / "callback", tmp_path / "key")


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_save", "on_log"])
def test_what_a_callback_raises_ends_the_run_with_whole_checkpoints(
    go: Any, tmp_path: Path, event: str
) -> None:
    def fail(self: Any, args: Any, state: Any, control: Any, **passed: Any) -> None:
        if state.global_step == 3:
            raise ZeroDivisionError("of the callback")

    failing = type("Failing", (TrainerCallback,), {event: fail})
    keys = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ZeroDivisionError, match="of the callback"):
        go("out", [failing], **keys)
    steps = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert {"checkpoint-1", "checkpoint-2"} <= steps
    assert all(checkpoint.damage(path) is None for path in (tmp_path / "out").glob("checkpoint-*"))
    torch.manual_seed(99)
    go("out", resume_from_checkpoint=True, **keys)
    go("whole", **keys)
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (print, "callbacks: expected a list, got builtin_function_or_method"),
        ([print], "callbacks: expected transformers.TrainerCallback objects, got builtin_function"),
        ([int], "callbacks: expected transformers.TrainerCallback objects, got int; derive it"),
    ],
)
def test_what_is_no_callback_costs_nothing(
    go: Any, tmp_path: Path, wrong: Any, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        go("out", wrong)
    assert not (tmp_path / "out").exists()


def test_an_event_that_never_comes_is_named(go: Any) -> None:
    class Waiting(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **passed: Any) -> None: ...

    with heard() as said:
        go("out", [Waiting(), DefaultFlowCallback()], max_steps=1)
    expected = "callbacks: on_substep_end of Waiting is not called: there is no such moment here"
    assert [line for line in said if line.startswith("callbacks: ")] == [expected]


def test_an_epoch_cannot_be_broken_off(go: Any) -> None:
    with pytest.raises(FastDPOError, match="should_epoch_stop is not honoured"):
        go("out", [Doing(1, ask(should_epoch_stop=True))])


@pytest.fixture(scope="module")
def started() -> Iterator[Ranks]:
    with ranks(2) as processes:
        yield processes


def _stopped_by_the_second(keys: dict[str, Any], rank: int) -> tuple[int, list[Any]]:
    import os

    seen, mine = Recorder(), int(os.environ["RANK"]) == rank
    stop = Doing(2, ask(should_training_stop=True, should_save=True)) if mine else Recorder()
    result = train(TrainConfig.from_dict(keys), callbacks=[stop, seen])
    return result.step, [event for event, step, _ in seen.events if step == 2]


@pytest.mark.parametrize("spread", ["replicate", "fsdp"])
def test_what_is_asked_for_on_one_rank_happens_on_all(
    started: Ranks, tiny_model: Path, pairs_file: Path, tmp_path: Path, spread: str
) -> None:
    keys = settings(tiny_model, pairs_file, tmp_path / "out", data_parallel=spread)
    keys |= {"per_device_train_batch_size": 3}
    found = started(2, _stopped_by_the_second, keys, 1)
    assert [step for step, _ in found] == [2, 2] and found[0][1] == found[1][1]
    assert "on_save" in found[0][1]
    assert checkpoint.damage(tmp_path / "out" / "checkpoint-2") is None
