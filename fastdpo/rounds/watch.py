"""What is watched of a model through the rounds, on answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    score: float | None
    win_rate: float | None
    tokens: float
    complete: float
    repetition: float
    kl: float
    engine_difference: float | None
    unscored: int

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
) -> Watched:
    """Measure a model's answers, one to each held-out prompt, beside those of the start.

    Args:
        tokens: drawn of each answer.
        logps: log π(y|x) of each answer.
        start_logps: log π_start(y|x).
        engine_logps: log π(y|x) by the engine that drew it.
    """
    known = [score for score in scores if score is not None]
    both = [
        (mine, theirs)
        for mine, theirs in zip(scores, start_scores, strict=True)
        if mine is not None and theirs is not None
    ]
    differences = [
        abs(theirs - ours) / count
        for theirs, ours, count in zip(engine_logps, logps, tokens, strict=True)
        if theirs is not None
    ]
    wins = [1.0 if mine > theirs else 0.5 if mine == theirs else 0.0 for mine, theirs in both]
    return Watched(
        score=float(np.mean(known)) if known else None,
        win_rate=float(np.mean(wins)) if wins else None,
        tokens=float(np.mean(tokens)),
        complete=float(np.mean(complete)),
        repetition=float(np.mean([repetition(text) for text in answers])),
        kl=float(np.sum(np.subtract(logps, start_logps)) / np.sum(tokens)),
        engine_difference=float(np.mean(differences)) if differences else None,
        unscored=len(scores) - len(known),
    )


def repetition(text: str, size: int = 4) -> float:
    """The share of a text's n-grams of words that stand in it before; 0 for a short text."""
    words = text.split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
