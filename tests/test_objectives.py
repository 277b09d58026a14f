"""Objectives that TRL does not have, or not on data like ours: whole runs against the papers'
formulas in fp64.

The reference is another model and the learning rate 0, so that the losses of all steps are those of
two known models.
"""

import itertools
import random
from functools import partial

import pytest
import torch
from in_fp64 import Models, mean_over, steps_of
from torch.nn.functional import logsigmoid
from training import assert_resumes, metrics, run
from transformers import AutoModelForCausalLM

from bench.jsonl import read_rows, write_rows

LAYOUTS = {
    "shared": {},
    "unshared, one unit a row": {"share_prefix": False, "max_tokens_per_batch": 1},
    "accumulated, ungrouped": {"gradient_accumulation_steps": 2, "group_prompts": False},
    "padded, online": {"attn_implementation": "sdpa", "precompute_ref_log_probs": False},
}
BATCH = 5
BETA = 0.3


@pytest.fixture(scope="module")
def moved_model(still_model, tmp_path_factory):
    """The reference: the model with other weights, near enough for ratios that are not clipped."""
    path = tmp_path_factory.mktemp("moved") / "model"
    model = AutoModelForCausalLM.from_pretrained(still_model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def models(still_model, moved_model):
    return Models(still_model, moved_model)


@pytest.fixture(scope="module")
def pairs(pairs_file):
    return read_rows(pairs_file)


@pytest.fixture(scope="module")
def groups(pairs, models):
    """Four prompts of four responses: scores with ties, all that they could be ranked by, and
    log-probabilities of a policy near the one that is trained.
    """
    rng = random.Random(1)
    found = []
    for index in range(0, 12, 3):
        some = pairs[index : index + 3]
        responses = [row[name] for row in some for name in ("chosen", "rejected")][:4]
        scores = [1.0, 0.25, 0.25, round(rng.random(), 2)]
        made = models.responses(some[0]["prompt"], responses)
        logps = [r.tokens.sum().item() + 0.3 * len(r.tokens) * rng.gauss(0, 1) for r in made]
        found.append(
            {
                "prompt": some[0]["prompt"],
                "responses": responses,
                "scores": scores,
                "logps": [min(logp, -0.1) for logp in logps],
                "rankings": [[1, 2, 3, 4], [4, 1, 2, 2], [1, 1, 3, 4], [2, 1, 4, 3]][index // 3],
            }
        )
    return found


def rows_with(groups, *columns):
    return [{name: group[name] for name in ("prompt", "responses", *columns)} for group in groups]


def win_rate(scores, index):
    """Of the response against all of its group, Wu et al. 2024, section 4."""
    wins = [float(scores[index] > s) + 0.5 * float(scores[index] == s) for s in scores]
    return sum(wins) / len(wins)


def scored(groups, models, scaled=True):
    """Every response with its advantage, its win rate and its behaviour log-probability."""
    units = []
    for group in groups:
        scores = torch.tensor(group["scores"], dtype=torch.float64)
        advantages = scores - scores.mean()
        if scaled:
            advantages = advantages / (scores.std() + 1e-4)
        rates = [win_rate(group["scores"], i) for i in range(len(scores))]
        about = {"advantage": advantages.tolist(), "rate": rates, "logp": group["logps"]}
        units += models.responses(group["prompt"], group["responses"], **about)
    return units


def grpo_tokens(response, beta, sequence=False, behaviour=False, epsilon=0.2, high=0.2):
    """The losses of a response's tokens, Shao et al. 2024, eq. 3 and 4."""
    ratios = (response.tokens - response.ref).exp()
    if sequence:
        old = response.about["logp"] if behaviour else response.ref.sum()
        ratios = ((response.tokens.sum() - old) / len(response.tokens)).exp().expand_as(ratios)
    advantage = response.about["advantage"]
    clipped = ratios.clamp(1 - epsilon, 1 + high)
    kl = (response.ref - response.tokens).exp() - (response.ref - response.tokens) - 1
    return beta * kl - torch.minimum(ratios * advantage, clipped * advantage)


def grpo(step, **options):
    return mean_over(lambda r: grpo_tokens(r, **options).mean())(step)


def bnpo(step, **options):
    """Every batch is a mean over its tokens; the batches count by their responses."""
    means = [torch.cat([grpo_tokens(r, **options) for r in batch]).mean() for batch in step]
    counts = torch.tensor([float(len(batch)) for batch in step])
    return (torch.stack(means) * counts).sum() / counts.sum()


def dapo(step, **options):
    return torch.cat([grpo_tokens(r, **options) for batch in step for r in batch]).mean()


def dr_grpo(step, **options):
    return mean_over(lambda r: grpo_tokens(r, **options).sum() / 40)(step)


GRPO = {
    "grpo": (grpo, {"loss_type": ["grpo"]}, {}),
    "grpo without penalty": (grpo, {"loss_type": ["grpo"], "beta": 0.0}, {"beta": 0.0}),
    "grpo, wide": (
        grpo,
        {"loss_type": ["grpo"], "epsilon": 0.05, "epsilon_high": 0.4},
        {"epsilon": 0.05, "high": 0.4},
    ),
    "grpo of sequences": (
        grpo,
        {"loss_type": ["grpo"], "importance_sampling_level": "sequence", "epsilon": 0.005},
        {"sequence": True, "epsilon": 0.005, "high": 0.005},
    ),
    "grpo with logps": (
        grpo,
        {"loss_type": ["grpo"], "importance_sampling_level": "sequence"},
        {"sequence": True, "behaviour": True},
    ),
    "grpo with logps alone": (
        grpo,
        {"loss_type": ["grpo"], "importance_sampling_level": "sequence", "beta": 0.0},
        {"sequence": True, "behaviour": True, "beta": 0.0},
    ),
    "grpo, unscaled": (grpo, {"loss_type": ["grpo"], "scale_rewards": "none"}, {}),
    "bnpo": (bnpo, {"loss_type": ["bnpo"]}, {}),
    "dapo": (dapo, {"loss_type": ["dapo"]}, {}),
    "dr_grpo": (
        dr_grpo,
        {"loss_type": ["dr_grpo"], "scale_rewards": "none", "max_completion_length": 40},
        {},
    ),
}


def plackett_luce(unit):
    """Rafailov et al. 2023, eq. 20, one place after the other; of ties neither is above."""
    rewards = [BETA * response.logratio for response in unit]
    ranks = [response.about["rank"] for response in unit]
    lost = []
    for reward, rank in zip(rewards, ranks, strict=True):
        below = [other for other, r in zip(rewards, ranks, strict=True) if r > rank]
        lost.append(torch.stack([reward, *below]).logsumexp(0) - reward)
    return torch.stack(lost).sum()


def squares(response):
    """Wu et al. 2024, eq. 4.6."""
    return (response.logratio - (response.about["rate"] - 0.5) / BETA) ** 2


def spin(pair):
    """Chen et al. 2024, eq. 4.7."""
    return -logsigmoid(BETA * (pair[0].logratio - pair[1].logratio))


@pytest.fixture
def agrees(models, still_model, moved_model, tmp_path):
    """Whole runs over rows, in one layout or another, have the losses and gradients of a paper over
    units, which is made anew for each, and each other's metrics.
    """

    def check(rows, units, make_paper, **options):
        data = tmp_path / "rows.jsonl"
        write_rows(data, rows)
        known = None
        for name, layout in LAYOUTS.items():
            accumulated = layout.get("gradient_accumulation_steps", 1)
            paper, steps = make_paper(), steps_of(units, BATCH, accumulated)
            expected = [models.loss_and_norm(paper(step)) for step in steps]
            keys = {"learning_rate": 0.0, "shuffle": False, "beta": BETA} | options | layout
            keys |= {"per_device_train_batch_size": BATCH, "max_steps": len(expected)}
            run(still_model, data, tmp_path / name, ref_model_name_or_path=str(moved_model), **keys)
            found = metrics(tmp_path / name)
            assert [row["loss"] for row in found] == pytest.approx(
                [loss for loss, _ in expected], rel=1e-5, abs=1e-5
            )
            assert [row["grad_norm"] for row in found] == pytest.approx(
                [norm for _, norm in expected], rel=1e-4
            )
            if accumulated == 1:
                known = known or found
                assert_same_metrics(found, known)
        return known

    return check


def assert_same_metrics(found, known):
    varying = {"tokens_per_second", "pairs_per_second", "peak_memory_mib", "num_tokens"}
    varying |= {"tokens_saved_by_sharing"}
    for row, other in zip(found, known, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - varying:
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("case", GRPO)
def test_offline_grpo(agrees, groups, models, case):
    paper, options, of_paper = GRPO[case]
    columns = ("scores", "logps") if of_paper.get("behaviour") else ("scores",)
    units = scored(groups, models, scaled=options.get("scale_rewards") != "none")
    paper = partial(paper, **{"beta": BETA} | of_paper)
    found = agrees(rows_with(groups, *columns), units, lambda: paper, **options)
    assert max(row["clip_ratio/region_mean"] for row in found) > 0 and "logps/mean" in found[0]
    assert (found[0].get("kl", 0) > 0) == (of_paper.get("beta") != 0.0) == ("kl" in found[0])


def test_listwise(agrees, groups, models):
    units = [
        models.responses(group["prompt"], group["responses"], rank=group["rankings"])
        for group in groups
    ]
    agrees(
        rows_with(groups, "rankings"),
        units,
        lambda: mean_over(plackett_luce),
        loss_type=["listwise"],
    )


def test_sppo_of_scores(agrees, groups, models):
    units = scored(groups, models)
    agrees(rows_with(groups, "scores"), units, lambda: mean_over(squares), loss_type=["sppo"])


def test_sppo_of_comparisons(agrees, groups, models):
    """Three comparisons of four responses, of which the last one is in none."""
    stated = [[0, 1], [0, 2], [1, 2]]
    rows = [row | {"comparisons": stated} for row in rows_with(groups)]
    units = [
        unit
        for row in rows
        for unit in models.responses(row["prompt"], row["responses"], rate=(1.0, 0.5, 0.0, 0.5))
    ]
    agrees(rows, units, lambda: mean_over(squares), loss_type=["sppo"])


def test_spin(agrees, pairs, models):
    units = [
        models.responses(row["prompt"], (row["chosen"], row["rejected"])) for row in pairs[:13]
    ]
    agrees(pairs[:13], units, lambda: mean_over(spin), loss_type=["spin"])


def labelled(pairs, models):
    rows, units = [], []
    for row, name in itertools.product(pairs[:7], ("chosen", "rejected")):
        rows.append({"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"})
        label = [float(name == "chosen")]
        units += models.responses(row["prompt"], [row[name]], label=label)
    return rows, units


def running_bco():
    """Jung et al. 2024, eq. 9, with the mean over all batches so far of their mean rewards."""
    means = []

    def loss(step):
        total = []
        for batch in step:
            rewards = [BETA * response.logratio for response in batch]
            means.append(torch.stack(rewards).mean().item())
            delta = sum(means) / len(means)
            for response, reward in zip(batch, rewards, strict=True):
                sign, weight = (1, 0.8) if response.about["label"] else (-1, 1.3)
                total.append(-weight * logsigmoid(sign * (reward - delta)))
        return torch.stack(total).mean()

    return loss


def test_bco(agrees, models, pairs):
    """Whose shift is a mean over batches and over steps."""
    rows, units = labelled(pairs, models)
    weights = {"desirable_weight": 0.8, "undesirable_weight": 1.3}
    agrees(rows, units, running_bco, loss_type=["bco"], **weights)


def test_bco_goes_on_with_its_running_mean(pairs, models, still_model, tmp_path):
    rows, _ = labelled(pairs, models)
    data = tmp_path / "rows.jsonl"
    write_rows(data, rows)
    go = partial(run, still_model, data)
    keys = {"loss_type": ["bco"], "max_steps": 6, "per_device_train_batch_size": 3}
    assert_resumes(go, tmp_path, 3, **keys)
    assert [row["delta"] for row in metrics(tmp_path / "rest")] == [
        row["delta"] for row in metrics(tmp_path / "whole")[3:]
    ]
