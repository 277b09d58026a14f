"""Verdicts and thumbs that may mean two things, with what to write for each."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..messages import BadRow
from .layout import Ambiguous, Reading
from .sample import Sample
from .verdicts import TIES, WAYS, number, word

# By how the second of two answers ends, how others end.
_FURTHER = {"1": "2", "2": "30", "b": "c", "B": "C"}


def unclear_verdict(sample: Sample, names: Mapping[str, str]) -> Ambiguous | None:
    """Why it cannot be told what the column `names["verdict"]` says of two answers, counted from 1
    or lettered; None where it can.
    """
    verdict = names["verdict"]
    said = {word(value) for value in sample.distinct(verdict) or sample.values(verdict)} - {"nan"}
    numbers = {value for each in said if (value := number(each)) is not None}
    if not numbers <= {0, 1, 2}:
        return _scale(names, numbers)
    if said <= {"1", "true", "false", *TIES} and said & {"0", "true", "false"}:
        return _zero_or_one(names)
    return _which_is_the_tie(names) if {0, 2} <= numbers else None


def _scale(names: Mapping[str, str], numbers: set[float]) -> Ambiguous:
    verdict, first, second = names["verdict"], names["first"], names["second"]
    return Ambiguous(
        f"{verdict} is a scale, of {min(numbers):g} to {max(numbers):g}",
        (
            (f"{first} is better below 0 and {second} above it", "layout: helpsteer"),
            ("it means anything else", f"1, 2 or tie in {verdict}"),
        ),
    )


def _zero_or_one(names: Mapping[str, str]) -> Ambiguous:
    verdict, first, second = names["verdict"], names["first"], names["second"]
    return Ambiguous(
        f"{verdict} is 0 or 1, an index or a label",
        (
            (f"0 is {first}, 1 is {second}", "layout: feedback_index"),
            (f"1 says that {first} is better, 0 that {second} is", "layout: feedback_first"),
        ),
    )


def _which_is_the_tie(names: Mapping[str, str]) -> Ambiguous:
    verdict, first, second = names["verdict"], names["first"], names["second"]
    return Ambiguous(
        f"{verdict} is 0, 1 or 2, one of which is a tie",
        (
            (f"1 is {first}, 2 is {second} and 0 is a tie", "layout: feedback"),
            (
                f"0 is {first}, 1 is {second} and 2 is a tie",
                f"{verdict}: tie in place of 2, and layout: feedback_index",
            ),
        ),
    )


def third_answer(sample: Sample, reading: Reading) -> Ambiguous | None:
    """Two readings of a third answer beside the two that a layout compares; None without one."""
    names = reading.names
    first, second = names["first"], names["second"]
    others = [second[:-1] + end for end in _FURTHER[second[-1]]]
    third = sample.first_filled(*others)
    if third is None:
        return None
    asked = next(names[part] for part in ("prompt", "user", "talk") if part in names)
    listed = f"prompt: {asked}, responses: [{first}, {second}, {third}], rankings: ..."
    return Ambiguous(
        f"{third} is a third answer beside {first} and {second}",
        (
            (f"{names['verdict']} compares {first} and {second}", f"layout: {reading.layout}"),
            ("a column holds the ranks of all", f"columns: {{{listed}}}"),
        ),
    )


def contradiction(sample: Sample, names: Mapping[str, str], others: list[str]) -> Ambiguous | None:
    """Two readings of rows in which another column of verdicts says that the other answer is
    better, whichever way it counts.
    """
    verdict = names["verdict"]
    for other in others:
        rows = list(sample.dataset.with_format(None).select_columns([verdict, other]))
        ways = [_contradicts(rows, names, other, way) for way in ("order", "index", "first")]
        if all(way is None for way in ways) or False in ways:
            continue
        read = [n for p in ("prompt", "user", "talk", "first", "second") if (n := names.get(p))]
        columns = ", ".join([*read, other])
        return Ambiguous(
            f"{verdict} and {other} contradict each other",
            (
                (f"{verdict} counts", "layout: feedback"),
                (f"{other} does", f"datasets: [{{path: ..., columns: [{columns}]}}]"),
            ),
        )
    return None


def _contradicts(
    rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], other: str, way: str
) -> bool | None:
    """Whether a column that counts in this way says otherwise than the verdict in any row; None
    where it does not count so.
    """
    try:
        said = [None if row[other] is None else WAYS[way](row[other], other) for row in rows]
    except BadRow:
        return None
    verdicts = [_order(row[names["verdict"]]) for row in rows]
    return any({one, two} == {0, 1} for one, two in zip(verdicts, said, strict=True))


def _order(value: Any) -> int | None:
    try:
        return WAYS["order"](value, "")
    except BadRow:
        return None


def unclear_thumb(sample: Sample, reading: Reading) -> Ambiguous | None:
    """Why it cannot be told what a column says of an answer; None where it can."""
    column, layout = reading.names["thumb"], f"layout: {reading.layout}"
    words = {word(value) for value in sample.distinct(column) or ()}
    if {"0", "-1"} <= words:
        return Ambiguous(
            f"{column} is -1, 0 or 1",
            (
                ("0 is a thumb down", layout),
                ("0 is no thumb", f"null in place of 0 in {column}, and skip_bad_rows: true"),
            ),
        )
    if column == "rating" and words == {"1"}:
        return Ambiguous(
            "rating is always 1",
            (
                ("1 is a thumb up", layout),
                ("it is a number of stars", "true or false, in a column named thumb,"),
            ),
        )
    return None
