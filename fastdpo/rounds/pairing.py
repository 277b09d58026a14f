"""Scored answers made into rows for training, as the loss needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.rounds import RoundsConfig
from ..data.messages import Text
from ..errors import DataError
from ..losses import loss_of
from .prompts import as_columns, as_completion


@dataclass(frozen=True)
class Scored:
    """A prompt with its answers.

    Attributes:
        scores: of each answer, None where the judge failed.
        complete: whether the model ended each answer itself.
        own: the row's own answer, for SPIN.
        template: what the chat template is given beside the prompt.
    """

    prompt: Text
    answers: Sequence[str]
    scores: Sequence[float | None]
    complete: Sequence[bool]
    own: Any = None
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Made:
    """Rows for training, and what became of the prompts that made none, by reason."""

    rows: list[dict[str, Any]]
    left_out: dict[str, int]


def check_loss(config: RoundsConfig) -> None:
    """Raise ConfigError where the loss reads what the judge does not give."""
    if config.judge == "row" and _reads(config) == "scores":
        raise config.error(
            "loss_type",
            f"{' and '.join(config.loss_type)} reads scores of answers; expected a loss of pairs, "
            "such as spin or sigmoid, for judge: row",
        )


def make_rows(
    config: RoundsConfig,
    scored: Sequence[Scored],
    failures: Mapping[str, int] | None = None,
) -> Made:
    """Of each prompt: all scored answers with their scores, where the loss reads scores; else the
    best answer against the worst, or with the judge "row" the row's own against each sampled one
    (SPIN, arXiv:2401.01335, eq. 4.7); as two rows with labels, where the loss reads labels.

    Args:
        failures: answers without a score, by reason, for the error.

    Raises:
        DataError: the judge scored none of the answers.
    """
    reads = _reads(config)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for one in scored:
        made = (
            _of_own(one, config)
            if config.judge == "row"
            else _of_scores(one, config, reads == "scores")
        )
        if isinstance(made, str):
            left_out[made] = left_out.get(made, 0) + 1
            continue
        for row in _labelled(made) if reads == "label" else made:
            rows.append({"prompt": one.prompt, **row, **as_columns(one.template)})
    differ = reads != "scores" or any(len(set(row["scores"])) > 1 for row in rows)
    if rows and not differ:
        left_out["whose answers all have the same score"] = len(rows)
        rows = []
    judged = config.judge == "row" or any(
        score is not None for one in scored for score in one.scores
    )
    if not judged:
        said = ", ".join(f"{count} answers: {reason}" for reason, count in (failures or {}).items())
        raise DataError(f"judge: no answer of the round has a score: {said}")
    return Made(rows, left_out)


def ratio_keys(config: RoundsConfig) -> dict[str, Any]:
    """The keys of a round's training for a loss with a ratio of policies: in a single step it is
    1, whatever the reference.
    """
    single = _ratio(config) == "token" and config.max_steps == 1
    return {"importance_sampling_level": "none"} if single else {}


def reads_logps(config: RoundsConfig) -> bool:
    """Whether the loss reads log-probabilities of whole answers by the policy that gave them."""
    return _ratio(config) == "sequence"


def _ratio(config: RoundsConfig) -> str | None:
    """What the loss takes a ratio of policies of; None of a loss without one."""
    has_ratio = any(loss.kind == "tokens" for loss in loss_of(config).losses)
    return config.importance_sampling_level if has_ratio else None


def _reads(config: RoundsConfig) -> str:
    """What the loss reads: scores, labels or pairs."""
    columns = {name for loss in loss_of(config).losses for name in loss.columns}
    if not columns.isdisjoint(("advantage", "win_rate", "rank")):
        return "scores"
    return "label" if "label" in columns and config.convert is None else "pair"


def _labelled(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each answer once, with what it is."""
    made: list[dict[str, Any]] = []
    for pair in pairs:
        for side, label in (("chosen", True), ("rejected", False)):
            row = {"completion": pair[side], "label": label}
            made += [] if row in made else [row]
    return made


def _of_own(one: Scored, config: RoundsConfig) -> list[dict[str, Any]] | str:
    kept = [text for text, whole in _answers(one, config) if text != _plain(one.own)]
    if not kept:
        return "whose answers are all cut off, or the row's own"
    return [{"chosen": one.own, "rejected": as_completion(one.prompt, text)} for text in kept]


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
        return [{"responses": texts, "scores": scores}]
    if max(scores) == min(scores):
        return "whose answers all have the same score"
    best = max(pairs, key=lambda pair: pair[1])[0]
    worst = min(pairs, key=lambda pair: pair[1])[0]
    if best == worst:  # scored once so and once so
        return "whose best and worst answers are the same text"
    return [
        {"chosen": as_completion(one.prompt, best), "rejected": as_completion(one.prompt, worst)}
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
