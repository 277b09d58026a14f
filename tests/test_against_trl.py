"""TRL's own trainer beside ours, step by step: the same loss, log-probabilities, rewards and
gradient norm.
"""

import json

import pytest
from fastdpo_kernels import LOSSES

from bench.parity import differences, run_variant
from bench.trainer_providers import run_trl


@pytest.fixture(scope="module")
def rows(pairs_file):
    return [json.loads(line) for line in pairs_file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trl(rows, still_model):
    return run_trl(rows, still_model, 4, 6, 6, learning_rate=1e-4).metrics


@pytest.mark.parametrize("variant", ["shared", "padded", "accumulate 2"])
def test_every_step_agrees_with_trl(rows, still_model, trl, variant):
    ours = run_variant(rows, still_model, 4, 6, variant, 1e-4).metrics
    assert len(ours) == len(trl) == 4
    assert ours[-1]["loss"] != pytest.approx(ours[0]["loss"], abs=1e-3)
    for a, b in zip(ours, trl, strict=True):
        apart = differences(a, b)
        assert apart["loss"] < 1e-5
        assert max(apart["logps/chosen"], apart["logps/rejected"]) < 1e-3
        assert max(apart["rewards/chosen"], apart["rewards/rejected"]) < 1e-4
        assert apart["grad_norm"] < 1e-4
        assert apart["entropy"] < 1e-4 and apart["mean_token_accuracy"] < 1e-6
        assert max(apart["logits/chosen"], apart["logits/rejected"]) < 1e-4
        assert apart["learning_rate"] < 1e-12 and apart["num_tokens"] == 0


@pytest.mark.parametrize("loss_type", sorted(set(LOSSES) - {"sigmoid"}))
def test_every_loss_agrees_with_trl(rows, still_model, loss_type):
    from bench.trainer_providers import run_fastdpo

    options = {"loss_type": [loss_type], "label_smoothing": 0.1, "learning_rate": 1e-4}
    theirs = run_trl(rows, still_model, 3, 6, 6, **options).metrics
    ours = run_fastdpo(rows, still_model, 3, 6, 0, **options).metrics
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
