"""What a row says of its responses: a label, comparisons, scores, a ranking, log-probabilities."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .columns import PREFERENCES, RowKind
from .messages import BadRow

Comparison: TypeAlias = tuple[int, int, float]

# A sum of logarithms may come out this much above 0 in a low precision.
_ROUNDING = 1e-2


@dataclass(frozen=True)
class Preferences:
    """What is known of N responses to one prompt; what the row does not say is empty.

    Attributes:
        comparisons: `(winner, loser, weight)` with indices of responses: those that are stated, or
            else all of two responses with different ranks.
        label: whether the only response is a good one; None where the row has no label.
        scores: one a response, the higher the better.
        ranks: one a response, 0 the best and no number left out: those that are stated, or else
            those that the scores imply.
        logps: log-probability of each response under the policy that made it, summed over its
            tokens, in nats.
    """

    comparisons: tuple[Comparison, ...] = ()
    label: bool | None = None
    scores: tuple[float, ...] = ()
    ranks: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()


def parse_preferences(row: Mapping[str, Any], kind: RowKind, count: int) -> Preferences:
    """Check what a row of this layout says of its `count` responses.

    Raises:
        BadRow: naming the field and what was expected.
    """
    if kind == "pair":
        return Preferences(((0, 1, 1.0),))
    if kind == "label":
        return Preferences(label=parse_label(row.get("label")))
    if all(row.get(field) is None for field in PREFERENCES):
        field = "rankings" if "rankings" in row else "scores"
        raise BadRow.expected(f"a list of {count} numbers, one a response", field, row.get(field))
    scores = tuple(_parse_scores(row.get("scores"), count))
    ranks = tuple(_parse_rankings(row.get("rankings"), count)) or scores_to_ranks(scores)
    stated = row.get("comparisons")
    if stated is None:
        indices = range(len(ranks))
        comparisons = [(i, j, 1.0) for i in indices for j in indices if ranks[i] < ranks[j]]
    elif isinstance(stated, list):
        comparisons = [_parse_comparison(item, i, count) for i, item in enumerate(stated)]
    else:
        raise BadRow.expected("a list such as [[0, 1], [0, 2]]", "comparisons", stated)
    logps = tuple(_parse_logps(row.get("logps"), count))
    return Preferences(tuple(comparisons), None, scores, ranks, logps)


def scores_to_ranks(scores: Sequence[float]) -> tuple[int, ...]:
    """The rank of each score from 0, the highest; equal scores share one, and none is left out."""
    places = {score: place for place, score in enumerate(sorted(set(scores), reverse=True))}
    return tuple(places[score] for score in scores)


def parse_label(value: Any) -> bool:
    """Whether a response is labelled as a good one.

    Raises:
        BadRow: where that is neither true nor false.
    """
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise BadRow.expected("true or false", "label", value)


def _one_each(value: Any, field: str, count: int, what: str = "numbers") -> list[Any]:
    if value is not None and (not isinstance(value, list) or len(value) != count):
        raise BadRow.expected(f"a list of {count} {what}, one a response", field, value)
    return value or []


def _parse_scores(value: Any, count: int) -> Iterator[float]:
    for i, score in enumerate(_one_each(value, "scores", count)):
        if not _is_number(score):
            raise BadRow.expected("a finite number", f"scores[{i}]", score)
        yield float(score)


def _parse_rankings(value: Any, count: int) -> tuple[int, ...]:
    stated = _one_each(value, "rankings", count, "whole numbers")
    for i, rank in enumerate(stated):
        if not _is_number(rank) or rank not in range(1, count + 1):
            what = f"a whole number from 1 (the best) to {count}"
            raise BadRow.expected(what, f"rankings[{i}]", rank)
    return scores_to_ranks([-rank for rank in stated])


def _parse_logps(value: Any, count: int) -> Iterator[float]:
    for i, logp in enumerate(_one_each(value, "logps", count)):
        if not _is_number(logp) or logp > _ROUNDING:
            raise BadRow.expected("a finite log-probability, at most 0", f"logps[{i}]", logp)
        yield float(logp)


def _parse_comparison(item: Any, position: int, count: int) -> Comparison:
    field = f"comparisons[{position}]"
    if isinstance(item, Mapping):
        parts: Sequence[Any] = [item.get("winner"), item.get("loser"), item.get("weight")]
    elif isinstance(item, list) and len(item) in (2, 3):
        parts = [*item, None][:3]
    else:
        raise BadRow.expected("[winner, loser] or [winner, loser, weight]", field, item)
    winner, loser = (_response_index(part, field, count) for part in parts[:2])
    if winner == loser:
        raise BadRow(f"{field}: compares response {winner} with itself; expected two responses")
    weight = 1.0 if parts[2] is None else parts[2]
    if not _is_number(weight) or weight < 0:
        raise BadRow.expected("a finite weight of at least 0", field, weight)
    return winner, loser, float(weight)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _response_index(value: Any, field: str, count: int) -> int:
    # Arrow turns [0, 1, 0.5] into floats, so an index may arrive as 1.0.
    if not _is_number(value) or value not in range(count):
        raise BadRow.expected(f"indices of responses from 0 to {count - 1}", field, value)
    return int(value)
