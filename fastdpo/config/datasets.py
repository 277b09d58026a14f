"""Which data sets are read and how: the names that `layout`, `columns` and `datasets` may hold."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LAYOUTS = (
    "trl",
    "openai_calls",
    "system",
    "hh",
    "scored_pair",
    "alpaca",
    "alpaca_output",
    "orca",
    "argilla",
    "sharegpt",
    "axolotl",
    "swift",
    "swift_query",
    "whole_messages",
    "openai",
    "stack",
    "ultrafeedback",
    "nectar",
    "feedback",
    "feedback_index",
    "feedback_first",
    "helpsteer",
    "shp",
    "arena",
    "arena_texts",
    "thumbs",
    "labelled_messages",
)
"""The names of `fastdpo.data.layouts`, which reading a configuration does not import."""

FIELDS = (
    "prompt",
    "instruction",
    "system",
    "history",
    "chosen",
    "rejected",
    "responses",
    "comparisons",
    "scores",
    "rankings",
    "logps",
    "completion",
    "label",
    "tools",
    "chat_template_kwargs",
)
"""What `columns` may name the column of."""

_TEXTS = ("path", "name", "data_dir", "split", "layout")
_NUMBERS = ("fraction", "weight")
ENTRY = (*_TEXTS, "data_files", "columns", *_NUMBERS)
"""The keys of an entry of `datasets`."""


def paths_read(entries: Sequence[Mapping[str, Any]], *names: str | None) -> Iterator[Path]:
    """Where data sets of these names, and those of the entries of `datasets`, lie if that is on a
    disk.
    """
    yield from (Path(name).expanduser() for name in names if name is not None)
    for entry in entries:
        root, files = Path(entry["path"]), entry.get("data_files") or ()
        yield root
        by_split = files.values() if isinstance(files, Mapping) else [files]
        for listed in by_split:
            for name in [listed] if isinstance(listed, str) else listed:
                below = Path(entry.get("data_dir") or "") / name
                yield from (below, root / below)


def known_fields(columns: Mapping[str, Any]) -> bool:
    """Whether a mapping of columns names fields that there are."""
    return bool(columns) and set(columns) <= set(FIELDS)


def entry_problem(entries: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the entries of `datasets`; None where that is nothing."""
    for number, entry in enumerate(entries, 1):
        if problem := _wrong_entry(entry):
            return f"entry {number}: {problem}"
    if 0 < sum(entry.get("fraction") is not None for entry in entries) < len(entries):
        return "expected a fraction for every entry, or for none"
    if any(entry.get("fraction") and entry.get("weight") is not None for entry in entries):
        return "expected fraction, the share of the mixture, or weight, of the entry; not both"
    return None


def _wrong_entry(entry: Mapping[str, Any]) -> str | None:
    if unknown := sorted(set(entry) - set(ENTRY)):
        return f"unknown key {unknown[0]}; expected some of {', '.join(ENTRY)}"
    if not entry.get("path"):
        return "expected a path: a file, a directory or a hub dataset"
    for name in _TEXTS:
        if entry.get(name) is not None and not isinstance(entry[name], str):
            return f"{name}: expected a text"
    for name in _NUMBERS:
        value = entry.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < 1e9):
            return f"{name}: expected a number greater than 0"
    if entry.get("layout") is not None and entry["layout"] not in LAYOUTS:
        return f"layout: expected one of {', '.join(LAYOUTS)}"
    columns = entry.get("columns")
    if isinstance(columns, dict) and not known_fields(columns):
        return f"columns: expected the columns of some of {', '.join(FIELDS)}"
    if columns is not None and not isinstance(columns, dict | list):
        return "columns: expected a list of the columns to read, or a mapping of fields to columns"
    return None
