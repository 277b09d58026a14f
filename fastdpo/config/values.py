"""Turning what a YAML file, a flag or a Python call holds into the type that a key declares.

Flags are always text and YAML reads `1e-6` as text, so text that spells a value is that value.
Nothing is rounded, cut or guessed: whatever does not fit is a `ValueError`.
"""

import contextlib
import json
import math
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

TRUE_WORDS = frozenset({"true", "yes", "on", "1"})
FALSE_WORDS = frozenset({"false", "no", "off", "0"})
NONE_WORDS = frozenset({"none", "null"})
LARGEST = 2**63 - 1
"""The largest whole number that a key takes, since those of tensors and files end there."""
_LONGEST = 100


def convert(value: Any, annotation: Any) -> Any:
    """`value` as `annotation`: bool, int, float, str, list[...], dict[str, ...], or a union. The
    entries of a dict are of its second type: Any for single values, object for whatever they are.

    Raises:
        ValueError: the value is of another type; the message is what was expected.
    """
    members = members_of(annotation)
    if NoneType in members and (value is None or _spells(value, NONE_WORDS)):
        return None
    for member in members:
        if member is not NoneType:
            with contextlib.suppress(ValueError, OverflowError, RecursionError):
                return _read(value, member)
    names = [_name(member) for member in members]
    if int in members and float in members:
        names.remove(_name(int))
    raise ValueError(" or ".join(names))


def limits(value: Any, is_path: bool) -> str | None:
    """What was expected of a value that no key can take; None where it is within all limits."""
    if isinstance(value, int):
        return f"a whole number of at most {LARGEST}" if abs(value) > LARGEST else None
    if not isinstance(value, str):
        return None
    if "\0" in value:
        return "a text without NUL characters"
    try:
        parts = [len(part) for part in value.encode().split(b"/")]
    except UnicodeEncodeError:
        return "a text of valid Unicode"
    if is_path and (max(parts) > 255 or sum(parts) + len(parts) > 4096):
        return "a path of at most 4095 bytes, and 255 between two slashes"
    return None


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that it is."""
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def show(value: Any) -> str:
    """A value the way a configuration file writes it, for messages and tables."""
    if isinstance(value, str):
        return value if value.strip() == value and value else json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(show(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{show(name)}: {show(item)}' for name, item in value.items())}}}"
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # a number of more than 4300 digits
        return "a number of thousands of digits"


def show_short(value: Any) -> str:
    """`show` for a message of one line, whatever was given."""
    text = show(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _name(member: Any) -> str:
    if get_origin(member) is list:
        return f"a list ({_name(get_args(member)[0])} each)"
    if get_origin(member) is dict:
        return "a mapping (JSON on the command line)"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return "none" if member is NoneType else names[member]


def _read(value: Any, member: Any) -> Any:
    if get_origin(member) is list:
        of = get_args(member)[0]
        entries = value if isinstance(value, list | tuple) else [value]
        if get_origin(of) is dict and len(entries) == 1 and _is_list(entries[0]):
            entries = json.loads(entries[0])
        return [_read(entry, of) for entry in entries]
    if get_origin(member) is dict and get_args(member)[1] is not Any:
        return _entries(value, get_args(member)[1])
    readers = {bool: _boolean, int: _whole, float: _number, str: _text, dict: _mapping}
    return readers[get_origin(member) or member](value)


def _is_list(value: Any) -> bool:
    """Whether this is a flag's text for a whole list, in JSON."""
    return isinstance(value, str) and value.lstrip().startswith("[")


def _spells(value: Any, words: frozenset[str]) -> bool:
    return isinstance(value, str) and value.strip().lower() in words


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if _spells(value, TRUE_WORDS):
        return True
    if _spells(value, FALSE_WORDS):
        return False
    raise ValueError


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isascii():
        try:
            return int(value)
        except ValueError:
            pass
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    if isinstance(value, str) and not value.isascii():  # float() reads every script's digits
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError
    return {name: _plain(entry) for name, entry in value.items()}


def _entries(value: Any, annotation: Any) -> dict[str, Any]:
    """A mapping whose entries are of another type than numbers, or of any (`object`)."""
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError
    if annotation is object:
        return dict(value)
    return {name: convert(entry, annotation) for name, entry in value.items()}


def _plain(value: Any) -> Any:
    """A mapping's entry, with numbers that YAML left as text (`1e-7`) made numbers."""
    if isinstance(value, str):
        try:
            return _number(value)
        except ValueError:
            return value
    if value is not None and not isinstance(value, bool):
        _number(value)  # neither a list nor infinite
    return value
