"""JSON read by the `datasets` library with the texts that look like dates left as they are.

Arrow's JSON reader, which the library's is made of, makes times of the texts of any field, however
deep, that hold nothing else than dates: of contents, of arguments of tool calls, of defaults in
tools. What was written is not known afterwards.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.json

_read_json = pyarrow.json.read_json


@contextlib.contextmanager
def dates_as_text() -> Iterator[None]:
    """Within it, JSON that the library reads holds no times.

    What it then writes to its cache is not what it writes there by itself: it must be given a place
    of its own, or the other is taken from there.
    """
    pyarrow.json.read_json = _read_with_text
    try:
        yield
    finally:
        pyarrow.json.read_json = _read_json


def holds_times(feature: Any) -> bool:
    """Whether a feature, or any within it, is of dates or times."""
    if isinstance(feature, Mapping):
        return any(map(holds_times, feature.values()))
    if isinstance(feature, datasets.List | datasets.LargeList):
        return holds_times(feature.feature)
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("time", "date"))


def _read_with_text(file: io.BytesIO, *, read_options: Any = None) -> pa.Table:
    raw = file.getvalue()
    table = _read_json(io.BytesIO(raw), read_options=read_options)
    schema = pa.schema([field.with_type(_with_text(field.type)) for field in table.schema])
    if schema == table.schema:
        return table
    parse_options = pyarrow.json.ParseOptions(explicit_schema=schema)
    return _read_json(io.BytesIO(raw), read_options=read_options, parse_options=parse_options)


def _with_text(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_text(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_text(kind.value_type)))
    return kind
