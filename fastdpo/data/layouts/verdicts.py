"""What a person, or a model, said of two answers or of one, in the words of many data sets."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..messages import BadRow

_FIRST = frozenset(
    [
        "1",
        "a",
        "first",
        "left",
        "model_a",
        "response_a",
        "response_1",
        "response1",
        "model_1",
        "assistant_a",
        "answer_a",
        "option_a",
        "completion_a",
        "conversation_a",
    ]
)
_SECOND = frozenset(
    [
        "2",
        "b",
        "second",
        "right",
        "model_b",
        "response_b",
        "response_2",
        "response2",
        "model_2",
        "assistant_b",
        "answer_b",
        "option_b",
        "completion_b",
        "conversation_b",
    ]
)
TIES = frozenset(
    [
        "0",
        "tie",
        "ties",
        "both",
        "equal",
        "same",
        "draw",
        "neither",
        "none",
        "both_bad",
        "both_good",
        "bothbad",
        "tie_bothbad",
        "tie_both_bad",
    ]
)
_UP = frozenset(
    [
        "1",
        "true",
        "up",
        "thumbs_up",
        "thumb_up",
        "thumbsup",
        "yes",
        "good",
        "like",
        "liked",
        "positive",
        "upvote",
        "desirable",
        "👍",
    ]
)
_DOWN = frozenset(
    [
        "0",
        "-1",
        "false",
        "down",
        "thumbs_down",
        "thumb_down",
        "thumbsdown",
        "no",
        "bad",
        "dislike",
        "disliked",
        "negative",
        "downvote",
        "undesirable",
        "👎",
    ]
)
# Skin tones of a thumb, and the mark that it is to be shown as a picture.
_TONES = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]")


def word(value: Any) -> str:
    """A verdict in one way of writing: 1.0 and "+1" are "1", "Model A" is "model_a"."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value).strip().lower()
    try:
        number = float(text)
        return str(int(number)) if number.is_integer() else text
    except (ValueError, OverflowError):
        return re.sub(r"[\s\-()_]+", "_", _TONES.sub("", text)).strip("_")


def number(said: str) -> float | None:
    """The number that a verdict is, of those that `word` makes; None for any other."""
    try:
        return None if said == "nan" else float(said)
    except ValueError:
        return None


def _wrong(expected: str, field: str, value: Any) -> BadRow:
    return BadRow(f"{field}: expected {expected}, found {json.dumps(value, default=str)[:60]}")


def ordered(value: Any, field: str) -> int | None:
    """The index of the better of two answers, which are counted from 1 or lettered; None for a tie.

    Raises:
        BadRow: a value that says neither.
    """
    said = word(value)
    for words, index in ((_FIRST, 0), (_SECOND, 1), (TIES, None)):
        if said in words and value is not None:
            return index
    raise _wrong("1 or 2, A or B, model_a or model_b, or tie", field, value)


def indexed(value: Any, field: str) -> int | None:
    """The index of the better of two answers, counted from 0; None for a tie.

    Raises:
        BadRow: a value that says neither.
    """
    said = {"true": "1", "false": "0"}.get(word(value), word(value))
    if said not in ("0", "1", "tie"):
        raise _wrong("0 for the first answer or 1 for the second", field, value)
    return None if said == "tie" else int(said)


def affirmed(value: Any, field: str) -> int | None:
    """The index of the better of two answers, where 1 or true says that it is the first.

    Raises:
        BadRow: a value that says neither.
    """
    try:
        index = indexed(value, field)
    except BadRow:
        raise _wrong("1 for the first answer or 0 for the second", field, value) from None
    return None if index is None else 1 - index


def by_strength(value: Any, field: str) -> int | None:
    """The index of the better of two answers, the first below 0 and the second above, as in
    HelpSteer; None at 0.

    Raises:
        BadRow: a value that is no number.
    """
    try:
        number = float("none" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise _wrong("a number, below 0 where the first is better", field, value) from None
    if number != number:
        raise _wrong("a number, below 0 where the first is better", field, value)
    return None if number == 0 else int(number > 0)


WAYS: Mapping[str, Callable[[Any, str], int | None]] = {
    "order": ordered,
    "index": indexed,
    "first": affirmed,
    "strength": by_strength,
}
"""How a column may say which of two answers is better."""


def thumb(value: Any, field: str) -> bool:
    """Whether a thumb is up.

    Raises:
        BadRow: a value that is neither up nor down.
    """
    said = word(value)
    if said in _UP or said in _DOWN:
        return said in _UP
    raise _wrong("up or down (true or false, 1 or 0, +1 or -1)", field, value)


def is_thumb(value: Any) -> bool:
    """Whether a value is a thumb up or down."""
    return value is not None and word(value) in _UP | _DOWN
