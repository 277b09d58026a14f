"""JSON, JSONL and CSV read row by row, where the `datasets` library's readers are not enough.

Its JSON reader is fast and is tried first. It stops at a malformed line without naming it, gives
up on rows whose types differ, and turns a text such as "42" into a number when another row holds a
list in the same place. Its CSV reader turns a text such as "None" into a missing value. Reading
again, slowly, gives the line, the reason and the text as written.

Rows that cannot be read either raise a `DataError` or, with `skip_bad_rows`, stay in the data set
as rows of nulls whose `fastdpo_problem` says why, so that `tokenize_dataset` counts them with the
rest.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import datasets

from ..errors import DataError
from .columns import (
    FIELDS,
    LINE_COLUMN,
    MEDIA,
    PROBLEM_COLUMN,
    TEXT_FIELDS,
    may_hold_prompt,
    row_kind,
    row_kinds,
)
from .messages import describe, unreadable
from .sources import Mixture

# A line's number (0: the file has no lines to speak of) and its row, or why it could not be read.
Numbered: TypeAlias = tuple[int, dict[str, Any] | str]

_CHUNK = 1 << 24
_UTF_16 = "the text is UTF-16; expected UTF-8"
# How nesting ends; in a text, it only means that the slow reader reads the file.
_DEEP = (b"]" * 64, b"}" * 64, b"]}" * 32, b"[" * 64)
_NULL_ROW = re.compile(
    rb"\n[ \t\r]*null"
)  # an alternative to the first byte takes ten times as long


def open_binary(path: Path) -> BinaryIO:
    """Open a file that may be gzipped."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return cast(BinaryIO, opener(path, "rb"))


def may_fail_fast(path: Path) -> bool:
    """Whether the library's reader must not see a JSON file: text that is no UTF-8, which it
    mangles, lists in so many lists that it overruns its stack, or null for a row, which crashes it.
    A pass at a gigabyte a second.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_binary(path) as file:
        while True:
            chunk = file.read(_CHUNK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                return True
            if any(run in chunk for run in _DEEP) or _NULL_ROW.search(b"\n" + chunk):
                return True
            if not chunk:
                return False


def row_label(source: str, row: int, num_rows: int, line: int | None = None) -> str:
    """Name a row to the user: by its line where the source is a JSONL file, else by its number.

    Args:
        source: the file, the data set or the mixture that the rows came from.
        row: index of the row among `num_rows`.
        num_rows: rows of the whole data set; lines are only counted where they agree with it.
        line: the line, where the reader noted it.
    """
    if isinstance(source, Mixture):
        source, row, num_rows = source.locate(row)
    path = Path(source)
    if not line and path.suffix in (".jsonl", ".ndjson") and path.is_file():
        with path.open("rb") as file:
            lines = [number for number, text in enumerate(file, 1) if text.strip()]
        line = lines[row] if len(lines) == num_rows else None
    return f"{source}, line {line}" if line else f"{source}, row {row + 1}"


def read_rows(
    paths: Sequence[Path], kind: str, *, skip_bad_rows: bool, all_columns: bool = False
) -> datasets.Dataset:
    """Read JSON, JSONL (`kind="json"`) or CSV (`kind="csv"`) files into one cached data set.

    Of rows in TRL's columns, only those that training reads are kept and those that may hold the
    prompt, of others all of them, with `fastdpo_line`; columns that hold anything but text are
    stored as JSON, so that rows need not agree in their types.

    Args:
        paths: the files.
        kind: what they are.
        skip_bad_rows: keep rows that cannot be read as rows of nulls.
        all_columns: keep every column of rows in TRL's columns too.

    Raises:
        DataError: naming the file and line of the first row that cannot be read; where there is
            none that can.
    """
    where = ", ".join(map(str, paths))
    only_text: dict[str, bool] = {}
    problems = []
    for path in paths:
        for line, row in _iterate(path, kind):
            if isinstance(row, str):
                problems.append(f"{path}{f', line {line}' if line else ''}: {row}")
                if not skip_bad_rows:
                    raise DataError(problems[0])
                continue
            for name, value in row.items():
                only_text[name] = only_text.get(name, True) and isinstance(value, str | None)
    if not only_text:
        raise DataError(problems[0] if problems else f"{where}: has no rows")
    # Without a prompt, any column of text may turn out to be it, and is there to be named.
    others = [name for name in only_text if name not in FIELDS]
    implicit = "prompt" not in only_text
    everything = all_columns or not row_kinds(only_text)
    kept = [
        name
        for name in others
        if everything or name in MEDIA or may_hold_prompt(name) or (implicit and only_text[name])
    ]
    named = [name for name in (*FIELDS, *kept) if name in only_text and _is_name(name)]
    if not named:
        row_kind(only_text, where)
    fields = tuple((name, only_text[name]) for name in named)
    features = stored_types(dict(fields))
    features |= {LINE_COLUMN: datasets.Value("int64"), PROBLEM_COLUMN: datasets.Value("string")}
    # Size and time of change make a changed file a different data set to the cache.
    stamps = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    return datasets.Dataset.from_generator(
        _generate,
        features=datasets.Features(features),
        gen_kwargs={"stamps": stamps, "kind": kind, "fields": fields},
    )


def _is_name(name: str) -> bool:
    """Whether Arrow can have a column of this name."""
    return "\0" not in name and unreadable(name) is None


def _generate(
    stamps: tuple[tuple[str, int, int], ...], kind: str, fields: tuple[tuple[str, bool], ...]
) -> Iterator[dict[str, Any]]:
    for name, _, _ in stamps:
        for line, row in _iterate(Path(name), kind):
            problem = row if isinstance(row, str) else None
            values = row if isinstance(row, dict) else {}
            encoded = {name: stored(values.get(name), is_text) for name, is_text in fields}
            yield encoded | {LINE_COLUMN: line, PROBLEM_COLUMN: problem}


def stored_types(only_text: Mapping[str, bool]) -> dict[str, Any]:
    """The types of columns: text where they hold nothing else, and JSON, so that rows need not
    agree in their types.
    """
    return {
        name: datasets.Value("string") if is_text else datasets.Json()
        for name, is_text in only_text.items()
    }


def stored(value: Any, is_text: bool) -> Any:
    """A value for such a column: in JSON a text is quoted, or "42" would come back as a number."""
    return value if is_text else json.dumps(value)


def _iterate(path: Path, kind: str) -> Iterator[Numbered]:
    if kind == "csv":
        return _iterate_csv(path)
    with open_binary(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    return _iterate_list(path) if start == b"[" else _iterate_jsonl(path)


def _iterate_jsonl(path: Path) -> Iterator[Numbered]:
    with open_binary(path) as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
                try:
                    yield line, _check_object(_decode_json(raw))
                except _NoJson as problem:
                    yield line, str(problem)


def _iterate_list(path: Path) -> Iterator[Numbered]:
    """Items of a JSON list; a file that is no JSON has no rows that could be skipped."""
    with open_binary(path) as file:
        raw = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        items = _decode_json(raw)
    except _NoJson as problem:
        line = f", line {problem.line}" if problem.line else ""
        raise DataError(f"{path}{line}: {problem}") from None
    for item in items:
        yield 0, _check_object(item)


class _NoJson(ValueError):
    """Bytes that cannot be read as JSON: why, and in which of their lines, where that is known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def _decode_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        problem = f"invalid UTF-8: byte 0x{raw[error.start]:02x}"
        if error.start == 0 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            problem = _UTF_16
        raise _NoJson(problem, raw.count(b"\n", 0, error.start) + 1) from None
    except json.JSONDecodeError as error:
        problem = f"invalid JSON at column {error.colno}: {error.msg}"
        raise _NoJson(problem, error.lineno) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, lists in 1000 lists
        raise _NoJson(f"JSON that is too large: {error}") from None


def _check_object(value: Any) -> dict[str, Any] | str:
    if not isinstance(value, dict):
        return f"expected a JSON object, found {describe(value)}"
    return unreadable(value) or value


def _iterate_csv(path: Path) -> Iterator[Numbered]:
    csv.field_size_limit(sys.maxsize)
    with open_binary(path) as start:
        if start.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path}, line 1: {_UTF_16}")
    binary = open_binary(path)
    with io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{path}, line {line}: invalid CSV: {error}") from None
            if header is None:
                header = cells
                if twice := sorted(name for name, n in Counter(cells).items() if n > 1):
                    raise DataError(
                        f"{path}, line {line}: column {twice[0]!r} is there twice; expected each "
                        "name once"
                    )
            elif cells:
                yield line, _decode_cells(header, cells)


def _decode_cells(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | str:
    if len(cells) != len(header):
        return f"found {len(cells)} fields; expected {len(header)}, as in the header"
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        try:
            cell.encode()
        except UnicodeEncodeError:
            return f"{name}: invalid UTF-8"
        if name in TEXT_FIELDS or name not in FIELDS:
            row[name] = cell
        else:
            try:
                row[name] = json.loads(cell.lower() if name == "label" else cell) if cell else None
            except (ValueError, RecursionError) as error:
                return f"{name}: expected JSON, found text that is none: {error}"
            if problem := unreadable(row[name]):
                return f"{name}: {problem}"
    return row
