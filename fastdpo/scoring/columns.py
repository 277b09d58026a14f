"""The columns that `fastdpo score` gives rows, by their layout."""

from collections.abc import Sequence
from typing import Any

import datasets

from ..data.columns import RESPONSES
from .measures import Values
from .responses import GroupScores
from .rows import ScoredRow

_ALWAYS = ("logp", "tokens")
_MEASURED = (*_ALWAYS, "ref_logp", "reward")
_PLURAL = {"logp": "logps", "tokens": "tokens", "ref_logp": "ref_logps", "reward": "rewards"}


def _names(kind: str, measured: Sequence[str]) -> list[str]:
    if kind == "pair":
        return [f"{side}_{name}" for side in RESPONSES["pair"] for name in measured] + ["margin"]
    if kind == "label":
        return list(measured)
    return [*(f"response_{_PLURAL[name]}" for name in measured), "best"]


def own_names(kind: str, dataset: datasets.Dataset) -> list[str]:
    """The columns of a data set that have names of ours."""
    ours = [*_names(kind, _MEASURED), "unscored"]
    return [name for name in ours if name in dataset.column_names]


def scored_before(kind: str, dataset: datasets.Dataset) -> bool:
    """Whether an earlier score wrote those: all that it always writes, rewards with what they are
    measured from, and none of them text.
    """
    text = datasets.Value("string")
    has = {name for name in _names(kind, _MEASURED) if dataset.features.get(name, text) != text}
    rewards = {*_names(kind, _MEASURED)} - {*_names(kind, _ALWAYS)}
    return has >= {*_names(kind, _ALWAYS)} and (rewards <= has or rewards.isdisjoint(has))


def score_columns(
    kind: str,
    rows: Sequence[ScoredRow],
    scores: Sequence[GroupScores | None],
    values: Sequence[Values | None],
) -> dict[str, list[Any]]:
    """The new columns, an item a row."""
    if not any(scores):
        return {"unscored": [row.reason for row in rows]}
    measured: dict[str, list[list[Any] | None]] = {
        "logp": [None if one is None else one.logps.tolist() for one in scores],
        "tokens": [None if one is None else one.tokens.tolist() for one in scores],
    }
    if any(one is not None and one.ref_logps is not None for one in scores):
        measured["ref_logp"] = [
            None if one is None or one.ref_logps is None else one.ref_logps.tolist()
            for one in scores
        ]
        measured["reward"] = [None if v is None else v["reward"].tolist() for v in values]
    first = next(iter(next(v for v in values if v is not None)))
    columns: dict[str, list[Any]] = {}
    if kind == "pair":
        for place, response in enumerate(RESPONSES["pair"]):
            for name, items in measured.items():
                columns[f"{response}_{name}"] = [item and item[place] for item in items]
        columns["margin"] = [
            None if v is None else float(v[first][0] - v[first][1]) for v in values
        ]
    elif kind == "label":
        columns |= {name: [item and item[0] for item in items] for name, items in measured.items()}
    else:
        columns |= {f"response_{_PLURAL[name]}": items for name, items in measured.items()}
        columns["best"] = [None if v is None else int(v[first].argmax()) for v in values]
    if any(row.reason for row in rows):
        columns["unscored"] = [row.reason for row in rows]
    return columns
