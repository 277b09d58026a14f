"""Optimizers with small states: AdamW in 8 bits and bf16 weights that are rounded by chance."""

import sys
from functools import partial

import pytest
import torch
from training import assert_resumes, run, weights

from fastdpo.config import TrainConfig
from fastdpo.config.optimizer import BITSANDBYTES, TORCHAO
from fastdpo.errors import CheckpointError, ConfigError
from fastdpo.training.optimizer import make_optimizer
from fastdpo.training.optimizer_state import flatten

EIGHT_BIT = (*TORCHAO, *BITSANDBYTES)


@pytest.fixture
def go(tied_model, pairs_file):
    return partial(run, tied_model, pairs_file)


def moved(output, model):
    before, after = weights(model), weights(output)
    return torch.cat([(after[name].double() - before[name]).flatten() for name in before])


@pytest.mark.parametrize("optim", EIGHT_BIT)
def test_8_bit_adamw_goes_where_adamw_goes(go, tmp_path, tied_model, optim):
    """The first step comes before any rounding of moments; later ones are close."""
    for steps, near in ((1, 1e-4), (6, 0.2)):
        keys = {"max_steps": steps, "weight_decay": 0.1, "save_strategy": "no"}
        go(tmp_path / f"ours-{steps}", optim=optim, **keys)
        go(tmp_path / f"theirs-{steps}", optim="adamw_torch", **keys)
        ours = moved(tmp_path / f"ours-{steps}", tied_model)
        theirs = moved(tmp_path / f"theirs-{steps}", tied_model)
        assert (ours - theirs).norm() < near * theirs.norm()
    assert (ours - theirs).norm() > 1e-4 * theirs.norm(), "nothing was rounded"


@pytest.mark.parametrize("optim", EIGHT_BIT)
def test_a_resumed_run_equals_an_uninterrupted_one(go, tmp_path, optim):
    # torchao keeps the rate in fp32, where this one's last value depends on how it is multiplied.
    rate = {"lr_scheduler_type": "cosine", "learning_rate": 3e-4}
    keys = {"optim": optim, "max_steps": 7, "weight_decay": 0.1, **rate}
    start = assert_resumes(go, tmp_path, 3, **keys)
    other = keys | {"optim": "adamw_torch", "resume_with_changes": True}
    with pytest.raises(CheckpointError, match="another optimizer"):
        go(tmp_path / "other", **other, resume_from_checkpoint=str(start))


@pytest.mark.parametrize("optim", EIGHT_BIT)
def test_states_take_two_bytes_a_weight(optim):
    """Eight for embeddings with bitsandbytes, as in transformers."""
    embedding = 8 if optim in BITSANDBYTES else 2
    for kind, width in ((torch.nn.Linear, 2), (torch.nn.Embedding, embedding)):
        layer = kind(4096, 64)
        optimizer = make_optimizer(layer, TrainConfig(optim=optim))
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()
        tensors, _ = flatten(optimizer)
        held = sum(t.nbytes for t in tensors.values())
        assert held == pytest.approx(width * 64 * 4096, rel=0.03)


def test_stochastic_rounding_is_right_on_average():
    """An update of 1/10 of a bf16 step: nearest rounding never takes it."""

    def mean(**changes):
        layer = torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
        torch.nn.init.constant_(layer.weight, 0.75)
        config = TrainConfig(optim="adamw_torch_8bit", learning_rate=2**-8 / 10, **changes)
        optimizer = make_optimizer(layer, config)
        for _ in range(5):
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()
        return 0.75 - layer.weight.double().mean().item()

    torch.manual_seed(0)
    assert mean(dtype="bfloat16") == 0
    expected = 5 * 2**-8 / 10
    assert mean(dtype="bfloat16", stochastic_rounding=True) == pytest.approx(expected, rel=0.05)


def test_a_bf16_run_learns_by_stochastic_rounding_and_resumes(go, tmp_path):
    keys = {"optim": "adamw_torch_8bit", "dtype": "bfloat16", "stochastic_rounding": True}
    assert_resumes(go, tmp_path, 2, **keys, learning_rate=3e-5, max_steps=4)
    assert weights(tmp_path / "whole")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("optim", "library"), [("adamw_torch_8bit", "torchao"), ("paged_adamw_8bit", "bitsandbytes")]
)
def test_a_missing_library_is_named_before_anything_is_loaded(
    go, tmp_path, monkeypatch, optim, library
):
    for name in [name for name in sys.modules if name.split(".")[0] == library] or [library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    expected = rf"optim: {optim} needs {library}: pip install 'fastdpo\[memory\]'"
    with pytest.raises(ConfigError, match=expected):
        go(tmp_path / "out", optim=optim, model_name_or_path="/nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optimizer_in_backward": True}, "needs max_grad_norm 0, got 1.0"),
        (
            {"optimizer_in_backward": True, "max_grad_norm": 0, "use_peft": True},
            "optimizer_in_backward: is for training all weights",
        ),
        (
            {"optimizer_offload": True, "optim": "sgd"},
            "optimizer_offload: expected optim adamw_torch_fused or adamw_torch, got sgd",
        ),
        (
            {"stochastic_rounding": True, "dtype": "bfloat16"},
            "stochastic_rounding: expected optim adamw_torch_8bit, got adamw_torch_fused",
        ),
        (
            {"stochastic_rounding": True, "optim": "adamw_torch_8bit"},
            "stochastic_rounding: expected dtype bfloat16, got float32",
        ),
    ],
)
def test_keys_that_do_not_fit_together(values, expected):
    with pytest.raises(ConfigError, match=expected):
        TrainConfig(**values)
