"""What rows say of their responses, and steps of their units, as the constants that losses read."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..errors import DataError
from .groups import Group
from .ragged import Lists, ends_of

_LEAST_SPREAD = 1e-4  # beside the standard deviation, as TRL has it
_AT_ONCE = 1 << 22
"""Pairs of responses that are compared at once: bounds the memory."""


def given_of_rows(
    columns: Mapping[str, Lists], counts: np.ndarray, scale_rewards: str, source: str
) -> dict[str, Lists]:
    """Of each response of the rows of a tokenised data set, a list a row: "label" (1 or 0),
    "advantage", "win_rate", "rank" (0 the best) and "logp", those that all rows have.

    Args:
        columns: the data set's, by name.
        counts: responses of each row.
        scale_rewards: see `advantages`.
        source: what to call the data.

    Raises:
        DataError: some rows with logps and others without.
    """
    ends = ends_of(counts)
    has = {name: column.lengths > 0 for name, column in columns.items()}
    found: dict[str, np.ndarray] = {}
    if has["labels"].all():
        found["label"] = columns["labels"].values
    if has["scores"].all():
        scores = columns["scores"].values
        found["advantage"] = _each_row(scores, ends, lambda s: advantages(s, scale_rewards))
    if (has["scores"] | has["winners"]).all():
        found["win_rate"] = _win_rates(columns, has["scores"], ends)
    if has["ranks"].all():
        found["rank"] = columns["ranks"].values
    if has["logps"].all():
        found["logp"] = columns["logps"].values
    elif said := has["logps"].sum():
        raise DataError(
            f"{source}: {said} of {len(counts)} rows have logps; expected them in every row, or "
            "in none"
        )
    return {name: Lists(values.astype(np.float64), ends) for name, values in found.items()}


def _each_row(
    values: np.ndarray, ends: np.ndarray, function: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """A function of tables (B, N), a row each, of the rows of the same length N together."""
    counts, made = np.diff(ends), np.empty(len(values))
    for count in np.unique(counts).tolist():
        rows = np.flatnonzero(counts == count)
        step = max(1, _AT_ONCE // max(1, count) ** 2)
        for start in range(0, len(rows), step):
            index = ends[rows[start : start + step], None] + np.arange(count)
            made[index] = function(values[index])
    return made


def _win_rates(columns: Mapping[str, Lists], scored: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """By the scores of the rows that have some, and by the comparisons of the others."""
    rates = _rates_of_comparisons(columns, ends)
    if scored.any():
        of_scored = np.repeat(scored, np.diff(ends))
        kept = ends_of(np.diff(ends)[scored])
        rates[of_scored] = _each_row(columns["scores"].values, kept, _rates_of_scores)
    return rates


def advantages(scores: np.ndarray, scale_rewards: str) -> np.ndarray:
    """A = (s − mean) / (std + 1e-4) of each group's scores (..., G), the standard deviation that of
    a sample, as in TRL; with `scale_rewards` "none" A = s − mean (Dr. GRPO, arXiv:2503.20783).
    """
    centred = scores - scores.mean(-1, keepdims=True)
    if scale_rewards == "none":
        return centred
    return centred / (scores.std(-1, ddof=1, keepdims=True) + _LEAST_SPREAD)


def _rates_of_scores(scores: np.ndarray) -> np.ndarray:
    """The share of the G responses, itself among them, that each one beats, (B, G); a tie is half
    a win: P(y ≻ π̂ | x) of the empirical policy π̂ of SPPO (arXiv:2405.00675, section 4).
    """
    one, other = scores[..., :, None], scores[..., None, :]
    return ((one > other) + 0.5 * (one == other)).mean(-1)


def _rates_of_comparisons(columns: Mapping[str, Lists], ends: np.ndarray) -> np.ndarray:
    """The weighted share of its comparisons that each response wins, (R,); ½ without any."""
    starts = ends[columns["winners"].owners()]
    weights = columns["weights"].values.astype(np.float64)
    wins, losses = (
        np.bincount(starts + columns[name].values.astype(np.int64), weights, minlength=ends[-1])
        for name in ("winners", "losers")
    )
    known = wins + losses > 0
    return np.where(known, wins / np.where(known, wins + losses, 1), 0.5)


def step_constants(
    groups: Sequence[Group], units: Sequence[tuple[int, int]], batch: int
) -> Mapping[str, np.ndarray]:
    """What the units (group, unit) of a step are given of the batches of `batch` units that they
    stand in, each (U,) fp64: how many tokens a mean over tokens is over, averaged over the units.
    """
    if groups[units[0][0]].unit == "group":
        return {}
    lengths, prompts = [], []
    for index, unit in units:
        group = groups[index]
        lengths.append(group.scored_tokens(group.responses_of(unit)[0]))
        prompts.append(max(0, len(group.prompt) - 1))
    tokens, sequences = np.array(lengths, np.float64), np.array(lengths, np.float64) + prompts
    if groups[units[0][0]].unit == "response":
        whole = np.full_like(tokens, max(1.0, tokens.mean()))
        return {"batch_tokens": _batch_means(tokens, batch), "step_tokens": whole}
    return {
        "batch_chosen_tokens": _batch_means(tokens, batch),
        "batch_sequence_tokens": _batch_means(sequences, batch),
    }


def _batch_means(values: np.ndarray, batch: int) -> np.ndarray:
    means = np.empty_like(values)
    for start in range(0, len(values), batch):
        part = slice(start, start + batch)
        means[part] = max(1.0, values[part].mean())
    return means
