"""What is watched of a model through the rounds, on answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Watched:
    """Means over held-out answers.

    Attributes:
        score: the judge's; None where it scored none.
        win_rate: the share of prompts whose answer scores above the start's, a tie counts ½.
        tokens: of an answer.
        complete: the share that the model ended itself.
        repetition: the share of an answer's 4-grams of words that stand in it before.
        kl: log π(y|x) − log π_start(y|x) of the model's own answers over their tokens, nats a
            token: an estimate of the divergence from the start where the temperature is 1.
        engine_difference: |log π(y|x) of the engine − ours| over the tokens of an answer, the
            mean, nats a token; None where the engine gives none.
        unscored: held-out answers without a score.
        judge_accuracy: the share of held-out pairs whose chosen answer the judge scores above the
            rejected one, a tie counts ½; None where it scored no pair.
    """

    score: float | None
    win_rate: float | None
    tokens: float
    complete: float
    repetition: float
    kl: float
    engine_difference: float | None
    unscored: int
    judge_accuracy: float | None

    def as_dict(self) -> dict[str, Any]:
        """As plain types."""
        return asdict(self)


def watched(
    answers: Sequence[str],
    complete: Sequence[bool],
    scores: Sequence[float | None],
    start_scores: Sequence[float | None],
    tokens: Sequence[int],
    logps: Sequence[float],
    start_logps: Sequence[float],
    engine_logps: Sequence[float | None],
    pairs: Sequence[tuple[float | None, float | None]] = (),
) -> Watched:
    """Measure a model's answers, one to each held-out prompt, beside those of the start.

    Args:
        tokens: drawn of each answer.
        logps: log π(y|x) of each answer.
        start_logps: log π_start(y|x).
        engine_logps: log π(y|x) by the engine that drew it.
        pairs: scores of the chosen and the rejected answer of held-out pairs.
    """
    known = [score for score in scores if score is not None]
    differences = [
        abs(theirs - ours) / count
        for theirs, ours, count in zip(engine_logps, logps, tokens, strict=True)
        if theirs is not None
    ]
    return Watched(
        score=float(np.mean(known)) if known else None,
        win_rate=_share_above(zip(scores, start_scores, strict=True)),
        tokens=float(np.mean(tokens)),
        complete=float(np.mean(complete)),
        repetition=float(np.mean([repetition(text) for text in answers])),
        kl=float(np.sum(np.subtract(logps, start_logps)) / np.sum(tokens)),
        engine_difference=float(np.mean(differences)) if differences else None,
        unscored=len(scores) - len(known),
        judge_accuracy=_share_above(pairs),
    )


def _share_above(scores: Iterable[tuple[float | None, float | None]]) -> float | None:
    """How often the first is above the second, a tie counts ½; None where there are none."""
    wins = [
        (one > other) + 0.5 * (one == other)
        for one, other in scores
        if one is not None and other is not None
    ]
    return float(np.mean(wins)) if wins else None


def repetition(text: str, size: int = 4) -> float:
    """The share of a text's n-grams of words that stand in it before; 0 for a short text."""
    words = text.split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
