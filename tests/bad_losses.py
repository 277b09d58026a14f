"""Losses and data that do not fit, and what a run says of them."""

import math
from pathlib import Path
from typing import Any

import pytest
from bad_files import GROUP, LABEL, PAIR, lines, row
from bad_inputs import Case, flags

RANKING = {"prompt": "question", "responses": [" a", " b", " c"], "rankings": [1, 2, 3]}
COMPARISONS = {"prompt": "question", "responses": [" a", " b", " c"], "comparisons": [[0, 1]]}
LOGPS = GROUP | {"logps": [-1.0, -2.0, -3.0]}

PAIRS_FOUND = "found prompt, chosen, rejected"
LABELS_FOUND = "found prompt, completion, label"
OF_LABELS = "prompt, completion, label"
OF_SCORES = "prompt, responses, scores"
OF_PAIRS = "prompt, chosen, rejected, or of prompt, responses and comparisons, scores or rankings"
OF_RANKS = "prompt, responses and rankings or scores"


def loss(name: str, what: str, expected: str, *rows: dict[str, Any], more: str = "") -> Case:
    """A loss over these rows, with `more` flags; `expected` follows the file's name."""
    return _case(name, what, f"rows.jsonl{expected}", rows, more)


def keys(name: str, what: str, expected: str, *rows: dict[str, Any], more: str = "") -> Case:
    """The same where the error is about a key, not about the file."""
    return _case(name, what, expected, rows, more)


def _case(name: str, what: str, expected: str, rows: tuple[dict[str, Any], ...], more: str) -> Case:
    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        (path / "rows.jsonl").write_bytes(lines(*rows))

    words = f"--dataset_name rows.jsonl --loss_type {name} {more}"
    return Case(f"{name}: {what}", expected, ("train", "config.yaml", *words.split()), prepare)


def unfit(name: str, what: str, needed: str, found: str, *rows: dict[str, Any]) -> Case:
    """Rows of a layout that the loss cannot be trained on."""
    return loss(name, what, f": {name} needs rows of {needed}; {found}", *rows)


def evaluated(name: str, train: dict[str, Any], other: dict[str, Any], expected: str) -> Case:
    """Rows to evaluate on in another layout than the loss needs."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        (path / "rows.jsonl").write_bytes(lines(train, train))
        (path / "other.jsonl").write_bytes(lines(other))

    words = f"--dataset_name rows.jsonl --loss_type {name} --do_eval --eval_dataset_name"
    arguments = ("train", "config.yaml", *words.split(), "other.jsonl")
    return Case(f"{name}: evaluated on others", f"other.jsonl: {expected}", arguments, prepare)


LAYOUTS = [
    *(
        unfit(name, "on pairs", OF_LABELS, f"{PAIRS_FOUND}; convert: unpair makes them", PAIR)
        for name in ("kto", "bco", "apo_zero_unpaired")
    ),
    unfit("kto", "on scores", OF_LABELS, "found prompt, responses, scores", GROUP),
    unfit("bco", "on rankings", OF_LABELS, "found prompt, responses, rankings", RANKING),
    *(
        unfit(name, "on labels", OF_PAIRS, f"{LABELS_FOUND}; convert: pair makes them", LABEL)
        for name in ("sigmoid", "aot", "sft", "spin", "orpo", "simpo", "cpo")
    ),
    *(
        unfit(name, "on pairs", OF_SCORES, PAIRS_FOUND, PAIR)
        for name in ("grpo", "bnpo", "dr_grpo", "dapo")
    ),
    unfit("grpo", "on labels", OF_SCORES, LABELS_FOUND, LABEL),
    unfit("grpo", "on rankings", OF_SCORES, "found prompt, responses, rankings", RANKING),
    unfit("grpo", "on comparisons", OF_SCORES, "found prompt, responses, comparisons", COMPARISONS),
    unfit("listwise", "on pairs", OF_RANKS, PAIRS_FOUND, PAIR),
    unfit("listwise", "on labels", OF_RANKS, LABELS_FOUND, LABEL),
    unfit(
        "listwise", "on comparisons", OF_RANKS, "found prompt, responses, comparisons", COMPARISONS
    ),
    unfit(
        "sppo",
        "on labels",
        "prompt, responses and scores or comparisons",
        f"{LABELS_FOUND}; convert: pair makes them",
        LABEL,
    ),
    evaluated("kto", LABEL, PAIR, f"kto needs rows of {OF_LABELS}; {PAIRS_FOUND}"),
    evaluated("sigmoid", PAIR, LABEL, f"sigmoid needs rows of {OF_PAIRS}; {LABELS_FOUND}"),
    evaluated("orpo", PAIR, LABEL, f"orpo needs rows of {OF_PAIRS}; {LABELS_FOUND}"),
    evaluated("grpo", GROUP, PAIR, f"grpo needs rows of {OF_SCORES}; {PAIRS_FOUND}"),
    evaluated("listwise", RANKING, COMPARISONS, f"listwise needs rows of {OF_RANKS}; found"),
]

LABELS = [
    row(f"label {value!r}", f"label: expected true or false, found {found}", LABEL, label=value)
    for value, found in (
        ("yes", "text"),
        (None, "null"),
        (2, "the number 2"),
        (-1, "the number -1"),
        (0.5, "the number 0.5"),
        ([True], "a list"),
    )
]

NOTHING = ": 0 of 1 rows kept; 1 dropped, {}; expected at least one"
FINITE = "expected a finite number, found the number"
GROUPS = [
    case
    for name in ("grpo", "listwise", "sppo")
    for case in (
        loss(
            name,
            "one response",
            NOTHING.format("one response only"),
            {"prompt": "question", "responses": [" a"], "scores": [1]},
        ),
        loss(
            name,
            "equal scores",
            NOTHING.format("all ranks equal")
            if name == "listwise"
            else ": 1 of 1 rows kept; 1 whose scores are all equal; expected some",
            GROUP | {"scores": [1, 1, 1]},
        ),
        loss(name, "inf", f", line 1: scores[1]: {FINITE}", GROUP | {"scores": [1, math.inf, 2]}),
        loss(name, "nan", f", line 1: scores[0]: {FINITE}", GROUP | {"scores": [math.nan, 1, 2]}),
        loss(
            name,
            "no scores",
            ", line 2: scores: expected a list of 3",
            GROUP,
            {**GROUP, "scores": None},
        ),
        loss(
            name, "few scores", ", line 1: scores: expected a list of 3", GROUP | {"scores": [1, 2]}
        ),
    )
]

SEQUENCE = "--importance_sampling_level sequence"
LOGPROBS = [
    keys(
        "grpo",
        "logps of responses for ratios of tokens",
        "importance_sampling_level: expected sequence, since the rows have logps",
        LOGPS,
    ),
    keys(
        "dapo",
        "the same, set",
        "--importance_sampling_level: expected sequence, since the rows have logps",
        LOGPS,
        more="--importance_sampling_level token",
    ),
    loss(
        "grpo",
        "logps in some rows",
        ": 1 of 2 rows have logps; expected them in every row, or in none",
        LOGPS,
        GROUP,
        more=SEQUENCE,
    ),
    loss(
        "grpo",
        "logps above 0",
        ", line 1: logps[1]: expected a finite log-probability, at most 0",
        LOGPS | {"logps": [-1.0, 2.0, -3.0]},
        more=SEQUENCE,
    ),
]

KEYS = [
    flags("--loss_type sigmoid dpo", "--loss_type: unknown 'dpo' (is it sigmoid?); known: aot, "),
    flags("--loss_type sigmoid kto", "--loss_type: expected kto alone: it is a loss of single"),
    flags("--loss_type grpo dapo", "--loss_type: expected grpo alone: it is a loss of single"),
    flags("--loss_type listwise orpo", "--loss_type: expected listwise alone: it is a loss of ra"),
    flags(
        "--loss_type kto --per_device_train_batch_size 1",
        "--per_device_train_batch_size: expected at least 2 with kto",
    ),
    flags(
        "--sync_ref_model --precompute_ref_log_probs",
        "--precompute_ref_log_probs: cannot go with sync_ref_model",
    ),
    flags("--sync_ref_model --use_peft", "--sync_ref_model: is for training all weights"),
    flags("--sync_ref_model --loss_type simpo", "--sync_ref_model: simpo takes no reference"),
    *(
        flags(
            f"--loss_type {name} --ref_model_name_or_path model",
            f"--ref_model_name_or_path: {name} takes no reference: remove the key",
        )
        for name in ("orpo", "simpo", "cpo", "sft")
    ),
    Case(
        "precompute: orpo",
        "--loss_type: orpo without a reference: nothing to precompute",
        ("precompute", "config.yaml", "--loss_type", "orpo"),
    ),
    Case(
        "precompute: a reference that moves",
        "--sync_ref_model: the reference moves: nothing to precompute",
        ("precompute", "config.yaml", "--sync_ref_model"),
    ),
]

CASES = [*LAYOUTS, *LABELS, *GROUPS, *LOGPROBS, *KEYS]
