"""What is looked at of a data set to tell its layout: names, the first rows, what columns hold."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .values import is_blank

_ROWS = 50
# Of so many different values a column may consist to hold verdicts.
_MOST = 50


@dataclass(frozen=True, eq=False)
class Sample:
    """A data set as a layout's detection sees it."""

    dataset: datasets.Dataset

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The names of its columns."""
        return frozenset(self.dataset.column_names)

    @functools.cached_property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """Its first rows, decoded."""
        first = self.dataset.with_format(None)[:_ROWS]
        return [dict(zip(first, row, strict=True)) for row in zip(*first.values(), strict=True)]

    def values(self, name: str) -> list[Any]:
        """The values of a column in the first rows, without null."""
        return [row[name] for row in self.rows if row.get(name) is not None]

    def value(self, name: str) -> Any:
        """The first value of a column that is not blank; None where the first rows have none."""
        return next((row[name] for row in self.rows if not is_blank(row.get(name))), None)

    def first(self, *names: str) -> str | None:
        """The first of these columns that there is."""
        return next((name for name in names if name in self.names), None)

    def filled(self, name: str) -> bool:
        """Whether there is such a column and any row, of all, has something in it."""
        if name not in self.names:
            return False
        return self.value(name) is not None or self._any(name)

    def first_filled(self, *names: str) -> str | None:
        """The first of these columns that holds anything."""
        return next((name for name in names if self.filled(name)), None)

    def distinct(self, name: str) -> list[Any] | None:
        """The values of a column other than null; None where they are many."""
        column = _storage(self.dataset.data.column(name))
        try:
            values = pc.unique(column).drop_null()
        except pa.ArrowNotImplementedError:
            return None
        if len(values) > _MOST:
            return None
        decode = self.dataset.features[name]
        raw = values.to_pylist()
        return [decode.decode_example(v) for v in raw] if _is_json(decode) else raw

    def has_type(self, name: str, part: str) -> bool:
        """Whether the type of a column, in Arrow's words, has this part."""
        return part in str(self.dataset.data.column(name).type)

    def matches(self, name: str, pattern: str) -> bool:
        """Whether any JSON in a column, or in its lists, matches a regular expression."""
        column = self.dataset.data.column(name)
        while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = pc.list_flatten(column)
        column = _storage(column)
        if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
            return False
        return bool(pc.any(pc.match_substring_regex(column, pattern)).as_py())

    def _any(self, name: str) -> bool:
        column = _storage(self.dataset.data.column(name))
        kind = column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            said = pc.invert(pc.match_substring_regex(column, r'^\s*(null|""|\[\]|\{\})?\s*$'))
            return bool(pc.any(said).as_py())
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return bool(pc.any(pc.greater(pc.list_value_length(column), 0)).as_py())
        return column.null_count < len(column)


def _is_json(feature: Any) -> bool:
    return isinstance(feature, datasets.Json)


def _storage(column: Any) -> Any:
    """A column without the extension type that says that its texts are JSON."""
    if isinstance(column.type, pa.BaseExtensionType):
        return pa.chunked_array(
            [chunk.storage for chunk in column.chunks], type=column.type.storage_type
        )
    return column
