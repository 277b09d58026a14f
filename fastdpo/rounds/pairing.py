"""Scored answers made into rows for training, as the loss needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.rounds import RoundsConfig
from ..data.messages import Text
from ..errors import DataError
from ..losses import loss_of
from .prompts import as_completion


@dataclass(frozen=True)
class Scored:
    """A prompt with its answers.

    Attributes:
        scores: of each answer, None where the judge failed.
        complete: whether the model ended each answer itself.
        own: the row's own answer, for SPIN.
    """

    prompt: Text
    answers: Sequence[str]
    scores: Sequence[float | None]
    complete: Sequence[bool]
    own: Any = None


@dataclass
class Made:
    """Rows for training, and what became of the prompts that made none, by reason."""

    rows: list[dict[str, Any]]
    left_out: dict[str, int]


def make_rows(config: RoundsConfig, scored: Sequence[Scored]) -> Made:
    """Of each prompt: all scored answers with their scores, where the loss reads scores; else the
    best answer against the worst; with the judge "row", the row's own against each sampled one
    (SPIN, arXiv:2401.01335, eq. 4.7).

    Raises:
        DataError: none of the prompts makes a row.
    """
    reads_scores = any(
        column in ("advantage", "win_rate", "rank")
        for loss in loss_of(config).losses
        for column in loss.columns
    )
    rows: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for one in scored:
        made = (
            _of_own(one, config) if config.judge == "row" else _of_scores(one, config, reads_scores)
        )
        if isinstance(made, str):
            left_out[made] = left_out.get(made, 0) + 1
        else:
            rows += made
    if not rows:
        said = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DataError(f"rounds: no prompt makes a row to train on: {said}")
    return Made(rows, left_out)


def _of_own(one: Scored, config: RoundsConfig) -> list[dict[str, Any]] | str:
    kept = [text for text, whole in _answers(one, config) if text != _plain(one.own)]
    if not kept:
        return "whose answers are all cut off, or the row's own"
    return [
        {"prompt": one.prompt, "chosen": _own(one), "rejected": as_completion(one.prompt, text)}
        for text in dict.fromkeys(kept)
    ]


def _own(one: Scored) -> Any:
    return one.own if not isinstance(one.own, str) else as_completion(one.prompt, one.own)


def _plain(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer[-1].get("content"))


def _of_scores(one: Scored, config: RoundsConfig, groups: bool) -> list[dict[str, Any]] | str:
    trained = {text for text, _ in _answers(one, config)}
    pairs = [
        (text, score)
        for text, score in zip(one.answers, one.scores, strict=True)
        if score is not None and text in trained
    ]
    if len(pairs) < 2:
        return "with fewer than two answers that are whole and scored"
    scores = [score for _, score in pairs]
    if groups:  # equal ones too: they count in the means of a loss, and their prompt in its KL
        texts = [as_completion(one.prompt, text) for text, _ in pairs]
        return [{"prompt": one.prompt, "responses": texts, "scores": scores}]
    if max(scores) == min(scores):
        return "whose answers all have the same score"
    best = max(pairs, key=lambda pair: pair[1])[0]
    worst = min(pairs, key=lambda pair: pair[1])[0]
    return [
        {
            "prompt": one.prompt,
            "chosen": as_completion(one.prompt, best),
            "rejected": as_completion(one.prompt, worst),
        }
    ]


def _answers(one: Scored, config: RoundsConfig) -> list[tuple[str, bool]]:
    """The answers that may be trained on."""
    return [
        (text, whole)
        for text, whole in zip(one.answers, one.complete, strict=True)
        if text.strip() and (whole or not config.mask_truncated_completions)
    ]


def describe(left_out: Mapping[str, int]) -> str:
    """What was left out, for the line of a round."""
    return "".join(f"; {count} prompts {reason}" for reason, count in left_out.items())
