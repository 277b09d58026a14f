"""What a row says of its responses, as the constants that losses read."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_LEAST_SPREAD = 1e-4  # beside the standard deviation, as TRL has it


def constants_of_row(row: Mapping[str, Any], scale_rewards: str) -> dict[str, list[float]]:
    """Of each response of a tokenised row, by name: "label" (1 or 0), "advantage", "win_rate",
    "rank" (0 the best) and "logp", those that the row has.
    """
    found: dict[str, np.ndarray] = {}
    count = len(row["response_ids"])
    if len(row["labels"]):
        found["label"] = np.asarray(row["labels"], np.float64)
    scores = np.asarray(row.get("scores", ()), np.float64)
    if len(scores):
        found["advantage"] = advantages(scores, scale_rewards)
        found["win_rate"] = _rates_of_scores(scores)
    elif len(row["winners"]):
        found["win_rate"] = _rates_of_comparisons(row, count)
    for name, column in (("rank", "ranks"), ("logp", "logps")):
        values = np.asarray(row.get(column, ()), np.float64)
        if len(values):
            found[name] = values
    return {name: values.tolist() for name, values in found.items()}


def advantages(scores: np.ndarray, scale_rewards: str) -> np.ndarray:
    """A = (s − mean) / (std + 1e-4) of a group's scores (G,), the standard deviation that of a
    sample, as in TRL; with `scale_rewards` "none" A = s − mean (Dr. GRPO, arXiv:2503.20783).
    """
    centred = scores - scores.mean()
    if scale_rewards == "none":
        return centred
    return centred / (scores.std(ddof=1) + _LEAST_SPREAD)


def _rates_of_scores(scores: np.ndarray) -> np.ndarray:
    """The share of the other responses that each one beats, (G,); a tie is half a win."""
    wins = (scores[:, None] > scores).sum(1) + 0.5 * ((scores[:, None] == scores).sum(1) - 1)
    return wins / max(1, len(scores) - 1)


def _rates_of_comparisons(row: Mapping[str, Any], count: int) -> np.ndarray:
    """The weighted share of its comparisons that each response wins, (G,); ½ without any."""
    wins, losses = np.zeros(count), np.zeros(count)
    np.add.at(wins, row["winners"], row["weights"])
    np.add.at(losses, row["losers"], row["weights"])
    known = wins + losses > 0
    return np.where(known, wins / np.where(known, wins + losses, 1), 0.5)
