"""The lines of request logs."""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..data.messages import unreadable
from ..errors import DataError

NO_JSON, NO_OBJECT = "no JSON", "no JSON object"


def read_lines(paths: Sequence[Path]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Every line that is not empty, by its number over all files: its object, or why it has none.

    A file of JSON, not JSONL, is a list, whose items are its lines.

    Raises:
        DataError: a file that cannot be read.
    """
    number = 0
    for path in paths:
        with _opened(path) as lines:
            for value in _values(path, lines):
                number += 1
                yield number, value


def _values(path: Path, lines: io.BufferedIOBase) -> Iterator[dict[str, Any] | str]:
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    each: Iterable[bytes] = lines
    if plain.suffix == ".json":
        text = lines.read()
        with contextlib.suppress(ValueError, RecursionError):
            items = json.loads(text)
            yield from map(_checked, items if isinstance(items, list) else [items])
            return
        each = text.splitlines()
    for line in each:
        if line.strip():
            try:
                yield _checked(json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError):
                yield NO_JSON


def _checked(value: Any) -> dict[str, Any] | str:
    if not isinstance(value, dict):
        return NO_OBJECT
    return value if unreadable(value) is None else "no valid Unicode"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".zst":
            with pa.input_stream(str(path), compression="zstd") as packed:
                yield io.BufferedReader(packed)
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
