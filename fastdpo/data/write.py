"""Rows to a file of the kind that its name says."""

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow

from ..errors import ConfigError
from ..files import atomic_file

Rows: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]


def writer_of(path: Path) -> Callable[[Rows], None]:
    """What writes rows to `path`, whole or not at all; they need not agree in their types.

    Raises:
        ConfigError: a name that says no kind of file, or a directory.
    """
    kinds: dict[str, Callable[[Rows, Path], Any]] = {
        ".jsonl": _write_jsonl,
        ".jsonl.gz": _write_gzip,
        ".parquet": lambda rows, file: as_dataset(rows).to_parquet(str(file)),
    }
    write = kinds.get("".join(path.suffixes[-2:])) or kinds.get(path.suffix)
    if write is None or path.is_dir():
        raise ConfigError(f"{path}: expected a file named .jsonl, .jsonl.gz or .parquet")

    def to_file(rows: Rows) -> None:
        with atomic_file(path) as temporary:
            write(rows, temporary)

    return to_file


def as_dataset(rows: Rows) -> datasets.Dataset:
    """Rows as a data set; a column of mappings, or of values of several types, is JSON, so that
    every row keeps what it holds and gets nothing of the others.
    """
    if isinstance(rows, datasets.Dataset):
        return rows
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    features = datasets.Features({name: _feature(values) for name, values in columns.items()})
    for name, feature in features.items():
        if isinstance(feature, datasets.Json):
            columns[name] = [json_line(value) for value in columns[name]]
    return datasets.Dataset.from_dict(columns, features)


def _feature(values: Sequence[Any]) -> Any:
    try:
        kind = pyarrow.array(values).type
    except (pyarrow.ArrowException, OverflowError):
        return datasets.Json()
    if "struct<" in str(kind):
        return datasets.Json()
    return datasets.features.features.generate_from_arrow_type(kind)


def json_line(value: Any) -> str:
    """A value on one line, texts as they are, NumPy's values as Python's, and as a text what JSON
    has no type for.
    """
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _write_jsonl(rows: Rows, file: Path) -> None:
    with file.open("w", encoding="utf-8") as lines:
        _write_lines(rows, lines)


def _write_gzip(rows: Rows, file: Path) -> None:
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        _write_lines(rows, lines)


def _write_lines(rows: Rows, lines: Any) -> None:
    plain: Iterable[Any] = rows.with_format(None) if isinstance(rows, datasets.Dataset) else rows
    for row in plain:
        lines.write(json_line(row) + "\n")
