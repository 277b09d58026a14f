"""TRL's own trainer beside ours, step by step: the same loss, log-probabilities, rewards and
gradient norm.
"""

import pytest
from fastdpo_kernels import LOSSES

from bench.jsonl import read_rows
from bench.trainers.providers import run_fastdpo, run_trl

VARIANTS = {
    "shared": {},
    "packed": {"share_prefix": False},
    "ungrouped": {"group_prompts": False},
    "one pair a row": {"batch": 1},
    "padded": {"attn_implementation": "sdpa"},
    "accumulate 2": {"gradient_accumulation_steps": 2},
}


@pytest.fixture(scope="module")
def rows(pairs_file):
    return read_rows(pairs_file)


@pytest.fixture(scope="module")
def trl(rows, still_model):
    return run_trl(rows, still_model, 4, 6, 6, learning_rate=1e-4).metrics


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_agrees_with_trl(rows, still_model, trl, variant):
    keys = VARIANTS[variant]
    per_step = 6 // keys.get("gradient_accumulation_steps", 1)
    options = {"batch": 0, "learning_rate": 1e-4, **keys}
    ours = run_fastdpo(rows, still_model, 4, per_step, **options).metrics
    assert len(ours) == len(trl) == 4
    assert ours[-1]["loss"] != pytest.approx(ours[0]["loss"], abs=1e-3)
    for a, b in zip(ours, trl, strict=True):
        apart = {name: abs(a[name] - value) for name, value in b.items() if name in a}
        assert apart["loss"] < 1e-5
        assert max(apart["logps/chosen"], apart["logps/rejected"]) < 1e-3
        assert max(apart["rewards/chosen"], apart["rewards/rejected"]) < 1e-4
        assert apart["grad_norm"] < 1e-4 * b["grad_norm"]
        assert apart["entropy"] < 1e-4 and apart["mean_token_accuracy"] < 1e-6
        assert max(apart["logits/chosen"], apart["logits/rejected"]) < 1e-4
        assert apart["learning_rate"] < 1e-12 and apart["num_tokens"] == 0


ONLY_HERE: set[str] = set()
"""Losses that TRL does not have."""


@pytest.mark.parametrize("loss_type", sorted(set(LOSSES) - {"sigmoid"} - ONLY_HERE))
def test_every_loss_agrees_with_trl(rows, still_model, loss_type):
    options = {"loss_type": [loss_type], "label_smoothing": 0.1, "learning_rate": 1e-4}
    theirs = run_trl(rows, still_model, 3, 6, 6, **options).metrics
    ours = run_fastdpo(rows, still_model, 3, 6, 0, **options).metrics
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
