"""Which layout a data set has: the one that is named, or the only one that its columns tell."""

from collections.abc import Mapping
from typing import Any

import datasets

from ...errors import DataError
from ..columns import LINE_COLUMN, MEDIA, PROBLEM_COLUMN, row_kind, row_kinds
from .layout import Ambiguous, Reading
from .mapping import mapped, suggested
from .registry import LAYOUTS
from .sample import Sample
from .values import is_message


def recognise(
    dataset: datasets.Dataset,
    where: str,
    layout: str | None = None,
    columns: Mapping[str, Any] | None = None,
    *,
    scores: bool = False,
) -> Reading:
    """How the rows of a data set are to be read.

    Args:
        dataset: rows as they were found.
        where: what to call it in messages.
        layout: the name of a layout, to be taken whatever else the columns may mean.
        columns: which column holds each field, in place of a layout.
        scores: whether the scores of a pair's answers are to be read, where there are any.

    Raises:
        DataError: columns that are no layout, or that may be read in two ways, with the key that
            decides; a layout or a mapping that they do not allow.
    """
    own = [name for name in (LINE_COLUMN, PROBLEM_COLUMN) if name in dataset.column_names]
    sample = Sample(dataset.remove_columns(own) if own else dataset)
    if (media := sample.first_filled(*MEDIA)) is not None:
        raise DataError(f"{where}: has a column of {media}; only text can be trained on")
    if columns:
        return mapped(columns, sample, where)
    if layout is not None:
        return _named(layout, sample, where)
    if scores and isinstance(scored := LAYOUTS["scored_pair"].find(sample, True), Reading):
        return scored
    found = [entry.find(sample, False) for name, entry in LAYOUTS.items() if name != "trl"]
    for one in found:
        if isinstance(one, Ambiguous):
            raise DataError(_both(one, where))
    readings = {one.layout: one for one in found if isinstance(one, Reading)}
    best = [
        one
        for one in readings.values()
        if not any(set(one.columns) < set(other.columns) for other in readings.values())
    ]
    if len(best) > 1:
        raise DataError(_both(_several(best), where))
    if best:
        return best[0]
    if not row_kinds(sample.names):
        raise DataError(_unknown(sample, where))
    row_kind(sample.names, where)
    canonical = LAYOUTS["trl"].find(sample, False)
    assert isinstance(canonical, Reading)
    return canonical


def _named(layout: str, sample: Sample, where: str) -> Reading:
    entry = LAYOUTS[layout]
    found = entry.find(sample, True)
    if isinstance(found, Reading) and found.layout == layout:
        return found
    held = ", ".join(sorted(sample.names)) or "none"
    raise DataError(f"{where}: layout: {layout}: expected columns {entry.columns}; found {held}")


def _several(readings: list[Reading]) -> Ambiguous:
    told = tuple(
        (f"the columns {', '.join(one.columns)}", f"layout: {one.layout}") for one in readings[:2]
    )
    return Ambiguous("the columns are those of two layouts", (told[0], told[1]))


def _both(ambiguous: Ambiguous, where: str) -> str:
    (first, write_first), (second, write_second) = ambiguous.readings
    return (
        f"{where}: {ambiguous.problem}: write {write_first} where {first}, or {write_second} "
        f"where {second}"
    )


def _unknown(sample: Sample, where: str) -> str:
    names = sample.dataset.column_names
    for name in names:
        held = sample.value(name)
        items = held if isinstance(held, list) else []
        if not items or not isinstance(items[0], Mapping) or is_message(items[0]):
            continue
        if row_kinds(items[0]) or len(names) == 1:
            return f"{where}: {name} holds rows; expected a list of them, or one a line"
    if len(names) == 1 and (separators := {";", "\t"} & set(names[0])):
        found = " and ".join(map(repr, sorted(separators)))
        return f"{where}: the header has {found} in it; expected commas between the columns"
    try:
        row_kind(sample.names, where)
    except DataError as error:
        return f"{error}; any other columns by a mapping such as {suggested(sample)}"
    raise AssertionError("columns that make no row are refused")
