"""Losses of a user's own that go wrong, and runs that would silently be others."""

import pytest
import torch
from beside_trl import labelled
from fastdpo_kernels import LOSSES, register_loss
from fastdpo_kernels.losses.divergences import alpha_divergence
from training import metrics, run

from bench.jsonl import read_rows, write_rows
from fastdpo import TrainConfig
from fastdpo.data.dataset import load_data
from fastdpo.errors import ConfigError, DataError
from fastdpo.model.load import load_tokenizer
from fastdpo.model.scorer import Scorer


@pytest.fixture
def own():
    known = dict(LOSSES)
    yield lambda name, **about: register_loss(name, **about)
    for name in set(LOSSES) - set(known):
        del LOSSES[name]


@pytest.fixture
def go(tiny_model, pairs_file, tmp_path):
    def train(loss, rows=None, out="out", **keys):
        file = tmp_path / "rows.jsonl"
        write_rows(file, rows or read_rows(pairs_file))
        named = {"loss_type": [loss]} if loss else {}
        return run(tiny_model, file, tmp_path / out, **{"max_steps": 2, **named, **keys})

    return train


def margins(pairs, *, beta):
    return -beta * pairs.margins


def test_a_loss_that_is_no_tensor_or_has_no_gradient_is_named(go, own) -> None:
    own("nothing")(lambda pairs: None)
    own("detached")(lambda pairs: pairs.margins.detach())
    own("scalar")(lambda pairs: pairs.margins.mean())
    with pytest.raises(ValueError, match=r"loss 'nothing': expected .* \(\d+,\).* got NoneType"):
        go("nothing")
    with pytest.raises(ValueError, match="the loss has no gradient"):
        go("detached")
    with pytest.raises(ValueError, match=r"loss 'scalar': .* got \(\)"):
        go("sigmoid", loss_type=["sigmoid", "scalar"])


def test_columns_that_nobody_gives_are_refused(own) -> None:
    with pytest.raises(ValueError, match=r"columns: expected any of label, .* got 'labels'"):
        own("wrong", kind="response", columns=("labels",))(margins)


def test_a_loss_may_report_what_it_likes(go, own, tmp_path) -> None:
    own("quiet", metrics=lambda pairs: {"margin": pairs.margins})(margins)
    go("quiet", do_eval=True, eval_dataset_name=str(tmp_path / "rows.jsonl"))
    assert {"margin", "entropy", "eval_margin"} <= set().union(*metrics(tmp_path / "out"))


def test_a_loss_that_reads_a_constant_of_the_batch_has_no_expected_start(go, own) -> None:
    own("likely")(lambda pairs, *, beta: pairs.chosen_nll - beta * pairs.margins)
    _, said = go("likely")
    assert "first loss" not in said


def test_two_losses_that_score_first_do_not_mix(go, own) -> None:
    own("mean", terms=lambda pairs: {"m": pairs.margins.mean()})(
        lambda pairs: pairs.given["m"] - pairs.margins
    )
    go("mean", out="alone")
    with pytest.raises(ConfigError, match="one loss with terms of its batch"):
        go("mean", loss_type=["mean", "aot"])


def test_a_run_whose_data_named_the_loss_is_resumed(go, pairs_file, tmp_path) -> None:
    rows = labelled(read_rows(pairs_file))
    go(None, rows, save_strategy="steps", save_steps=1)
    go(None, rows, max_steps=3, resume_from_checkpoint=True)
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2, 3]


def test_a_sorted_loss_takes_no_weights(go) -> None:
    row = {"prompt": "a", "responses": ["b", "c"], "comparisons": [[0, 1, 0.5]]}
    with pytest.raises(DataError, match="have weights, which aot cannot take"):
        go("aot", [row])


@pytest.mark.parametrize("loss", ["aot", "kto"])
def test_a_scoring_pass_has_no_dropout(go, pairs_file, monkeypatch, loss) -> None:
    modes, score, rows = [], Scorer.token_logps, read_rows(pairs_file)

    def watched(self, batch):
        modes.append(self.model.training)
        return score(self, batch)

    monkeypatch.setattr(Scorer, "token_logps", watched)
    adapter = {"use_peft": True, "lora_target_modules": ["q_proj"], "lora_dropout": 0.5}
    go(loss, labelled(rows) if loss == "kto" else rows, **adapter)
    assert modes and not any(modes)


def test_scores_are_not_rounded(tiny_model, tmp_path) -> None:
    row = {"prompt": "a", "responses": ["b", "c"], "scores": [1700000010.0, 1700000000.0]}
    write_rows(tmp_path / "rows.jsonl", [row])
    keys = {"loss_type": ["grpo"], "dataset_name": str(tmp_path / "rows.jsonl")}
    config = TrainConfig.from_dict({"model_name_or_path": str(tiny_model), **keys})
    (group,) = load_data(config, load_tokenizer(config), None).train
    assert group.given["advantage"] == pytest.approx([0.7071, -0.7071], abs=1e-3)
    assert group.given["win_rate"] == [0.75, 0.25]


def test_a_cache_of_sums_and_one_of_tokens_do_not_mix(go, tmp_path) -> None:
    cache = {"reference_cache_dir": str(tmp_path / "cache")}
    for order in (("sigmoid", {}), ("sigmoid", {"ld_alpha": 0.5}), ("sigmoid", {})):
        go(order[0], out=str(len(list(tmp_path.iterdir()))), **order[1], **cache)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_alpha_divergence_far_away_is_finite() -> None:
    far = torch.tensor([1e4], dtype=torch.float64)
    assert torch.isfinite(alpha_divergence(far, 2.0)) and torch.isfinite(
        alpha_divergence(-far, 2.0)
    )
