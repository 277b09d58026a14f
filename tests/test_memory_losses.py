"""What a plan knows of losses: the rows of a step, the pass before it, the reference."""

import json
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
from planned import Real, a_group, plan_of
from training import metrics, run

from fastdpo import TrainConfig
from fastdpo.cli import main
from fastdpo.data.batch import make_batch
from fastdpo.data.groups import Group, count_units
from fastdpo.data.packing import LAYOUTS
from fastdpo.data.plan import make_plan
from fastdpo.data.ragged import Lists
from fastdpo.devices import Device, named
from fastdpo.losses import loss_of, make_loss
from fastdpo.memory import components, estimate
from fastdpo.memory.planner import Planner, describe_data, make_planner
from fastdpo.memory.report import as_dict, as_text
from fastdpo.memory.shapes import RowShape, mismatched_shapes, step_shapes
from fastdpo.memory.speed import UTILISATION
from fastdpo.training.loop import Trainer

H100 = named("h100-80gb")
WORDS = "the cat sat on a mat and saw one small dog run far over old hills"


@pytest.fixture
def planner(tmp_path):
    """A model of 1.5B parameters that is nowhere, and rows of assumed lengths."""
    return partial(plan_of, tmp_path)


@pytest.fixture
def labelled_file(tmp_path):
    """24 short labelled responses over 8 prompts."""
    rng = random.Random(0)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "one",
        "small",
        "dog",
        "run",
        "far",
        "over",
        "old",
        "hills",
    ]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    rows = []
    for number in range(8):
        prompt = f"question {number}: {text(3, 12)} "
        rows += [
            {"prompt": prompt, "completion": text(2, 9), "label": rng.random() < 0.5}
            for _ in range(3)
        ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Memory, beside what is counted


OBJECTIVES: dict[str, dict[str, Any]] = {
    "kto": {},
    "bco": {},
    "orpo": {},
    "simpo": {},
    "grpo": {},
    "listwise": {},
    "aot": {},
    "ld_alpha": {"loss_type": ["sigmoid"], "ld_alpha": 0.5},
    "use_weighting": {"loss_type": ["sigmoid"], "use_weighting": True},
}


BF16 = {"gradient_checkpointing": False, "bf16": True}


@pytest.mark.parametrize(
    "name, keys", [*((name, {}) for name in OBJECTIVES), ("kto", BF16), ("use_weighting", BF16)]
)
def test_the_peak_of_every_loss_is_within_a_tenth(name, keys):
    real = Real(pairs=2, **({"loss_type": [name]} | OBJECTIVES[name] | keys))
    assert real.predicted_peak() == pytest.approx(real.peak(), rel=0.1)


@pytest.mark.parametrize(
    "name, keys",
    [("kto", {}), ("kto", {"bf16": True}), ("bco", {"use_peft": True}), ("aot", {})],
)
def test_the_pass_before_a_step_is_that_of_a_forward_and_never_the_peak(name, keys):
    real = Real(loss_type=[name], **keys)
    first, step = real.peak(first=True), real.peak()
    assert real.predicted_first() == pytest.approx(first, rel=0.1)
    assert first < 0.6 * step
    assert "scoring" not in estimate.estimate(real.run).moment
    ((row,),) = real.run.first
    kept = components.held_by_layers(real.run, row, real.shape.layers)["checkpoints"]
    for moment in estimate.scoring(real.run, row):
        assert moment.components["checkpoints"] == 0 < kept
        assert moment.peak < estimate.estimate(real.run).peak


def test_a_pass_over_longer_rows_than_the_steps_own_counts(tmp_path, planner):
    """Each short response's prompt is also scored with a long one."""
    made = planner(H100, loss_type=["kto"], max_length=1024)
    ids = np.zeros(16384, np.int32)
    rows = [
        Group(ids[:64], [ids[:8], ids], unit="response", items=[0], rows=[i], mismatched=[1])
        for i in range(8)
    ]
    made.data.train = rows
    found = made.predict(made.config.choose("", max_tokens_per_batch=16384, optim="sgd"))
    whole = made.run(found.config)
    (row, *_) = estimate.largest_rows(whole.first)
    assert row.tokens > 16384 > max(r.tokens for r in estimate.largest_rows(whole.steps))
    assert found.estimate.peak >= max(m.peak for m in estimate.scoring(whole, row))


# The rows of a step


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sigmoid", "orpo", "kto", "grpo", "listwise"])
def test_shapes_count_the_tokens_that_batches_score(name, layout):
    loss = make_loss([name], beta=0.1)
    groups = [a_group(loss)] * 3
    (step,) = make_plan(groups, units_per_step=count_units(groups), max_tokens=10**6, layout=layout)
    ((shape,),) = step_shapes(groups, [step], layout, prompt=loss.prompt)
    batch = make_batch(groups, step.ranks[0][0], layout, prompt=loss.prompt)
    assert (shape.scored, shape.tokens) == (len(batch.targets), batch.computed_tokens)
    assert shape.prompts == (3 * 199 if name == "orpo" else 0)
    (before,) = mismatched_shapes(groups, [step], layout)
    assert len(before) == len(step.first) == (name == "kto")
    for shape, row in zip(before, step.first, strict=True):
        batch = make_batch(groups, row, layout, mismatched=True)
        assert (shape.scored, shape.tokens) == (len(batch.targets), batch.computed_tokens)


def test_the_plan_has_the_rows_that_training_has(tiny_model, labelled_file, tmp_path, monkeypatch):
    """Those of KTO's mismatched responses too, packed to the same budget."""
    keys = {"loss_type": ["kto"], "max_tokens_per_batch": 64}
    taken = []
    original = Trainer.gradients

    def watched(trainer: Trainer, step: Any) -> Any:
        taken.append(step)
        return original(trainer, step)

    monkeypatch.setattr(Trainer, "gradients", watched)
    run(tiny_model, labelled_file, tmp_path / "out", **keys)
    config = TrainConfig.load(tmp_path / "out" / "training_config.yaml")
    made = make_planner(config, Device("cpu", "cpu", 1 << 30))
    planned = made.run(config)
    for number, step in enumerate(taken):
        for batches, rows in ((step.batches, planned.steps), (step.first, planned.first)):
            sizes = [(batch.computed_tokens, len(batch.targets)) for batch in batches]
            assert sizes == [(row.tokens, row.scored) for row in rows[number]]
    assert planned.first != planned.steps and len(taken) == 4


# The reference


@pytest.mark.parametrize("name", ["orpo", "cpo", "simpo", "sft"])
@pytest.mark.parametrize("precompute", [True, False])
def test_a_loss_without_a_reference_has_none_in_its_plan(planner, name, precompute):
    """No second model, no pass before training, no seconds."""
    keys = {} if precompute else {"precompute_ref_log_probs": False}
    made = planner(H100, loss_type=[name], **keys)
    found = made.predict(made.config)
    whole = made.run(made.config)
    assert not (whole.precomputes or whole.online or whole.second_model)
    assert found.estimate.components["reference"] == 0
    assert found.seconds.reference == found.seconds.scoring == 0
    dpo = planner(H100)
    if name != "orpo":  # which scores more tokens
        assert found.estimate.peak == dpo.predict(dpo.config).estimate.peak
    assert made.steps(made.config)[0][0].tokens == dpo.steps(dpo.config)[0][0].tokens


def test_grpo_without_a_penalty_needs_the_reference_only_where_the_data_has_no_logps(planner):
    made = planner(H100, loss_type=["grpo"])
    free = Planner(made.config, made.data, H100, made.autocast, made.model_config)
    free.loss = make_loss(["grpo"], beta=0.0)
    items = made.groups.items
    made.groups.given["logp"] = Lists(-np.ones(len(items.values)), items.ends)
    assert made.compares and not free.compares
    made.groups.given.clear()
    other = Planner(made.config, made.data, H100, made.autocast, made.model_config)
    other.loss = free.loss
    assert other.compares


@pytest.mark.parametrize("name", ["sigmoid", "kto", "aot", "grpo"])
def test_an_online_reference_is_there_and_takes_its_time(planner, name):
    made = planner(H100, loss_type=[name], precompute_ref_log_probs=False, max_length=512)
    found, whole = made.predict(made.config), made.run(made.config)
    assert found.estimate.components["reference"] == whole.model.weights
    before = planner(H100, loss_type=[name], max_length=512)
    precomputed = before.predict(before.config)
    assert precomputed.estimate.components["reference"] == precomputed.seconds.reference == 0
    assert found.seconds.reference > 0
    assert found.seconds.scoring == pytest.approx(2 * precomputed.seconds.scoring)


@pytest.mark.parametrize("name", ["sigmoid", "kto"])
def test_a_reference_that_moves_is_a_second_model(planner, name):
    made = planner(H100, loss_type=[name], sync_ref_model=True)
    found, whole = made.predict(made.config), made.run(made.config)
    assert whole.second_model and not whole.precomputes
    assert found.estimate.components["reference"] == whole.model.weights
    assert found.seconds.reference > 0


# Time


def seconds(rows: list[RowShape], whole: components.Run) -> float:
    """Of a forward: two operations for every multiplication of a matrix with a token, and four for
    every query-key pair, head and layer.
    """
    model = whole.model
    each = sum(row.tokens * model.linear + row.scored * model.vocab * model.hidden for row in rows)
    pairs = sum(row.pairs for row in rows) * model.heads * model.head_dim * model.layers
    return (2.0 * each + 4.0 * pairs) / (H100.bf16 * UTILISATION)


def test_kto_takes_as_much_longer_as_its_scoring_pass(planner):
    """Than DPO on rows of the same tokens."""
    made = {}
    for name in ("sigmoid", "kto"):
        made[name] = planner(H100, loss_type=[name], per_device_train_batch_size=16)
        groups = [a_group(make_loss([name], beta=0.1))] * 8
        made[name].data.train = groups
    dpo, kto = (planner.predict(planner.config).seconds for planner in made.values())
    whole = made["kto"].run(made["kto"].config)
    assert whole.steps == made["sigmoid"].steps(made["sigmoid"].config)
    assert dpo.scoring == 0 < kto.scoring
    assert kto.total - dpo.total == pytest.approx(kto.scoring)
    assert kto.scoring == pytest.approx(seconds(whole.mismatched[0], whole))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "bco"])
def test_a_step_that_is_scored_first_computes_its_rows_once_more(planner, name):
    made = planner(H100, loss_type=[name])
    whole = made.run(made.config)
    found = made.predict(made.config).seconds
    assert found.scoring == pytest.approx(seconds(whole.steps[0], whole))


# What is said


ASSUMED = {
    "sigmoid": "pairs of 64 tokens each",
    "orpo": "pairs of 64 tokens each",
    "kto": "labelled responses of 64 tokens each",
    "apo_zero_unpaired": "labelled responses of 64 tokens each",
    "grpo": "groups of 4 scored responses of 64 tokens each",
    "sppo": "groups of 4 scored responses of 64 tokens each",
    "listwise": "groups of 4 ranked responses of 64 tokens each",
}


@pytest.mark.parametrize("name", ASSUMED)
def test_the_assumed_data_is_one_step_of_what_the_loss_needs(planner, name):
    keys = {"max_length": 64, "per_device_train_batch_size": 10}
    made = planner(H100, loss_type=[name], **keys)
    assert len(made.steps(made.config)) == 1
    assert count_units(made.groups) == 10
    assert {group.unit for group in made.groups} == {loss_of(made.config).unit}
    assert made.longest == {"listwise": 160, "sigmoid": 96, "orpo": 96}.get(name, 64)
    text = " ".join(as_text(made, 100).split())
    assert f"no data given: {ASSUMED[name]} are assumed, half of them the prompt's" in text


def test_the_report_says_what_a_step_begins_with(planner):
    kto, dpo = planner(H100, loss_type=["kto"], max_length=64), planner(H100, max_length=64)
    found = as_dict(kto)
    assert 0 < found["scoring_seconds"] < found["step_seconds"]
    assert as_dict(dpo)["scoring_seconds"] == 0
    said = " ".join(as_text(kto, 100).split())
    assert f"{found['scoring_seconds']:.3g} s of it for the pass that scores responses" in said
    assert "the pass that scores responses" not in " ".join(as_text(dpo, 100).split())


def test_data_is_described_in_the_units_of_the_loss(planner):
    for name, words in {
        "sigmoid": "3 comparisons in 3 groups; sequences of",
        "grpo": "6 responses in 3 groups; sequences of",
        "listwise": "3 groups of 6 responses in all; sequences of",
    }.items():
        made = planner(H100, loss_type=[name])
        made.data.train, made.assumed = [a_group(make_loss([name], beta=0.1))] * 3, None
        assert describe_data(made).startswith(words)


@pytest.mark.parametrize("given", [[], ["--loss_type", "bco"]])
def test_the_command_with_labelled_rows(tiny_model, labelled_file, capsys, given):
    """Which are for kto where no loss is given: its pass takes other rows than the step's."""
    words = ["plan", "--model_name_or_path", str(tiny_model), "--dataset_name", str(labelled_file)]
    assert main([*words, "--gpu", "h100-80gb", *given]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "24 responses in 15 groups" in said and "for the pass that scores responses" in said


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_auto_trains_labelled_rows_in_shorter_rows(
    tiny_model, labelled_file, tmp_path, monkeypatch, name
):
    """With the numbers of a run that has all the memory it wants."""
    free = {"roomy": 2 << 30, "tight": 5 << 20}
    losses = {}
    for folder, size in free.items():
        monkeypatch.setattr(
            "fastdpo.memory.auto.at_hand", lambda device, size=size: Device("small", "cpu", size)
        )
        keys = {"memory": "auto", "max_tokens_per_batch": 100000, "optim": "sgd"}
        keys |= {"loss_type": [name], "per_device_train_batch_size": 24, "max_steps": 2}
        _, said = run(tiny_model, labelled_file, tmp_path / folder, **keys)
        losses[folder] = [line["loss"] for line in metrics(tmp_path / folder)]
        lower = any("memory: auto: max_tokens_per_batch" in line for line in said)
        assert lower == (folder == "tight")
    assert losses["tight"] == pytest.approx(losses["roomy"], rel=1e-5)
