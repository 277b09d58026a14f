"""A configuration as text: the help of its keys, the table a run prints, the YAML it saves."""

import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import Field
from types import NoneType
from typing import Any, get_origin

import yaml

from ..version import __version__
from .declare import GROUPS, default_of
from .keys import Keys
from .values import members_of, show

TYPE_WORDS = {bool: "BOOL", int: "INT", float: "NUMBER", str: "TEXT", list: "LIST", dict: "JSON"}


def key_help(keys: "Mapping[str, Field[Any]]") -> str:
    """The keys by section, each with its type, its meaning and its default."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 100)
    lines: list[str] = []
    for group, heading in GROUPS.items():
        lines += ["", f"{heading}:"]
        for name, declared in keys.items():
            if declared.metadata["group"] == group:
                lines.append(f"  --{name} {_takes(declared)}")
                about = f"{declared.metadata['help']} (default: {_default(declared)})"
                lines += textwrap.wrap(
                    about, width, initial_indent=" " * 6, subsequent_indent=" " * 6
                )
    return "\n".join(lines[1:])


def _takes(declared: "Field[Any]") -> str:
    if choices := declared.metadata["choices"]:
        if sum(map(len, choices)) < 60:
            return "{" + ",".join(choices) + "}"
        fours = (", ".join(choices[i : i + 4]) for i in range(0, len(choices), 4))
        return "{" + ",\n      ".join(fours) + "}"
    kinds = [get_origin(member) or member for member in members_of(declared.type)]
    words = [TYPE_WORDS[kind] for kind in kinds if kind is not NoneType]
    if "LIST" in words:
        return f"{words[0]} ..."
    text = "NUMBER" if "NUMBER" in words else "|".join(words)
    return f"[{text}]" if "BOOL" in words else text


def _default(declared: "Field[Any]") -> str:
    default = default_of(declared)
    if isinstance(default, list):
        return " ".join(default) or "none"
    return "unset" if default is None else show(default)


def table(keys: Keys, defaults: bool) -> str:
    """Keys, values and origins, the changed ones first."""
    changed = keys.changed()
    rows = [
        (name, show(value), keys.origins.get(name, "given" if name in changed else "default"))
        for name, value in keys.to_dict().items()
    ]
    first = [row for row in rows if row[0] in changed]
    rest = [row for row in rows if row[0] not in changed] if defaults else []
    width, wide = (max((len(row[i]) for row in first + rest), default=0) for i in (0, 1))
    lines = [f"{name:<{width}}  {value:<{wide}}  {place}" for name, value, place in first + rest]
    if first and rest:
        lines.insert(len(first), "")
    return "\n".join(lines)


def as_yaml(keys: Keys) -> str:
    """Every key by sections, so that reading it gives an equal configuration."""
    lines = [f"# fastdpo {__version__}"]
    group = ""
    for name, declared in keys.key_fields().items():
        if declared.metadata["group"] != group:
            group = declared.metadata["group"]
            lines += ["", f"# {GROUPS[group]}"]
        value = None if declared.metadata["secret"] else getattr(keys, name)
        # PyYAML folds these line breaks when it writes them as they are.
        plain = not any(sign in str(value) for sign in "\x85\u2028\u2029")
        entry = yaml.safe_dump({name: value}, allow_unicode=plain, width=1000)
        lines.append(entry.rstrip("\n"))
    return "\n".join(lines) + "\n"
