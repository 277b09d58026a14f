"""What rounds train on is what the papers define: from scored answers to the loss and its gradient,
in fp64, against the definitions written out here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from in_fp64 import Models
from torch import Tensor
from torch.nn.functional import logsigmoid
from training import metrics, settings, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import train
from fastdpo.config.rounds import RoundsConfig
from fastdpo.data.write import writer_of
from fastdpo.errors import ConfigError
from fastdpo.rounds.pairing import Scored, make_rows

BETA = 0.3


@pytest.fixture(scope="module")
def policies(still_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy and the one before it, in fp64."""
    torch.manual_seed(3)
    paths = []
    for scale in (0.05, 0.0):
        path = tmp_path_factory.mktemp("fp64") / "model"
        model = AutoModelForCausalLM.from_pretrained(still_model, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + scale * torch.randn_like(parameter))
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(still_model).save_pretrained(path)
        paths.append(path)
    return paths[0], paths[1]


@pytest.fixture
def trained(policies, tmp_path):
    """The loss and the gradient of one step on what is made of scored answers."""
    policy, before = policies

    def go(scored: list[Scored], **keys: Any) -> tuple[float, dict[str, Tensor]]:
        (tmp_path / "prompts.jsonl").touch()
        values = settings(policy, tmp_path / "prompts.jsonl", tmp_path / "out", **keys)
        values |= {"dtype": "auto", "optim": "sgd", "learning_rate": 1.0, "max_steps": 1}
        values |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "beta": BETA}
        values |= {
            "per_device_train_batch_size": 100,
            "num_generations": 4,
            "precompute_ref_log_probs": False,
        }
        config = RoundsConfig.from_dict(values)
        rows = tmp_path / "train.parquet"
        writer_of(rows)(make_rows(config, scored).rows)
        train(config.of_round(dataset_name=str(rows), ref_model_name_or_path=str(before)))
        after, start = weights(tmp_path / "out"), weights(policy)
        gradient = {name: start[name] - weight for name, weight in after.items()}
        return metrics(tmp_path / "out")[0]["loss"], gradient

    return go


@pytest.fixture
def models(policies) -> Models:
    return Models(*policies)


def assert_same(trained: tuple[float, dict[str, Tensor]], loss: Tensor, models: Models) -> None:
    """To the precision of fp64, but for what lies before a norm of transformers, which is fp32; of
    as many units as a power of two, since their weights are fp32 too.
    """
    assert trained[0] == pytest.approx(loss.item(), rel=1e-12)
    names, parameters = zip(*models.policy.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    for name, gradient in zip(names, gradients, strict=True):
        most = 1e-12 if name in ("lm_head.weight", "model.norm.weight") else 1e-6
        assert (trained[1][name] - gradient).norm() < most * gradient.norm(), name


def test_sppo(trained, models):
    """Wu et al. 2024, section 4: of the K answers of π_t, P(y_i beats π_t) is the mean over all K
    of P(y_i beats y_k), one half for a tie as for k = i, and the loss, with log Z = η/2, is
    (log π(y)/π_t(y) − η·(P − ½))². Answers that are cut off or have no score are not among the K.
    """
    groups = {
        "the cat": ([" sat on a mat", " ran", " saw", " and on"], [2.0, -1.0, -1.0, 7.0]),
        "one": ([" small dog", " old hills far"], [0.0, 1.0]),
        "all alike": ([" a", " b c"], [3.0, 3.0]),
    }
    given = [Scored(x, ys, scores, [True] * len(ys)) for x, (ys, scores) in groups.items()]
    given[1] = Scored(
        "one",
        [" small dog", " cut", " old hills far", " unscored"],
        [0.0, 9.0, 1.0, None],
        [True, False, True, True],
    )
    rates = {
        "the cat": [5 / 8, 1 / 4, 1 / 4, 7 / 8],
        "one": [1 / 4, 3 / 4],
        "all alike": [1 / 2, 1 / 2],
    }
    losses = [
        (response.logratio - (response.about["rate"] - 0.5) / BETA) ** 2
        for x, (ys, _) in groups.items()
        for response in models.responses(x, ys, rate=rates[x])
    ]
    found = trained(given, loss_type=["sppo"], judge="self", judge_model="before")
    assert_same(found, torch.stack(losses).mean(), models)


@pytest.mark.parametrize("loss", ["spin", "sigmoid"])
def test_spin(trained, models, loss):
    """Chen et al. 2024, eq. 4.7 with the logistic loss: the data's answer against each of those
    that π_t gave, which may repeat itself; one that is the data's own says nothing.
    """
    given = [
        Scored("the cat", [" ran", " saw", " ran"], [None] * 3, [True] * 3, " sat on a mat"),
        Scored("one", [" no", " small dog", " cut"], [None] * 3, [True, True, False], " no"),
    ]
    pairs = [("the cat", " sat on a mat", y) for y in (" ran", " saw", " ran")]
    pairs.append(("one", " no", " small dog"))
    losses = []
    for x, own, sampled in pairs:
        data, model = models.responses(x, [own, sampled])
        losses.append(-logsigmoid(BETA * data.logratio - BETA * model.logratio))
    found = trained(given, loss_type=[loss], judge="row")
    assert_same(found, torch.stack(losses).mean(), models)


SEQUENCE = {"importance_sampling_level": "sequence"}


@pytest.mark.parametrize(
    ("loss", "keys", "reference"),
    [
        ("sppo", {}, "previous"),
        ("sppo_hard", {}, "previous"),
        ("spin", {}, "previous"),
        ("sigmoid", {}, "start"),
        ("grpo", {}, "previous"),
        ("dr_grpo", {"max_steps": 2}, "previous"),
        ("grpo", {"max_steps": 1}, "start"),
        ("grpo", SEQUENCE, "start"),
    ],
    ids=str,
)
def test_the_reference_is_that_of_the_paper(tiny_model, tmp_path, loss, keys, reference):
    """π_t for SPPO and SPIN; the policy that sampled where GRPO's ratio of tokens is to the
    reference; else the start, as for DPO.
    """
    (tmp_path / "prompts.jsonl").touch()
    given = {"loss_type": [loss], "max_steps": -1, "judge": "self", "judge_model": "before"} | keys
    values = settings(tiny_model, tmp_path / "prompts.jsonl", tmp_path / "out", **given)
    config = RoundsConfig.from_dict(values)
    assert config.reference == reference
    assert RoundsConfig.from_dict(config.to_dict()).reference == reference
    assert RoundsConfig.from_dict(values | {"reference": "previous"}).reference == "previous"
    start = values | {"reference": "start"}
    if "grpo" not in loss or reference == "start":
        assert RoundsConfig.from_dict(start).reference == "start"
        return
    with pytest.raises(ConfigError, match=f"start, and {loss} takes the ratio of tokens to"):
        RoundsConfig.from_dict(start)
