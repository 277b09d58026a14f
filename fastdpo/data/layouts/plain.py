"""Which columns hold text that stays text, though some of it may look like messages as JSON.

An answer to "write an email as JSON" may have `from` or `role` in it. Where messages are written as
JSON, most answers are; where most are other text, an object as JSON is text too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ..messages import written_messages
from .sample import Sample
from .values import PlainText, is_message, parsed

_ANSWERS = ("chosen", "rejected", "completion", "answer", "first", "second")
_LISTS = ("output", "responses")
_ASKED = (("user",), ("prompt",), ("instruction",))


def plain_columns(sample: Sample, names: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a reading's parts `names` whose text is text, whatever it looks like."""
    if "wins" in names:  # lists of texts, as JSON
        return ()
    found: list[str] = []
    for parts in ((*_ANSWERS, *_LISTS), *_ASKED):
        columns = list(_columns(sample, names, parts))
        texts = [
            text
            for name, is_list in columns
            for row in sample.rows
            for text in _texts(row.get(name), is_list)
        ]
        if texts and 2 * sum(map(_is_messages, texts)) <= len(texts):
            found += [name for name, _ in columns]
    return tuple(dict.fromkeys(found))


def _columns(
    sample: Sample, names: Mapping[str, Any], parts: tuple[str, ...]
) -> Iterator[tuple[str, bool]]:
    """Columns of these parts, and whether each is to hold a list of answers."""
    for part in parts:
        named = names.get(part, ())
        listed = isinstance(named, str) and part in _LISTS
        for name in [named] if isinstance(named, str) else named:
            if name in sample.names:
                yield name, listed


def _texts(value: Any, is_list: bool) -> list[str]:
    items = value if isinstance(value, list) else [] if is_list else [value]
    return [item for item in items if isinstance(item, str) and item.strip()]


def _is_messages(text: str) -> bool:
    held = parsed(text)
    items = held if isinstance(held, list) else [held]
    said = {"content", "value", "tool_calls"}
    return bool(items) and all(is_message(item) and not said.isdisjoint(item) for item in items)


def as_plain(value: Any) -> Any:
    """A text, or the texts of a list, as such that are never read as JSON; lists of messages with
    roles are, as they are in TRL's columns.
    """
    if isinstance(value, list):
        return [as_plain(item) if isinstance(item, str) else item for item in value]
    if not isinstance(value, str) or isinstance(written_messages(value), list):
        return value
    return PlainText(value)
