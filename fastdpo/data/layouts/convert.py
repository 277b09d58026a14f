"""Rows of any layout made into rows of TRL's columns, once, in the library's cache."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import xxhash

from ..columns import FIELDS, LINE_COLUMN, PROBLEM_COLUMN, TEMPLATE_FIELDS, may_hold_prompt
from ..messages import BadRow, plain_message, unreadable
from ..processes import processes_for
from ..readers import stored
from . import groups, mapping, pairs
from .layout import Reading
from .plain import as_plain, plain_columns
from .recognise import recognise
from .sample import Sample

logger = logging.getLogger(__name__)

# To be raised whenever the same rows are read as others than before.
_VERSION = 3
_BATCH = 512
_SHOWN = 40
_SIDES = ("chosen", "rejected")
_COMPARED = ("prompt", "responses", "comparisons")
# The fields that each function makes, beside tools and chat_template_kwargs.
_MADE: Mapping[Any, tuple[str, ...]] = {
    pairs.pair: ("prompt", *_SIDES),
    pairs.output_list: ("prompt", *_SIDES),
    pairs.system_beside: ("prompt", *_SIDES),
    pairs.swift: ("prompt", *_SIDES),
    pairs.openai: ("prompt", *_SIDES, "tools"),
    pairs.whole: _SIDES,
    pairs.swift_messages: _SIDES,
    pairs.transcripts: _SIDES,
    groups.versus: _COMPARED,
    groups.arena: _COMPARED,
    groups.scored_pair: ("prompt", "responses", "scores"),
    groups.completions: ("prompt", "responses"),
    groups.nectar: ("prompt", "responses"),
    groups.thumbs: ("prompt", "completion", "label"),
    groups.labelled_messages: ("prompt", "completion", "label"),
}
_KINDS = {
    "comparisons": datasets.List(datasets.List(datasets.Value("int32"))),
    "label": datasets.Value("bool"),
}


def to_canonical(
    dataset: datasets.Dataset,
    where: str,
    *,
    layout: str | None = None,
    columns: Mapping[str, Any] | None = None,
    scores: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """The rows in TRL's columns; as they are, where they have them. One line says what was read.

    A row that its layout does not fit stays, with the reason in `fastdpo_problem`, to be named or
    counted with the other bad ones.

    Args:
        dataset: rows as they were found.
        where: what to call them in messages.
        layout: the layout, where it is not to be told from the columns.
        columns: which column holds each field, in place of a layout.
        scores: whether the scores of a pair's answers are to be read.
        num_proc: processes to convert with.

    Raises:
        DataError: columns that cannot be read, see `recognise`.
    """
    reading = recognise(dataset, where, layout, columns, scores=scores)
    if reading.function is None:
        made = dataset
    else:
        reading = replace(reading, plain=plain_columns(Sample(dataset), reading.names))
        made = _map(dataset, reading, where, num_proc)
    logger.info(f"layout: {describe(reading, made, where)}")
    return made


@dataclass(frozen=True)
class _Convert:
    """A function from batches of rows as they were found to batches of canonical ones."""

    reading: Reading
    features: datasets.Features
    kept: tuple[str, ...]

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        columns = {name: batch[name] for name in batch}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        made = [self._convert(row) for row in rows]
        return {
            name: [stored(row.get(name), not _is_json(kind)) for row in made]
            for name, kind in self.features.items()
        }

    def _convert(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: raw.get(name) for name in self.kept}
        if raw.get(PROBLEM_COLUMN):
            return kept
        assert self.reading.function is not None
        raw = {**raw, **{name: as_plain(raw[name]) for name in self.reading.plain}}
        try:
            fields = self.reading.function(raw, self.reading.names)
            problem = unreadable(fields)
        except BadRow as error:
            fields, problem = {}, str(error)
        except (TypeError, ValueError) as error:
            fields, problem = {}, f"expected plain values ({error})"
        return kept | ({PROBLEM_COLUMN: problem} if problem else fields)


def _is_json(feature: Any) -> bool:
    return isinstance(feature, datasets.Json)


def _map(
    dataset: datasets.Dataset, reading: Reading, where: str, num_proc: int | None
) -> datasets.Dataset:
    kept = _kept(dataset, reading)
    own = {LINE_COLUMN: datasets.Value("int64"), PROBLEM_COLUMN: datasets.Value("string")}
    features = {name: dataset.features[name] for name in kept if name not in own}
    fields = _fields(reading)
    features |= {name: _KINDS.get(name, datasets.Json()) for name in FIELDS if name in fields}
    features |= {name: own[name] for name in own if name in kept or name == PROBLEM_COLUMN}
    convert = _Convert(reading, datasets.Features(features), kept)
    function = reading.function
    assert function is not None
    how = [function.__name__, reading.names, list(kept), list(reading.plain)]
    key = [_VERSION, dataset._fingerprint, *how]
    return dataset.with_format(None).map(
        convert,
        batched=True,
        batch_size=_BATCH,
        num_proc=processes_for(len(dataset), num_proc if len(dataset) > _BATCH else 1),
        remove_columns=dataset.column_names,
        features=convert.features,
        new_fingerprint=xxhash.xxh3_128_hexdigest(json.dumps(key).encode()),
        desc=f"Reading {where}",
    )


def _fields(reading: Reading) -> set[str]:
    """The canonical fields that a reading makes."""
    if reading.function in (mapping.by_columns, pairs.text_arguments):
        fields = set(reading.names)
        return (fields | {"prompt"} if "instruction" in fields else fields) & set(FIELDS)
    optional = {*TEMPLATE_FIELDS} & set(reading.names)
    listed = {reading.names["as"]} if "as" in reading.names else set()
    return {*_MADE[reading.function], *optional, *listed}


def _kept(dataset: datasets.Dataset, reading: Reading) -> tuple[str, ...]:
    """Columns that stay: where rows came from, and what is not read and may hold a prompt."""
    own = (LINE_COLUMN, PROBLEM_COLUMN)
    read = set(reading.columns)
    watches = reading.function is not mapping.by_columns
    return tuple(
        name
        for name in dataset.column_names
        if name in own or (watches and name not in read and may_hold_prompt(name))
    )


def describe(reading: Reading, made: datasets.Dataset, where: str) -> str:
    """What layout was read, with the first good row: the prompt's end and the answers' starts."""
    names = {"trl": "TRL's columns", "columns": "by the key columns"}
    said = names.get(reading.layout, reading.layout)
    read = ", ".join(name for name in reading.columns if name in FIELDS or reading.function)
    line = f"{where} is read as {said} ({read})"
    if (example := _example(made)) is not None:
        line += f"; for example {example}"
    return f"{line}; {reading.hint}" if reading.hint else line


def _example(made: datasets.Dataset) -> str | None:
    names = [name for name in (*FIELDS, PROBLEM_COLUMN) if name in made.column_names]
    for row in made.with_format(None).select_columns(names).select(range(min(len(made), 50))):
        if row.get(PROBLEM_COLUMN):
            continue
        answers = {name: row.get(name) for name in ("chosen", "rejected", "completion")}
        for i, response in enumerate((row.get("responses") or [])[:2]):
            answers[f"responses[{i}]"] = response
        parts = [f"{name} {_start(value)}" for name, value in answers.items() if value is not None]
        if row.get("label") is not None:
            parts.append(f"label {str(row['label']).lower()}")
        if row.get("comparisons"):
            parts.append(f"comparisons {row['comparisons']}")
        before = [f"prompt {_end(row['prompt'])}"] if row.get("prompt") else []
        return " | ".join(before + parts)
    return None


def _text(value: Any, last: bool) -> str:
    if isinstance(value, list) and value:
        message = value[-1 if last else 0]
        if not isinstance(message, Mapping):
            return str(message)
        shown = plain_message(message)
        return str(shown.get("content") or shown.get("tool_calls") or "")
    return str(value)


def _end(value: Any) -> str:
    text = _text(value, last=True)
    return repr(text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}")


def _start(value: Any) -> str:
    whole = isinstance(value, list) and len(value) > 1
    text = _text(value, last=whole)
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
