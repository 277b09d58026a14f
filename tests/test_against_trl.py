"""TRL's own trainers beside ours, step by step: the same loss, log-probabilities, rewards and
gradient norm, for every loss that TRL has.
"""

import pytest
from beside_trl import (
    LORA,
    assert_like,
    left_out,
    options_text,
    quick_collections,
    rows_for,
    with_fastdpo,
    with_trl,
)
from fastdpo_kernels import LOSSES
from loss_samples import one_of_each_kind

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


@pytest.fixture(scope="module", autouse=True)
def without_garbage():
    with quick_collections():
        yield


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


ONLY_HERE = {"bco", "bnpo", "dapo", "dr_grpo", "grpo", "listwise", "spin", "sppo"}
"""Losses that TRL does not have, or not for data like ours: `test_objectives.py` has them."""

SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired", "cpo", "simpo"}
"""Those in which TRL honours `label_smoothing`."""

OF_SCORES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Those for which TRL allows other divergences than the reverse KL."""

DIVERGENCES = (
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
)
CPO = {"cpo_alpha": 0.7, "simpo_gamma": 0.4, "alpha": 0.3}
WEIGHTS = {"desirable_weight": 0.8, "undesirable_weight": 1.3}

SINGLE = [([name], {}) for name in sorted(set(LOSSES) - ONLY_HERE)]
OPTIONS = [
    (["sigmoid"], {"ld_alpha": 0.0}),
    (["sigmoid"], {"ld_alpha": 0.3}),
    (["sigmoid"], {"ld_alpha": 1.0}),
    (["aot"], {"ld_alpha": 0.3}),
    (["sigmoid"], {"use_weighting": True}),
    (["ipo"], {"use_weighting": True}),
    (["ipo", "bco_pair"], {"use_weighting": True, "ld_alpha": 0.3}),
    (["discopop"], {"discopop_tau": 0.2}),
    (["sigmoid"], {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    (["sigmoid", "sft"], {"loss_weights": [1.0, 0.5]}),
    (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
    (["sigmoid", "aot", "sft"], {"loss_weights": [0.3, 1.0, 0.7], "ld_alpha": 0.3}),
    (["sigmoid", "sft"], {"loss_weights": [1.0, 0.5], **DIVERGENCES[0]}),
    (["kto"], WEIGHTS),
    (["apo_zero_unpaired"], WEIGHTS),
    (["orpo"], {"beta": 0.5}),
    (["simpo"], CPO | {"beta": 2.0}),
    (["cpo"], CPO | {"alpha": 0.0}),
    (["cpo_hinge"], CPO | {"alpha": 0.0}),
    (["cpo_ipo"], CPO),
    (["simpo"], {"cpo_alpha": 0.0}),
]
ADAPTED = [
    *(([name], {}) for name in one_of_each_kind(name for (name,), _ in SINGLE)),
    (["sigmoid"], {"ld_alpha": 0.3}),
    (["ipo", "bco_pair"], {"use_weighting": True, "ld_alpha": 0.3}),
    (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
    (["kto"], WEIGHTS),
]
"""For an adapter, of which no loss knows: every way to feed a loss and to ask for a reference."""

SMOOTH = [name for name in OF_SCORES if name not in ("exo_pair", "robust")]
OF_DIVERGENCES = [
    *(([name], DIVERGENCES[2]) for name in OF_SCORES),
    *((["exo_pair", "robust"], options) for options in DIVERGENCES[:2]),
    *((SMOOTH, options | {"loss_weights": [1, 2, 3, 0.1, 4, 5]}) for options in DIVERGENCES[:2]),
]
"""One loss at a time with one divergence, and mixes of them all with the others."""


def name_of(case):
    losses, options = case
    return ",".join(losses) + (" " + options_text(options) if options else "")


def check(losses, options, rows, model):
    options = dict(options)
    if set(losses) <= SMOOTHED:
        options["label_smoothing"] = 0.1
    rows = rows_for(losses, rows, model)
    theirs = with_trl(losses, rows, model, **options)
    ours = with_fastdpo(losses, rows, model, **options)
    without = left_out(losses)
    if "use_peft" in options:  # whose first steps leave some pairs apart by rounding alone
        without |= {"rewards/accuracies"}
    assert_like(ours, theirs, without)


@pytest.mark.parametrize("case", SINGLE + OPTIONS, ids=name_of)
def test_every_loss_agrees_with_trl(rows, still_model, case):
    check(*case, rows, still_model)


@pytest.mark.parametrize("case", ADAPTED, ids=name_of)
def test_adapters_agree_with_trl(rows, still_model, case):
    losses, options = case
    check(losses, options | LORA, rows, still_model)


def test_alphas_of_sums_agree_with_trl_where_its_exponentials_hold(rows, still_model):
    """CPO's log-probabilities are sums, whose exponentials fp32 does not hold in longer responses;
    ours takes no such exponential.
    """
    short = [row | {name: row[name].split()[-1] for name in ("chosen", "rejected")} for row in rows]
    check(["cpo"], CPO, short, still_model)


@pytest.mark.parametrize("case", OF_DIVERGENCES, ids=name_of)
def test_every_divergence_agrees_with_trl(rows, still_model, case):
    check(*case, rows, still_model)
