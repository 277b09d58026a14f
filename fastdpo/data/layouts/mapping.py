"""The key `columns`: which column, or which place in one, holds each field."""

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import DataError
from ..columns import may_hold_prompt
from ..messages import BadRow
from .asking import Names, Raw, answers_after, read_history, with_system
from .layout import Reading
from .sample import Sample
from .values import as_conversation, is_blank, is_message, parsed, read_messages, read_text
from .verdicts import thumb

Fields = dict[str, Any]

_PLAIN = ("scores", "rankings", "comparisons", "logps", "tools", "chat_template_kwargs")
_ANSWERS = ("chosen", "rejected", "completion")
# Which field a column may be, by words that its name may have; the first field that fits takes it.
_WORDS = {
    "prompt": "prompt question query instruction input ask asked problem task user context text",
    "rejected": "rejected bad worse worst dispreferred loser lose lost negative neg wrong "
    "incorrect unchosen refused disliked y_l",
    "chosen": "chosen good better best preferred winner win won positive pos right correct "
    "accepted selected liked y_w",
}


def mapped(columns: Mapping[str, Any], sample: Sample, where: str) -> Reading:
    """The reading that the key `columns` asks for.

    Raises:
        DataError: a column that is not there, or fields that make no row.
    """
    for field, path in columns.items():
        for one in path if isinstance(path, list) else [path]:
            if _root(str(one), sample.names) is None:
                found = ", ".join(sorted(sample.names)) or "none"
                raise DataError(
                    f"{where}: columns: {field}: no column {str(one)!r}; expected one of {found}"
                )
    held = set(columns) - {"system", "history", "instruction"}
    asked = bool({"prompt", "instruction"} & set(columns))
    complete = {"chosen", "rejected"} <= held
    complete |= asked and {"completion", "label"} <= held
    complete |= asked and "responses" in held and bool({"scores", "rankings", "comparisons"} & held)
    if not complete:
        raise DataError(
            f"{where}: columns: names {', '.join(columns)}; expected prompt (or instruction, for a "
            "user's message) with chosen and rejected, with responses and scores, rankings or "
            "comparisons, or with completion and label"
        )
    return Reading("columns", dict(columns), by_columns, _unread(columns, sample))


def _unread(columns: Mapping[str, Any], sample: Sample) -> str:
    """What is to be said of columns that the key leaves out and that may hold a prompt."""
    paths = [
        one for path in columns.values() for one in (path if isinstance(path, list) else [path])
    ]
    read = {_root(str(path), sample.names) for path in paths}
    others = [n for n in sorted(sample.names - read) if may_hold_prompt(n) and sample.filled(n)]
    return f"{', '.join(others)} may hold a part of the prompt and are not read" if others else ""


def by_columns(raw: Raw, names: Names) -> Fields:
    """The fields of a row from the columns that the key names."""
    fields = {
        field: [look_up(raw, one) for one in path] if isinstance(path, list) else look_up(raw, path)
        for field, path in names.items()
    }
    made = {name: fields[name] for name in _PLAIN if name in fields}
    if "label" in fields:
        made["label"] = thumb(fields["label"], str(names["label"]))
    prompt = _prompt(fields, names)
    if prompt is not None:
        made["prompt"] = prompt
    for field, value in _answers(fields, names).items():
        made[field] = _as_answer(value, str(names.get(field)), isinstance(prompt, list))
    if "responses" in fields:
        made["responses"] = _responses(fields["responses"], names, isinstance(prompt, list))
    return made


def _answers(fields: Fields, names: Names) -> Fields:
    return {name: fields[name] for name in _ANSWERS if name in names}


def _responses(listed: Any, names: Names, chat: bool) -> list[Any]:
    listed = parsed(listed)
    if not isinstance(listed, list) or not listed:
        raise BadRow.expected("a list of answers", str(names["responses"]), listed)
    return [_as_answer(value, f"{names['responses']}[{i}]", chat) for i, value in enumerate(listed)]


def _as_answer(value: Any, field: str, chat: bool) -> Any:
    if value is None:
        raise BadRow(f"{field}: missing; expected text or messages")
    if chat:
        (made,) = (
            answers_after([], {field: value}, "the prompt")
            if not _talk(value)
            else (read_messages(value, field),)
        )
        return made
    return read_messages(value, field) if _talk(value) else value


def _talk(value: Any) -> bool:
    return is_message(parsed(value)) or as_conversation(value) is not None


def _prompt(fields: Fields, names: Names) -> Any:
    """Text where `prompt` alone is given and is text; messages in every other case."""
    if "prompt" not in fields and "instruction" not in fields:
        return None
    source = "instruction" if "instruction" in fields else "prompt"
    value, field = fields[source], str(names[source])
    chat = source == "instruction" or not all(
        is_blank(fields.get(part)) for part in ("system", "history")
    )
    if _talk(value):
        turns = read_messages(value, field)
    elif chat:
        turns = [{"role": "user", "content": read_text(value, field)}]
    else:
        return value
    parts: dict[str, str] = {p: p for p in ("system", "history") if p in fields}
    return with_system(fields, parts, read_history(fields, parts) + turns)


def look_up(value: Any, path: Any) -> Any:
    """What stands at a place such as `answers.0.text`; `*` stands for every item of a list.

    Raises:
        BadRow: a place that the row has not.
    """
    path = str(path)
    root = _root(path, value)
    if root is None:
        raise BadRow(f"{path}: missing")
    held = value[root]
    rest = path[len(root) + 1 :]
    return _descend(held, rest.split("."), path) if rest else held


def _descend(value: Any, steps: list[str], path: str) -> Any:
    for i, step in enumerate(steps):
        value = parsed(value)
        if step == "*" and isinstance(value, list):
            return [_descend(item, steps[i + 1 :], path) for item in value]
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.lstrip("-").isdigit():
            if not -len(value) <= int(step) < len(value):
                raise BadRow(f"{path}: missing: the list has {len(value)} items")
            value = value[int(step)]
        else:
            raise BadRow(f"{path}: missing")
    return value


def _root(path: str, names: Iterable[str]) -> str | None:
    """The column that a path begins with: the longest name, since a name may have dots."""
    fitting = [name for name in names if path == name or path.startswith(f"{name}.")]
    return max(fitting, key=len, default=None)


def suggested(sample: Sample) -> str:
    """The mapping to write for columns that are no layout, with the columns that look nearest."""
    texts = [name for name in sample.dataset.column_names if _may_be_text(sample.value(name))]
    chosen: dict[str, str] = {}
    for field, words in _WORDS.items():
        scores = {
            name: sum(word in _parts(name) for word in words.split())
            for name in texts
            if name not in chosen.values()
        }
        best = max(scores, key=scores.__getitem__, default=None)
        if best is not None and scores[best]:
            chosen[field] = best
    rest = [name for name in texts if name not in chosen.values()]
    named = {
        field: chosen.get(field) or (rest.pop(0) if rest else "...")
        for field in ("prompt", "chosen", "rejected")
    }
    listed = ", ".join(f"{field}: {_quoted(name)}" for field, name in named.items())
    return f"columns: {{{listed}}}"


def _may_be_text(value: Any) -> bool:
    return isinstance(value, str | list | Mapping)


def _parts(name: str) -> set[str]:
    lower = name.lower()
    return {lower, *lower.replace("-", "_").replace(" ", "_").split("_")}


def _quoted(name: str) -> str:
    plain = name.replace("_", "a").replace("-", "a").replace(".", "a")
    return name if plain.isalnum() else f'"{name}"'
