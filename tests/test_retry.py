"""A step that runs out of memory: repeated with the same numbers, or explained."""

import threading
from functools import partial
from typing import Any

import pytest
import torch
from training import heard, metrics, run, weights

from fastdpo.config import TrainConfig
from fastdpo.errors import FastDPOError
from fastdpo.training.retry import out_of_memory
from fastdpo.training.step import Objective

KEYS: dict[str, Any] = {
    "max_tokens_per_batch": 300,
    "gradient_checkpointing": True,
    "optim": "sgd",  # AdamW divides rounding by itself where a gradient is next to nothing
    "learning_rate": 0.05,
}


@pytest.fixture
def go(tiny_model, pairs_file):
    return partial(run, tiny_model, pairs_file)


@pytest.fixture
def no_advice(monkeypatch):
    """What would help is planned, which takes a while, and is another test's concern."""
    monkeypatch.setattr("fastdpo.training.retry.advice", lambda planner: "nothing helps")


@pytest.fixture
def short_of_memory(monkeypatch):
    """Rows of more than so many tokens run out of memory, after they have been scored."""
    score, failed = Objective.score, []

    def limit(tokens: int, error: type[BaseException] = torch.OutOfMemoryError) -> list[int]:
        def limited(self, batch, units, sums, *rest):
            loss = score(self, batch, units, sums, *rest)
            if torch.is_grad_enabled() and batch.computed_tokens > tokens:
                failed.append(batch.computed_tokens)
                loss.backward()
                raise error("can't allocate memory")
            return loss

        monkeypatch.setattr(Objective, "score", limited)
        return failed

    return limit


def compared(output, other):
    """Losses and final weights of two runs are equal within the rounding of fp32."""
    assert len(metrics(output)) == len(metrics(other)) == 4
    for ours, theirs in zip(metrics(output), metrics(other), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "num_tokens", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5, abs=2e-6), name
    expected = weights(other)
    for name, weight in weights(output).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_shorter_rows_give_the_same_run(go, tmp_path, short_of_memory, error):
    go(tmp_path / "undisturbed", **KEYS)
    failed = short_of_memory(100, error)
    _, said = go(tmp_path / "out", memory="auto", **KEYS)
    compared(tmp_path / "out", tmp_path / "undisturbed")
    lines = [line for line in said if "ran out of memory" in line]
    assert len(lines) == len(failed) >= 1
    assert "step 1 " in lines[0] and "max_tokens_per_batch is " in lines[0]
    saved = TrainConfig.load(tmp_path / "out" / "training_config.yaml")
    assert 0 < saved.max_tokens_per_batch < 300
    assert not [t for t in threading.enumerate() if t.name == "ahead"]


def test_a_later_step_is_repeated_too(go, tmp_path, monkeypatch):
    """The rows that were made ahead, of steps after the failed one, are neither lost nor old."""
    go(tmp_path / "undisturbed", **KEYS)
    score, calls = Objective.score, []

    def fails_once(self, batch, units, sums, *rest):
        loss = score(self, batch, units, sums, *rest)
        calls.append(batch.computed_tokens)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no")
        return loss

    monkeypatch.setattr(Objective, "score", fails_once)
    _, said = go(tmp_path / "out", memory="auto", **KEYS)
    compared(tmp_path / "out", tmp_path / "undisturbed")
    assert sum("the step is repeated" in line for line in said) == 1
    after = calls[3:]
    assert max(after) <= calls[2] // 2 + 40, "rows of the old size were taken afterwards"


def test_switches_follow_when_rows_cannot_be_shorter(go, tmp_path, monkeypatch, no_advice):
    go(tmp_path / "undisturbed", **KEYS)
    score, calls = Objective.score, []

    def fails(self, batch, units, sums, *rest):
        calls.append(1)
        if len(calls) <= 9:
            raise torch.OutOfMemoryError("no")
        return score(self, batch, units, sums, *rest)

    monkeypatch.setattr(Objective, "score", fails)
    keys = KEYS | {"gradient_checkpointing": False, "memory": "auto"}
    with pytest.raises(FastDPOError, match=r"step 1 ran out of memory in rows of up to \d+ tokens"):
        go(tmp_path / "none left", **keys)
    tried = len(calls)
    calls.clear()
    calls += [0] * (10 - tried)
    _, said = go(tmp_path / "out", **keys)
    compared(tmp_path / "out", tmp_path / "undisturbed")
    text = "\n".join(said)
    assert "gradient_checkpointing is true now" in text and "head_workspace_mib is " in text


def test_random_states_are_put_back(go, tmp_path, monkeypatch, no_advice):
    """Without dropout nothing reads them, so a step does here; gradients are gone too."""
    score, drawn, gradients = Objective.score, [], []

    def fails_once(self, batch, units, sums, *rest):
        weight = next(self.policy.model.parameters())
        gradients.append(None if weight.grad is None else weight.grad.abs().sum().item())
        drawn.append(torch.rand(()).item())
        loss = score(self, batch, units, sums, *rest)
        if len(drawn) == 1:
            loss.backward()
            raise torch.OutOfMemoryError("no")
        return loss

    monkeypatch.setattr(Objective, "score", fails_once)
    go(tmp_path / "out", memory="auto", **KEYS)
    assert drawn[0] == drawn[1] and gradients[1] in (None, 0.0)


def test_manual_says_what_would_help(go, tmp_path, short_of_memory):
    short_of_memory(100)
    keys = KEYS | {"gradient_checkpointing": False, "max_tokens_per_batch": 4000}
    with pytest.raises(FastDPOError) as raised:
        go(tmp_path / "out", per_device_train_batch_size=24, **keys)
    text = str(raised.value)
    assert text.startswith("step 1 ran out of memory in rows of up to ")
    assert "--gradient_checkpointing true (" in text and "--max_tokens_per_batch " in text
    assert "or --memory auto" in text


def test_weights_that_were_stepped_are_not_stepped_again(go, tmp_path, short_of_memory, no_advice):
    short_of_memory(100)
    keys = {"memory": "auto", "optimizer_in_backward": True, "max_grad_norm": 0.0}
    with pytest.raises(FastDPOError, match="ran out of memory"):
        go(tmp_path / "out", max_tokens_per_batch=4000, gradient_checkpointing=True, **keys)


def test_what_counts_as_out_of_memory():
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not out_of_memory(RuntimeError("shapes do not fit"))
    assert not out_of_memory(ValueError("can't allocate memory"))


def test_compiled_layers_are_not_tiled(go, tmp_path, monkeypatch, no_advice):
    monkeypatch.setattr("fastdpo.training.setup.compile_layers", lambda model: 2)

    def fails(self, batch, units, sums, *rest):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Objective, "score", fails)
    keys = KEYS | {"memory": "auto", "torch_compile": True, "max_tokens_per_batch": 4000}
    with heard() as said, pytest.raises(FastDPOError, match="nothing helps"):
        go(tmp_path / "out", per_device_train_batch_size=24, **keys)
    text = "\n".join(said)
    assert "head_workspace_mib is " in text and "layer_tile_tokens is " not in text
