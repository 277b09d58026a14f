"""Rows to a file of the kind that its name says."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from ..errors import ConfigError
from ..files import atomic_file


def writer_of(path: Path) -> Callable[[datasets.Dataset], None]:
    """What writes a data set to `path`, whole or not at all.

    Raises:
        ConfigError: a name that says no kind of file, or a directory.
    """
    kinds: dict[str, Callable[[datasets.Dataset, Path], Any]] = {
        ".jsonl": _write_jsonl,
        ".jsonl.gz": _write_gzip,
        ".parquet": lambda rows, file: rows.to_parquet(str(file)),
    }
    write = kinds.get("".join(path.suffixes[-2:])) or kinds.get(path.suffix)
    if write is None or path.is_dir():
        raise ConfigError(f"{path}: expected a file named .jsonl, .jsonl.gz or .parquet")

    def to_file(rows: datasets.Dataset) -> None:
        with atomic_file(path) as temporary:
            write(rows, temporary)

    return to_file


def _write_jsonl(rows: datasets.Dataset, file: Path) -> None:
    with file.open("w", encoding="utf-8") as lines:
        _write_lines(rows, lines)


def _write_gzip(rows: datasets.Dataset, file: Path) -> None:
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        _write_lines(rows, lines)


def _write_lines(rows: datasets.Dataset, lines: Any) -> None:
    for row in rows.with_format(None):
        lines.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
