"""Several data sets read as one, each in its own layout, with its share or its weight.

A row of the mixture is named by the data set that it came from and its number there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash

from ..errors import DataError
from .columns import FIELDS, LINE_COLUMN, PROBLEM_COLUMN, RESPONSES, RowKind, row_kinds
from .layouts.convert import to_canonical
from .load import FILE_KINDS, Reader
from .messages import BadRow
from .needs import describe_kind
from .prompts import split_implicit
from .readers import stored
from .rows import check_texts
from .sources import Mixture, Part

Entry = Mapping[str, Any]

_BATCH = 512


def load_mixture(
    entries: Sequence[Entry],
    *,
    seed: int,
    num_proc: int | None = None,
    skip_bad_rows: bool = False,
    layout: str | None = None,
    columns: Mapping[str, Any] | None = None,
) -> tuple[Mixture, datasets.Dataset]:
    """The rows of several data sets, one after the other, and a name that knows whose they are.

    Args:
        entries: of the key `datasets`, as TRL writes them, with `weight`, `layout` and a mapping
            for `columns` besides.
        seed: of the rows that a weight selects.
        num_proc: as in `load_rows`, and so the next.
        skip_bad_rows: see there.
        layout: of entries that name none.
        columns: of entries that name none.

    Raises:
        DataError: a data set that cannot be read, or rows that cannot be in one data set.
    """
    loaded = []
    for entry in entries:
        reader = Reader(
            entry.get("split") or "train", entry.get("name"), num_proc, skip_bad_rows, True
        )
        rows = _read(entry, reader)
        given = entry.get("columns")
        if isinstance(given, list):
            rows = _selected(rows, given, entry["path"])
        mapping: Mapping[str, Any] | None = given if isinstance(given, dict) else None
        named = entry.get("layout") or (None if mapping else layout)
        mapping = mapping or (None if named else columns)
        loaded.append(
            to_canonical(rows, entry["path"], layout=named, columns=mapping, num_proc=num_proc)
        )
    indices = _shares(entries, [len(rows) for rows in loaded], seed)
    parts = tuple(
        Part(entry["path"], len(rows), taken)
        for entry, rows, taken in zip(entries, loaded, indices, strict=True)
    )
    taken = [
        rows if chosen is None else rows.select(chosen)
        for rows, chosen in zip(loaded, indices, strict=True)
    ]
    return Mixture.of(parts), _joined(taken, [entry["path"] for entry in entries])


def each_once(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The same data sets with every row once, whatever their shares and weights."""
    shares = ("fraction", "weight")
    return [{key: entry[key] for key in entry if key not in shares} for entry in entries]


def _read(entry: Entry, reader: Reader) -> datasets.Dataset:
    path, files, folder = entry["path"], entry.get("data_files"), entry.get("data_dir")
    if files is None and folder is None:
        return reader.read(path)
    if path in FILE_KINDS or Path(path).is_dir():
        root = Path("" if path in FILE_KINDS else path) / (folder or "")
        if files is None:
            return reader.read(str(root))
        by_split = files if isinstance(files, dict) else {"train": files}
        listed = by_split.get(reader.split.partition("[")[0])
        names = [listed] if isinstance(listed, str) else listed
        if not names:
            raise DataError(f"{path}: data_files: no files of the split {reader.split!r}")
        return _concatenated([reader.read(str(root / name)) for name in names])
    return reader.hub(path, data_files=files, data_dir=folder)


def _selected(rows: datasets.Dataset, names: Sequence[str], where: str) -> datasets.Dataset:
    own = [name for name in (LINE_COLUMN, PROBLEM_COLUMN) if name in rows.column_names]
    if missing := [name for name in names if name not in rows.column_names]:
        found = ", ".join(name for name in rows.column_names if name not in own)
        raise DataError(f"{where}: columns: no column {missing[0]!r}; expected some of {found}")
    return rows.select_columns([*names, *own])


def _shares(
    entries: Sequence[Entry], lengths: Sequence[int], seed: int
) -> list[Sequence[int] | None]:
    """The rows of each data set that are taken; None for all, once."""
    if entries[0].get("fraction") is not None:
        total = sum(entry["fraction"] for entry in entries)
        shares = [entry["fraction"] / total for entry in entries]
        size = min(length / share for length, share in zip(lengths, shares, strict=True))
        return [range(round(share * size)) for share in shares]
    return [
        _weighed(entry.get("weight"), length, [seed, position])
        for position, (entry, length) in enumerate(zip(entries, lengths, strict=True))
    ]


def _weighed(weight: float | None, length: int, seed: list[int]) -> Sequence[int] | None:
    """Each row so many times; of the part of a time, rows that the seed selects."""
    if weight is None or weight == 1:
        return None
    times, rest = divmod(round(weight * length), length)
    chosen = np.random.default_rng(seed).permutation(length)[:rest]
    taken: list[int] = [*np.tile(np.arange(length), times).tolist(), *np.sort(chosen).tolist()]
    return taken


def _joined(parts: Sequence[datasets.Dataset], names: Sequence[str]) -> datasets.Dataset:
    """The rows of all, in the columns of the one layout that all of them hold."""
    kinds = [row_kinds(part.column_names) for part in parts]
    common = [kind for kind in kinds[0] if all(kind in held for held in kinds)]
    if not common:
        other = next(i for i, held in enumerate(kinds) if kinds[0][0] not in held)
        first = describe_kind(kinds[0][0], parts[0].column_names)
        found = describe_kind(kinds[other][0], parts[other].column_names)
        raise DataError(
            f"{names[other]}: rows of {found} cannot be joined with those of {names[0]}, of "
            f"{first}; expected rows of one kind in all datasets"
        )
    held = set(FIELDS)
    for part in parts:
        held &= set(part.column_names) | {"tools", "chat_template_kwargs", "prompt"}
    unread = {name for part in parts for name in part.column_names} - set(FIELDS)
    kept = [
        part.select_columns([n for n in part.column_names if n in held | unread]) for part in parts
    ]
    if len({"prompt" in part.column_names for part in parts}) > 1:
        kept = [_with_prompt(part, common[0]) for part in kept]
    return _concatenated(kept)


def _with_prompt(part: datasets.Dataset, kind: RowKind) -> datasets.Dataset:
    """Pairs with their prompt in a column of its own, as it is in another part."""
    if "prompt" in part.column_names or kind != "pair":
        return part
    problem = {PROBLEM_COLUMN: datasets.Value("string")}
    json_fields = {name: datasets.Json() for name in ("prompt", *RESPONSES["pair"])}
    return _map(part, _split_batch, datasets.Features({**part.features, **json_fields, **problem}))


def _split_batch(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {name: list(batch[name]) for name in batch}
    count = len(batch["chosen"])
    problems = made.get(PROBLEM_COLUMN) or [None] * count
    made |= {"prompt": [None] * count, PROBLEM_COLUMN: problems}
    fields = ("prompt", *RESPONSES["pair"])
    for i, pair in enumerate(zip(batch["chosen"], batch["rejected"], strict=True)):
        try:
            if problems[i] is None:
                sides = check_texts(dict(zip(RESPONSES["pair"], pair, strict=True)), _AnyRole())
                for name, value in zip(fields, split_implicit(*sides.values()), strict=True):
                    made[name][i] = value
        except BadRow as error:
            problems[i] = str(error)
    return made | {name: [stored(value, False) for value in made[name]] for name in fields}


class _AnyRole(frozenset[str]):
    """Roles are judged later, by the chat template that knows them."""

    def __contains__(self, _: object) -> bool:
        return True


def _concatenated(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """Rows one after the other, a column as JSON where its type is not the same in all."""
    if len(parts) == 1:
        return parts[0]
    types: dict[str, list[Any]] = {}
    for part in parts:
        for name, feature in part.features.items():
            types.setdefault(name, []).append(feature)
    mixed = [name for name, held in types.items() if any(feature != held[0] for feature in held)]
    return datasets.concatenate_datasets([_as_json(part, mixed) for part in parts])


def _as_json(part: datasets.Dataset, names: Sequence[str]) -> datasets.Dataset:
    changed = [
        name
        for name in names
        if name in part.column_names and not isinstance(part.features[name], datasets.Json)
    ]
    if not changed:
        return part
    features = datasets.Features({**part.features, **{name: datasets.Json() for name in changed}})
    return _map(part, _Json(tuple(features), features), features)


class _Json:
    """A function from batches to batches whose columns of JSON are written as JSON."""

    def __init__(self, names: Sequence[str], features: datasets.Features) -> None:
        self.names = names
        self.is_text = {n: not isinstance(features[n], datasets.Json) for n in names}

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        return {n: [stored(value, self.is_text[n]) for value in batch[n]] for n in self.names}


def _map(part: datasets.Dataset, function: Any, features: datasets.Features) -> datasets.Dataset:
    key = [part._fingerprint, type(function).__name__, str(features)]
    return part.with_format(None).map(
        function,
        batched=True,
        batch_size=_BATCH,
        features=features,
        new_fingerprint=xxhash.xxh3_128_hexdigest(json.dumps(key).encode()),
        desc="Joining data sets",
    )
