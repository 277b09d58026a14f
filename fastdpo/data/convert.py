"""Rows of one layout made into rows of another, where `convert` asks for it and never else.

- `unpair`: a pair becomes two labelled rows, the chosen response a desirable one and the rejected
  one an undesirable one. They stand in the order of TRL's KTO trainer, which unpairs by itself: of
  every 1000 pairs first all that are chosen, then all that are rejected.
- `pair`: the labelled rows of one prompt become one group, in which every desirable response is
  compared with every undesirable one. Rows of a prompt whose labels are all the same are dropped.

A row keeps the number and the line of what it was made of, for messages; of several, the first's.
What cannot be converted stays as a row that says why, to be counted with the other bad ones.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import xxhash

from ..errors import DataError
from .columns import PREFERENCES, PROBLEM_COLUMN, RESPONSES, ROW_COLUMN, row_kind, row_kinds
from .load import explain_disk
from .messages import BadRow, Text, unreadable
from .needs import CONVERSIONS, Convert, describe_kind
from .preferences import parse_label
from .prompts import split_explicit, split_implicit
from .readers import stored
from .rows import check_texts

Raw: TypeAlias = Mapping[str, Any]
Batch: TypeAlias = dict[str, list[Any]]

# To be raised whenever the same rows are converted to others than before.
_VERSION = 1
# Pairs that TRL unpairs at a time, which is the default of the `datasets` library.
_PAIRS = 1000
# What belongs to a prompt besides its text.
_WITH_PROMPT = ("prompt", "tools", "chat_template_kwargs")


def convert_rows(
    dataset: datasets.Dataset, convert: Convert, roles: Collection[str], source: str
) -> tuple[datasets.Dataset, str]:
    """The converted rows, with the index that each had before in `fastdpo_row`, and a sentence on
    what was made.

    Args:
        dataset: raw rows, with no other columns than those that are to be kept.
        convert: the conversion.
        roles: that a message may have.
        source: what to call the data in messages.

    Raises:
        DataError: where there is nothing to convert, or nothing is left.
    """
    columns = dataset.column_names
    kind, _ = CONVERSIONS[convert]
    if kind not in row_kinds(columns):
        found = describe_kind(row_kind(columns, source), columns)
        expected = "chosen, rejected" if kind == "pair" else "prompt, completion, label"
        raise DataError(
            f"{source}: convert: {convert} has nothing to convert; expected rows of {expected}, "
            f"found {found}"
        )
    dataset = dataset.with_format(None)
    with explain_disk(source):
        if convert == "unpair":
            return _unpair(dataset, roles, source)
        return _pair(dataset, source)


def _features(dataset: datasets.Dataset, made: Mapping[str, Any]) -> datasets.Features:
    """Of converted rows: the columns `made` in place of responses and what was said of them."""
    responses = (name for names in RESPONSES.values() for name in names)
    replaced = {*responses, *PREFERENCES, "logps", "label"}
    kept = {name: f for name, f in dataset.features.items() if name not in replaced}
    own = {ROW_COLUMN: datasets.Value("int64"), PROBLEM_COLUMN: datasets.Value("string")}
    return datasets.Features({**kept, **made, **own})


def _map(dataset: datasets.Dataset, function: Any, key: Any, desc: str) -> datasets.Dataset:
    """What an `_Unpair` or a `_Pair` makes of the rows, cached under its own key."""
    key = json.dumps([_VERSION, dataset._fingerprint, key])
    return dataset.map(
        function,
        batched=True,
        batch_size=_PAIRS,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=function.features,
        new_fingerprint=xxhash.xxh3_128_hexdigest(key.encode()),
        desc=desc,
    )


def _as_rows(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    columns = {name: batch[name] for name in batch}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _as_columns(rows: Sequence[Raw], features: datasets.Features) -> Batch:
    is_text = {name: not isinstance(kind, datasets.Json) for name, kind in features.items()}
    return {name: [stored(row.get(name), is_text[name]) for row in rows] for name in features}


# unpair


@dataclass(frozen=True)
class _Unpair:
    """A function from batches of pairs to batches of labelled rows with these features."""

    features: datasets.Features
    roles: Collection[str]

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Batch:
        chosen: list[Raw] = []
        rejected: list[Raw] = []
        for raw, index in zip(_as_rows(batch), indices, strict=True):
            row = raw | {ROW_COLUMN: index}
            try:
                prompt, good, bad = _split_pair(raw, self.roles)
            except BadRow as problem:
                chosen.append(row | {"prompt": None, PROBLEM_COLUMN: str(problem)})
                continue
            chosen.append(row | {"prompt": prompt, "completion": good, "label": True})
            rejected.append(row | {"prompt": prompt, "completion": bad, "label": False})
        return _as_columns([*chosen, *rejected], self.features)


def _unpair(
    dataset: datasets.Dataset, roles: Collection[str], source: str
) -> tuple[datasets.Dataset, str]:
    texts = {name: datasets.Json() for name in ("prompt", "completion")}
    features = _features(dataset, {**texts, "label": datasets.Value("bool")})
    unpair = _Unpair(features, roles)
    converted = _map(dataset, unpair, ["unpair", *sorted(roles)], f"Unpairing {source}")
    return converted, f"{len(dataset)} pairs made {len(converted)} labelled rows"


def _split_pair(raw: Raw, roles: Collection[str]) -> tuple[Text, Text, Text]:
    """A pair's prompt and its two responses, parted where only both of them show where."""
    if problem := raw.get(PROBLEM_COLUMN):
        raise BadRow(problem)
    sides = check_texts({name: raw.get(name) for name in RESPONSES["pair"]}, roles)
    if "prompt" in raw:
        prompt = check_texts({"prompt": raw["prompt"]}, roles)["prompt"]
        if isinstance(prompt, str) and not any(isinstance(side, str) for side in sides.values()):
            prompt, sides, _ = split_explicit(prompt, sides, repeated=False)
        parted = prompt, sides["chosen"], sides["rejected"]
    else:
        parted = split_implicit(sides["chosen"], sides["rejected"])
    try:
        problem = unreadable(parted)
    except (TypeError, ValueError) as error:
        problem = f"expected plain values ({error})"
    if problem:
        raise BadRow(problem)
    return parted


# pair


@dataclass(frozen=True)
class _Pair:
    """A function from batches of rows, each the first of its prompt, to batches of groups.

    Attributes:
        features: of a group.
        dataset: all rows.
        rows: of each first row, the indices of all rows of its prompt.
    """

    features: datasets.Features
    dataset: datasets.Dataset
    rows: Sequence[Sequence[int]]

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Batch:
        groups = []
        for raw, index in zip(_as_rows(batch), indices, strict=True):
            row = raw | {ROW_COLUMN: self.rows[index][0]}
            try:
                groups.append(row | self._group(raw, self.rows[index]))
            except BadRow as problem:
                groups.append(row | {PROBLEM_COLUMN: str(problem)})
        return _as_columns(groups, self.features)

    def _group(self, first: Raw, rows: Sequence[int]) -> dict[str, Any]:
        _label(first)
        held = self.dataset.select_columns(["completion", "label"])[list(rows)]
        labels = list(enumerate(map(parse_label, held["label"])))
        comparisons = [[i, j] for i, good in labels if good for j, other in labels if not other]
        return {"responses": held["completion"], "comparisons": comparisons}


def _pair(dataset: datasets.Dataset, source: str) -> tuple[datasets.Dataset, str]:
    groups = _rows_of_prompts(dataset)
    dropped = len(dataset) - sum(map(len, groups))
    said = f"{len(dataset)} labelled rows made {len(groups)} groups"
    if dropped:
        said += f", {dropped} dropped, all labels of the prompt equal"
    if not groups:
        raise DataError(f"{source}: {said}; expected a prompt with both labels")
    text = dataset.features["completion"]
    made = {
        "responses": text if isinstance(text, datasets.Json) else datasets.List(text),
        "comparisons": datasets.List(datasets.List(datasets.Value("int32"))),
    }
    pair = _Pair(_features(dataset, made), dataset, groups)
    firsts = dataset.select([rows[0] for rows in groups])
    return _map(firsts, pair, "pair", f"Pairing {source}"), said


def _rows_of_prompts(dataset: datasets.Dataset) -> list[list[int]]:
    """The indices of the rows of each prompt that has both labels, in the order of its first row;
    and each bad row by itself, to be counted.
    """
    rows: dict[Any, list[int]] = {}
    labels: dict[Any, set[bool]] = {}
    with_prompt = [name for name in _WITH_PROMPT if name in dataset.column_names]
    read = [
        name for name in (*with_prompt, "label", PROBLEM_COLUMN) if name in dataset.column_names
    ]
    for index, row in enumerate(dataset.select_columns(read)):
        try:
            label = {_label(row)}
            text = json.dumps([row[n] for n in with_prompt], sort_keys=True, default=str)
            key: Any = xxhash.xxh3_128_digest(text.encode())
        except BadRow:
            label, key = {True, False}, index
        rows.setdefault(key, []).append(index)
        labels.setdefault(key, set()).update(label)
    return [listed for key, listed in rows.items() if len(labels[key]) == 2]


def _label(row: Raw) -> bool:
    if problem := row.get(PROBLEM_COLUMN):
        raise BadRow(problem)
    return parse_label(row["label"])
