"""TRL's trainers beside ours, however rows are laid out: packing, sharing, accumulation, prompts
that several rows share, rows that are cut, rows that repeat, batches that are not full.
"""

from functools import cache

import pytest
from beside_trl import (
    BATCH,
    assert_like,
    left_out,
    quick_collections,
    rows_for,
    with_fastdpo,
    with_trl,
)
from datasets import Dataset
from like_trl import trl_rows
from transformers import AutoTokenizer
from trl import KTOTrainer

from bench.data import gsm8k_comparisons, gsm8k_labels, shared_file
from bench.jsonl import read_rows
from bench.workloads import written_out

needs_gsm8k = pytest.mark.skipif(
    shared_file("gsm8k_groups.jsonl") is None, reason="the GSM8K rows lie beside the repository"
)
KINDS = {
    "mix": (["sigmoid", "sft"], {"loss_weights": [1.0, 0.5]}),
    "ld": (["sigmoid"], {"ld_alpha": 0.3}),
    "weighted": (["sigmoid"], {"use_weighting": True}),
    "aot": (["aot"], {}),
    "kto": (["kto"], {"undesirable_weight": 1.3}),
    "orpo": (["orpo"], {}),
    "simpo": (["simpo"], {"cpo_alpha": 0.7}),
}
LAYOUTS = {
    "packed": {"share_prefix": False},
    "ungrouped": {"group_prompts": False},
    "one unit a row": {"max_tokens": 1},
    "padded": {"attn_implementation": "sdpa"},
    "online": {"precompute_ref_log_probs": False},
    "accumulate 2": {"accumulated": 2},
    "accumulate 3, unshared, one unit a row": {
        "accumulated": 3,
        "share_prefix": False,
        "max_tokens": 1,
    },
}

LAID_OUT = [
    (kind, layout)
    for kind in KINDS
    for layout in LAYOUTS
    if layout != "online" or kind not in ("orpo", "simpo")  # which have no reference
]


@pytest.fixture(scope="module", autouse=True)
def without_garbage():
    with quick_collections():
        yield


@pytest.fixture(scope="module")
def pairs(pairs_file):
    return read_rows(pairs_file)


@pytest.fixture(scope="module")
def of_trl(pairs, still_model):
    """What TRL logs of a kind of loss, with so many batches a step."""

    @cache
    def run(kind, accumulated):
        losses, options = KINDS[kind]
        rows = rows_for(losses, pairs, still_model)
        return with_trl(losses, rows, still_model, accumulated=accumulated, **options)

    return run


@pytest.mark.parametrize(("kind", "layout"), LAID_OUT)
def test_every_layout_agrees_with_trl(pairs, still_model, of_trl, kind, layout):
    losses, options = KINDS[kind]
    accumulated = LAYOUTS[layout].get("accumulated", 1)
    rows = rows_for(losses, pairs, still_model)
    ours = with_fastdpo(losses, rows, still_model, **options, **LAYOUTS[layout])
    assert_like(ours, of_trl(kind, accumulated), left_out(losses, accumulated))


@pytest.fixture(scope="module")
def scattered():
    """Labelled rows of four GSM8K prompts: those of two next to each other, those of the other two
    in turns with them.
    """
    groups = {}
    for row in gsm8k_labels():
        groups.setdefault(row["prompt"], []).append(row)
    short = sorted(groups.values(), key=lambda group: sum(len(r["completion"]) for r in group))
    a, b, c, d = (group[:4] for group in short[:4])
    return [*a[:3], *c[:2], b[0], d[0], b[1], d[1], a[3], b[2], d[2], b[3], *c[2:], d[3]]


@needs_gsm8k
@pytest.mark.parametrize("layout", [{}, {"share_prefix": False}, {"max_tokens": 1}], ids=str)
@pytest.mark.parametrize("max_length", [None, 110])
def test_labelled_rows_of_scattered_prompts(scattered, still_model, max_length, layout):
    """With a `max_length` that cuts completions, a mismatched one is cut with its new prompt, and
    rows whose prompt alone fills it stand in no batch.
    """
    tokenizer = AutoTokenizer.from_pretrained(still_model)
    kept = trl_rows(Dataset.from_list(scattered), tokenizer, max_length, KTOTrainer)
    assert len(kept) == (16 if max_length is None else 12)
    rooms = {(max_length or 512) - len(row["prompt_ids"]) for row in kept}
    longest = max(len(row["completion_ids"]) for row in kept)
    assert len(rooms) > 1 and (min(rooms) < longest) == (max_length is not None)
    keys = {"steps": 3, "per_step": 5, "max_length": max_length}
    theirs = with_trl(["kto"], scattered, still_model, **keys)
    ours = with_fastdpo(["kto"], scattered, still_model, **keys, **layout)
    assert_like(ours, theirs, left_out(["kto"]))
    assert any(row["kl"] > 0 for row in ours)


@needs_gsm8k
@pytest.mark.parametrize("layout", [{}, {"share_prefix": False}, {"max_tokens": 1}], ids=str)
@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_pairs_of_scattered_prompts(still_model, loss, layout):
    rows = sorted(gsm8k_comparisons(), key=lambda row: len(str(row)))[:40]
    prompts = [row["prompt"] for row in rows]
    rows = [row for row in rows if prompts.count(row["prompt"]) > 1][:8] + rows[:4]
    rows = written_out(rows, AutoTokenizer.from_pretrained(still_model))
    keys = {"steps": 1, "per_step": len(rows)}
    theirs = with_trl([loss], rows, still_model, **keys, max_length=None)
    ours = with_fastdpo([loss], rows, still_model, **keys, **layout)
    assert_like(ours, theirs, left_out([loss]), steps=1)


def labelled_row(row, name, label):
    return {"prompt": row["prompt"], "completion": row[name], "label": label}


@pytest.mark.parametrize("group_prompts", [True, False])
def test_a_completion_with_both_labels_and_one_twice(pairs, still_model, group_prompts):
    rows = rows_for(["kto"], pairs, still_model)
    twice = labelled_row(pairs[0], "chosen", False)
    rows = [rows[0], twice, rows[0], *rows[1:6], twice, *rows[6:15]]
    theirs = with_trl(["kto"], rows, still_model)
    ours = with_fastdpo(["kto"], rows, still_model, group_prompts=group_prompts)
    assert_like(ours, theirs, left_out(["kto"]))


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "orpo"])
def test_a_pair_that_stands_twice_in_a_batch(pairs, still_model, loss):
    rows = [pairs[0], pairs[0], *pairs[:4], pairs[1], *pairs[4:15]]
    rows = rows_for([loss], rows, still_model)
    theirs = with_trl([loss], rows, still_model, per_step=len(rows), steps=1)
    ours = with_fastdpo([loss], rows, still_model, per_step=len(rows), steps=1)
    assert_like(ours, theirs, left_out([loss]), steps=1)


def test_a_batch_of_desirable_responses_alone(pairs, still_model):
    rows = [labelled_row(row, "chosen", True) for row in pairs]
    theirs = with_trl(["kto"], rows, still_model)
    ours = with_fastdpo(["kto"], rows, still_model)
    assert_like(ours, theirs, left_out(["kto"]))
    assert "rewards/rejected" not in ours[0] and "rewards/margins" not in ours[0]


@pytest.mark.parametrize("loss", ["aot", "sft", "orpo", "apo_zero_unpaired"])
def test_batches_of_one(pairs, still_model, loss):
    rows = rows_for([loss], pairs, still_model)
    theirs = with_trl([loss], rows, still_model, per_step=1)
    ours = with_fastdpo([loss], rows, still_model, per_step=1)
    assert_like(ours, theirs, left_out([loss]))


@pytest.mark.parametrize("left", [3, 1])
@pytest.mark.parametrize("loss", ["kto", "aot", "sft", "orpo"])
def test_a_last_batch_that_is_smaller(pairs, still_model, loss, left):
    """Of a single row, KTO's mismatched completion is its own, in TRL as here."""
    rows = rows_for([loss], pairs, still_model)[: 2 * BATCH + left]
    theirs = with_trl([loss], rows, still_model)
    ours = with_fastdpo([loss], rows, still_model)
    assert_like(ours, theirs, left_out([loss]))


@pytest.mark.parametrize("loss", ["orpo", "sft", "simpo"])
def test_a_smaller_batch_that_is_accumulated_counts_by_its_rows(pairs, still_model, loss):
    """A step is the mean over its rows: where its last batch has three rows and the first one six,
    TRL averages the means of the two, so that those three count twice.
    """
    rows = rows_for([loss], pairs, still_model)[: BATCH + 3]
    options = {"learning_rate": 0.0}
    separate = with_trl([loss], rows, still_model, steps=2, **options)
    keys = {"steps": 1, "per_step": 2 * BATCH, "accumulated": 2}
    (theirs,) = with_trl([loss], rows, still_model, **keys, **options)
    (ours,) = with_fastdpo([loss], rows, still_model, **keys, **options)
    six, three = (row["loss"] for row in separate)
    assert theirs["loss"] == pytest.approx((six + three) / 2, abs=1e-5)
    assert ours["loss"] == pytest.approx((6 * six + 3 * three) / 9, abs=1e-5)
