"""TRL's trainer of a loss and ours, run on the same rows, step by step."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.trainers.clock import Metrics
from bench.trainers.providers import run_fastdpo, run_trl
from bench.trainers.with_trl import LABELLED, REFERENCE_FREE, trl_keys
from bench.workloads import written_out

Row = dict[str, Any]

STEPS = 3
BATCH = 6
LORA = {
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}
PADDED_LOGITS = {"logits/chosen", "logits/rejected"}
"""What TRL's ORPO and CPO trainers report under these names is a mean over prompts and padding."""

OF_TOKENS = {"entropy", "mean_token_accuracy", *PADDED_LOGITS}
"""Means over tokens: of each batch in TRL, which are averaged then, and of the step in ours."""

OF_LABELS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"}
OF_LABELS |= {"logps/rejected"}
"""Means over the responses with a label, in the same way: for a loss of labels alone."""

_APART = {"logps": 1e-3, "num_tokens": 0, "mean_token_accuracy": 1e-6, "learning_rate": 1e-12}


@contextmanager
def quick_collections() -> Iterator[None]:
    """Nothing that is here already is searched for garbage, which TRL's trainers do at every
    start.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def labelled(rows: Sequence[Row]) -> list[Row]:
    """Both responses of each pair with their labels."""
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]


def trainer_of(losses: Sequence[str]) -> str:
    """The trainer of TRL that has these losses."""
    return trl_keys(losses[0])["trainer"]


def rows_for(losses: Sequence[str], pairs: Sequence[Row], model: Path) -> list[Row]:
    """Pairs as the trainer of these losses takes them."""
    if losses[0] in LABELLED:
        return labelled(pairs)
    if trainer_of(losses) in REFERENCE_FREE:
        return written_out(pairs, AutoTokenizer.from_pretrained(model))
    return list(pairs)


def with_trl(
    losses: Sequence[str],
    rows: Sequence[Row],
    model: Path,
    steps: int = STEPS,
    per_step: int = BATCH,
    accumulated: int = 1,
    **keys: Any,
) -> list[Metrics]:
    """What TRL logs of each step."""
    names = trl_keys(losses[0]) | ({} if len(losses) == 1 else {"loss_type": list(losses)})
    keys = {"learning_rate": 1e-4, **names, **keys}
    return run_trl(rows, model, steps, per_step, per_step // accumulated, **keys).metrics


def with_fastdpo(
    losses: Sequence[str],
    rows: Sequence[Row],
    model: Path,
    steps: int = STEPS,
    per_step: int = BATCH,
    accumulated: int = 1,
    max_tokens: int = 0,
    **keys: Any,
) -> list[Metrics]:
    """What ours logs of each step, in rows of `max_tokens` (0: the default)."""
    keys = {"learning_rate": 1e-4, "gradient_accumulation_steps": accumulated, **keys}
    batch = per_step // accumulated
    return run_fastdpo(
        rows, model, steps, batch, max_tokens, loss_type=list(losses), **keys
    ).metrics


def left_out(losses: Sequence[str], accumulated: int = 1) -> set[str]:
    """Metrics of TRL that mean something else there than here."""
    names = {"epoch"}
    if losses[0] == "apo_zero_unpaired":  # which estimates none: a 0 in TRL's log, nothing in ours
        names |= {"kl"}
    if trainer_of(losses) in REFERENCE_FREE:
        names |= PADDED_LOGITS
    if list(losses) == ["sft"]:  # for which TRL runs a reference, to report rewards alone
        names |= {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    if accumulated > 1:
        names |= OF_TOKENS
    if accumulated > 1 and losses[0] in LABELLED:
        names |= OF_LABELS
    return names


def assert_like(
    ours: Sequence[Metrics], theirs: Sequence[Metrics], without: set[str], steps: int = STEPS
) -> None:
    """The same loss, norm of gradients and metrics in every step, which `without` leaves out."""
    assert len(ours) == len(theirs) == steps
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        names = {name for name, value in b.items() if isinstance(value, float | int)} - without
        assert {"loss", "grad_norm"} < names <= a.keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5), number
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), number
        is_start = abs(b.get("rewards/margins", 1.0)) < 1e-5
        for name in names - {"loss", "grad_norm"}:
            if name == "rewards/accuracies" and is_start:  # a tie, one half in ours, 0 in TRL
                continue
            apart = _APART.get(name, _APART.get(name.split("/")[0], 1e-4))
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=apart), (number, name)


def options_text(options: Mapping[str, Any]) -> str:
    """Options in the name of a test."""
    return "+".join(f"{name}={value}" for name, value in options.items())
