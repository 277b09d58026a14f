"""Weights stepped inside the backward end up as they do when all gradients are there first."""

import math
from functools import partial

import pytest
import torch
from fastdpo_kernels import LOSSES
from training import assert_same_run, metrics, run, weights

from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.training import update
from fastdpo.training.optimizer import make_optimizer
from fastdpo.training.pending import Pending
from fastdpo.training.update import InBackward

ONE_ROW = {"max_tokens_per_batch": 1 << 20, "max_grad_norm": 0}
IN_BACKWARD = {**ONE_ROW, "optimizer_in_backward": True}


@pytest.fixture
def go(tied_model, pairs_file):
    return partial(run, tied_model, pairs_file)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": "adamw_torch", "gradient_checkpointing": True},
        {"layer_tile_tokens": 16},
        {"optim": "sgd", "learning_rate": 1.0},
        {"optim": "adamw_torch_8bit"},
        {"optim": "adamw_bnb_8bit"},
    ],
    ids=["fused", "plain, recomputed", "tiles", "sgd", "torchao", "bitsandbytes"],
)
def test_it_changes_no_number(go, tmp_path, changes):
    common = {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2, **changes}
    go(tmp_path / "plain", **common, **ONE_ROW)
    go(tmp_path / "ours", **common, **IN_BACKWARD)
    assert_same_run(tmp_path / "ours", tmp_path / "plain")
    assert len(metrics(tmp_path / "ours")) == len(metrics(tmp_path / "plain"))


def test_one_gradient_lives_at_a_time(go, tmp_path, monkeypatch):
    alive = []

    def watched(model, config):
        optimizer, parameters = make_optimizer(model, config), list(model.parameters())
        optimizer.register_step_pre_hook(
            lambda *_: alive.append(sum(p.grad is not None for p in parameters))
        )
        return optimizer

    monkeypatch.setattr(update, "make_optimizer", watched)
    go(tmp_path / "ours", max_steps=2, **IN_BACKWARD)
    tensors = weights(tmp_path / "ours")
    assert alive == [1] * (2 * len(tensors)), "each weight once a step, the tied one too"


def test_it_resumes_what_another_run_began(go, tmp_path):
    common = {"max_steps": 5, "warmup_steps": 2, "weight_decay": 0.1}
    go(tmp_path / "plain", **common, **ONE_ROW, save_strategy="steps", save_steps=3)
    path = str(tmp_path / "plain" / "checkpoint-3")
    go(tmp_path / "ours", **common, **IN_BACKWARD, resume_from_checkpoint=path)
    assert_same_run(tmp_path / "ours", tmp_path / "plain")
    assert [row["step"] for row in metrics(tmp_path / "ours")] == [4, 5]


def test_steps_of_several_rows_are_refused_with_the_numbers(go, tmp_path):
    with pytest.raises(ConfigError) as caught:
        go(tmp_path / "out", **{**IN_BACKWARD, "max_tokens_per_batch": 90})
    message = str(caught.value)
    assert "optimizer_in_backward: step 1 of epoch 1 takes " in message
    assert " rows for its 6 comparisons; expected one row a step" in message
    tokens = int(message.split("max_tokens_per_batch to some ")[1].split(",")[0])
    assert "per_device_train_batch_size 6 x gradient_accumulation_steps 1" in message
    # Another order of the data makes longer steps.
    with pytest.raises(ConfigError, match=r"of epoch \d+ takes 2 rows") as later:
        go(tmp_path / "out", **{**IN_BACKWARD, "max_tokens_per_batch": tokens, "max_steps": 200})
    assert "of epoch 1 " not in str(later.value)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def breaks_at(call, wrong, monkeypatch):
    """A loss that is `wrong(loss, margins)` in that call."""
    calls, sigmoid = [], LOSSES["sigmoid"]

    def breaks(pairs, *, beta, label_smoothing):
        calls.append(1)
        loss = sigmoid(pairs, beta=beta, label_smoothing=label_smoothing)
        return wrong(loss, pairs.margins) if len(calls) == call else loss

    monkeypatch.setitem(LOSSES, "breaks", breaks)
    return calls


def infinite_slope(loss, margins):
    return loss + 0 * torch.sqrt((margins - margins).abs())


@pytest.mark.parametrize("waits", [True, False])
def test_a_loss_that_is_not_finite_leaves_the_weights(go, tmp_path, monkeypatch, waits):
    go(tmp_path / "before", max_steps=6, **ONE_ROW, save_strategy="steps", save_steps=2)
    # The second call is the one that tells what the first loss is expected to be.
    breaks_at(4, lambda loss, margins: loss * math.nan, monkeypatch)
    kept, make = [], InBackward.__init__

    def watched(self, *arguments):
        make(self, *arguments)
        self.pending.waits = waits
        kept[:] = self.parameters

    monkeypatch.setattr(InBackward, "__init__", watched)
    keys = {**IN_BACKWARD, "max_steps": 6, "logging_steps": 6, "loss_type": ["breaks"]}
    with pytest.raises(
        FastDPOError, match="step 3: loss is nan; stopped with the weights of step 2"
    ):
        go(tmp_path / "out", **keys)
    sums = sorted(p.double().sum().item() for p in kept)
    right = weights(tmp_path / "before" / "checkpoint-2").values()
    assert sums == pytest.approx(sorted(p.double().sum().item() for p in right), rel=1e-6)


@pytest.mark.parametrize("waits", [True, False])
def test_a_gradient_that_is_not_finite_is_said_to_have_cost_weights(
    go, tmp_path, monkeypatch, waits
):
    """Where the optimizer asks for a flag, weights without a finite gradient are left alone."""
    breaks_at(4, infinite_slope, monkeypatch)
    guard, kept = Pending.guard, []

    def relaxed(self, step, loss):
        self.waits = waits
        kept[:] = [p for group in self.optimizer.param_groups for p in group["params"]]
        guard(self, step, loss)

    monkeypatch.setattr(Pending, "guard", relaxed)
    expected = "step 3: grad_norm is nan; stopped, but .* those of step 2 are gone: go on from"
    with pytest.raises(FastDPOError, match=expected):
        go(tmp_path / "out", **IN_BACKWARD, loss_type=["breaks"], max_steps=6)
    assert all(p.isfinite().all() for p in kept) == (not waits)
