"""Evaluation of every kind of loss: TRL's `evaluate` beside ours, accuracy where it has a meaning,
and nothing but rounding depends on how rows are packed.
"""

import pytest
from beside_trl import (
    left_out,
    quick_collections,
    rows_for,
    trainer_of,
)
from training import settings
from transformers import AutoTokenizer

from bench.jsonl import read_rows
from bench.trainers.with_trl import LABELLED, REFERENCE_FREE, make_trainer, trl_keys
from bench.workloads import written_out
from fastdpo import TrainConfig, train

KINDS = {
    "sigmoid": {},
    "aot": {},
    "sft": {},
    "kto": {"undesirable_weight": 1.3},
    "orpo": {},
    "simpo": {"cpo_alpha": 0.7},
}
LAYOUTS = [
    {"share_prefix": False, "max_tokens_per_batch": 1},
    {"group_prompts": False, "precompute_ref_log_probs": False},
    {"attn_implementation": "sdpa", "max_tokens_per_batch": 200},
]
COMMON = {"learning_rate": 1e-4, "max_steps": 2, "gradient_checkpointing": False, "bf16": False}
_RATES = {"tokens_per_second", "pairs_per_second", "num_tokens", "epoch", "peak_memory_mib"}


@pytest.fixture(scope="module", autouse=True)
def without_garbage():
    with quick_collections():
        yield


@pytest.fixture(scope="module")
def pairs(pairs_file, still_model):
    """Rows that share a prompt token for token, one after the other."""
    return written_out(read_rows(pairs_file), AutoTokenizer.from_pretrained(still_model))


@pytest.fixture
def evaluated(still_model, tmp_path):
    """The metrics of an evaluation after two steps of a loss, by our trainer."""

    def run(loss, train_rows, eval_rows, **keys):
        keys["overwrite_output_dir"] = True
        made = settings(still_model, tmp_path / "none", tmp_path / "out", **COMMON, **keys)
        del made["dataset_name"]
        made |= {"loss_type": [loss], "shuffle": False, "eval_strategy": "steps", "eval_steps": 2}
        metrics = train(TrainConfig.from_dict(made), train_rows, eval_rows).metrics
        return {name: value for name, value in metrics.items() if name.startswith("eval_")}

    return run


def by_trl(loss, train_rows, eval_rows, model, per_step, eval_batch, **keys):
    if trainer_of([loss]) not in REFERENCE_FREE:
        keys["precompute_ref_log_probs"] = True
    trainer = make_trainer(
        model,
        train_rows,
        eval_rows,
        per_device_train_batch_size=per_step,
        per_device_eval_batch_size=eval_batch,
        **COMMON,
        **trl_keys(loss),
        **keys,
    )
    trainer.train()
    return trainer.evaluate()


@pytest.mark.parametrize("batch", [4, 5])
@pytest.mark.parametrize("loss", KINDS)
def test_evaluation_agrees_with_trl(pairs, still_model, evaluated, loss, batch):
    """Batches of the evaluation are its own; of a last one that is smaller, TRL's metrics count the
    rows more than those of the others, and its loss does not.
    """
    rows = rows_for([loss], pairs, still_model)
    trained, held_out = rows[:12], rows[-12:]
    theirs = by_trl(loss, trained, held_out, still_model, 6, batch, **KINDS[loss])
    keys = {"per_device_eval_batch_size": batch, **KINDS[loss]}
    ours = evaluated(loss, trained, held_out, **keys)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
    skipped = {f"eval_{name}" for name in left_out([loss])}
    skipped |= {name for name in theirs if "per_second" in name or "time" in name}
    names = theirs.keys() - skipped - {"epoch", "eval_num_tokens"}
    assert names <= ours.keys() and len(names) >= 7
    for name in names if batch == 4 else ():
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-3), name


@pytest.mark.parametrize("loss", ["sft", "aot", "simpo"])
def test_batches_of_an_evaluation_are_those_of_the_file(pairs, still_model, evaluated, loss):
    """Though rows of one prompt stand apart in it, and form a group."""
    rows = [pairs[12 + 5 * i % 12] for i in range(12)]
    rows = rows_for([loss], rows, still_model)
    theirs = by_trl(loss, rows, rows, still_model, 12, 4)
    ours = evaluated(loss, rows, rows, per_device_eval_batch_size=4, per_device_train_batch_size=12)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("loss", KINDS)
def test_no_way_of_packing_changes_an_evaluation(pairs, still_model, evaluated, loss):
    """Where labelled rows of one prompt form no group there are no pairs of them, so there is no
    accuracy.
    """
    rows = rows_for([loss], pairs, still_model)
    keys = {"per_device_eval_batch_size": 5, **KINDS[loss]}
    expected = evaluated(loss, rows[:12], rows[-13:], **keys)
    if loss in LABELLED:
        assert "eval_rewards/accuracies" in expected
    for layout in LAYOUTS:
        some = dict(layout)
        if loss in ("sft", "orpo", "simpo"):
            some.pop("precompute_ref_log_probs", None)
        found = evaluated(loss, rows[:12], rows[-13:], **keys, **some)
        grouped = layout.get("group_prompts", True) or loss not in LABELLED
        known = expected.keys() - (set() if grouped else {"eval_rewards/accuracies"})
        assert found.keys() == known
        for name in known:
            value = expected[name]
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-4), (layout, name)


def test_accuracy_of_labels_is_that_of_pairs_of_one_prompt(pairs, evaluated):
    """Of a desirable and an undesirable response; other prompts say nothing, equal rewards one
    half.
    """
    prompt = pairs[0]["prompt"]
    texts = [pairs[0]["chosen"], pairs[0]["rejected"], pairs[1]["rejected"]]
    labels = [True, False, False]
    rows = [
        {"prompt": prompt, "completion": text, "label": label}
        for text, label in zip(texts, labels, strict=True)
    ]
    known = []
    for other in rows[1:]:
        found = evaluated("kto", rows, [rows[0], other])
        known.append(found["eval_rewards/margins"])
    expected = sum(margin > 0 for margin in known) / 2
    alone = {"prompt": pairs[5]["prompt"], "completion": "alone", "label": True}
    found = evaluated("kto", rows, [*rows, alone])
    assert found["eval_rewards/accuracies"] == expected
    assert "eval_rewards/accuracies" not in evaluated("kto", rows, [alone, alone])


SCORED = {"grpo": "scores", "sppo": "scores", "listwise": "rankings"}


@pytest.mark.parametrize("loss", SCORED)
def test_accuracy_of_scores_is_that_of_pairs_in_order(pairs, evaluated, loss):
    """Turned round, every pair that was in the right order is in the wrong one; ties say nothing,
    however the groups are packed.
    """
    column = SCORED[loss]
    trained = [
        {"prompt": p["prompt"], "responses": [p["chosen"], p["rejected"]], column: [1, 2]}
        for p in pairs[:6]
    ]

    def with_values(values):
        return [
            {
                "prompt": pairs[i]["prompt"],
                "responses": [pairs[i]["chosen"], pairs[i]["rejected"], pairs[i + 1]["chosen"]],
                column: values,
            }
            for i in (0, 3, 6)
        ]

    up, down = with_values([1, 2, 2]), with_values([2, 1, 1])
    found = evaluated(loss, trained, up)
    right = found["eval_rewards/accuracies"]
    assert 0 <= right <= 1
    turned = evaluated(loss, trained, down)
    assert turned["eval_rewards/accuracies"] == pytest.approx(1 - right)
    packed = evaluated(loss, trained, up, share_prefix=False, max_tokens_per_batch=1)
    assert packed == pytest.approx(found, rel=1e-5, abs=1e-4)
