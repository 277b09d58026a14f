"""Which columns of a data set are read, and which others may hold a part of the prompt.

A column that nobody reads is harmless where it says how a row was made, and changes what is trained
where it holds the question: without `prompt`, the rest of such a row still makes a pair. Names
alone cannot tell, so a column whose name speaks of a prompt is compared with what the row trains
on: text that is there in another place (`messages` beside `prompt`) is not missed.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import datasets

from ..errors import DataError
from .messages import Text, written_messages

RowKind: TypeAlias = Literal["pair", "group", "label"]

# What goes to the chat template beside the prompt.
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")
# Every column that is read as it stands.
FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "responses",
    "comparisons",
    "scores",
    "rankings",
    "logps",
    "completion",
    "label",
    *TEMPLATE_FIELDS,
)
# Those of them that hold text where they hold no messages.
TEXT_FIELDS = ("prompt", "chosen", "rejected", "completion")
# Where the responses of each layout stand.
RESPONSES: Mapping[RowKind, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"),
    "group": ("responses",),
    "label": ("completion",),
}
# What a group says of its responses, each column being enough.
PREFERENCES = ("comparisons", "scores", "rankings")
# Columns of what cannot be trained on.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Columns of our own readers: the line a row began on, and why it could not be read.
LINE_COLUMN = "fastdpo_line"
PROBLEM_COLUMN = "fastdpo_problem"
# Of a conversion: the index of the row that a row was made of.
ROW_COLUMN = "fastdpo_row"

_OWN = (*FIELDS, LINE_COLUMN, PROBLEM_COLUMN)
_EXPECTED_COLUMNS = (
    "prompt, chosen, rejected; or chosen, rejected; or prompt, responses and comparisons, scores "
    "or rankings; or prompt, completion, label"
)
_PROMPT_WORD = re.compile(
    "contexts?|conversations?|dialog(ue)?s?|history|inputs?|instructions?|messages?|passage|problem|"
    "prompts?|query|queries|questions?|system|trajectory|turns"
)
_PROMPT_NAMES = frozenset({"document", "human", "post", "user"})
# With one of these words a column says something about the row: prompt_id, input_tokens.
_METADATA_WORD = re.compile(
    "annotat(ions?|or)|categor(y|ies)|count|critique|dataset|date|difficulty|embeddings?|feedback|"
    "fingerprint|format|generations?|hash|id[sx]?|index|intent|judge|labell?ing|labels?|"
    "lang(uage)?|len(gth)?|license|logps?|margin|meta(data)?|models?|names?|num(ber)?|origin|"
    "quality|rank|ratings?|rationale|reason|revision|safety|scores?|sources?|split|status|subset|"
    "tags?|task|template|time(stamp)?|tokens?|topic|type|url|version"
)


def row_kinds(columns: Collection[str]) -> tuple[RowKind, ...]:
    """The layouts that these columns hold, a pair before the others."""
    names = set(columns)
    held: dict[RowKind, bool] = {
        "pair": {"chosen", "rejected"} <= names,
        "group": {"prompt", "responses"} <= names and not names.isdisjoint(PREFERENCES),
        "label": {"prompt", "completion", "label"} <= names,
    }
    return tuple(kind for kind, holds in held.items() if holds)


def row_kind(columns: Collection[str], where: str) -> RowKind:
    """The layout that these columns hold; a pair where they hold more than one.

    Raises:
        DataError: where columns are missing, or named almost as one that is read, naming those
            found and those expected.
    """
    names = set(columns)
    if names & {"image", "images"}:
        raise DataError(f"{where}: has a column of images; only text can be trained on")
    kinds = row_kinds(names)
    if not kinds:
        found = ", ".join(sorted(names - {LINE_COLUMN, PROBLEM_COLUMN})) or "none"
        near = [f"{name!r} for {field}" for field, name in _misspelt(names, FIELDS)]
        hint = f" (is {', '.join(near)}?)" if near else ""
        raise DataError(
            f"{where}: missing columns: found {found}{hint}; expected {_EXPECTED_COLUMNS}"
        )
    optional = ("prompt", "tools", "chat_template_kwargs")
    for field, name in _misspelt(names, (*optional, "logps") if kinds[0] == "group" else optional):
        raise DataError(
            f"{where}: column {name!r} is not read; expected {field!r}, so rename it, or remove it"
        )
    return kinds[0]


def _misspelt(names: set[str], fields: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Fields that are missing where another column is named almost as they are."""
    others = sorted(names - set(_OWN))
    for field in fields:
        if field in names:
            continue
        same = [name for name in others if _letters(name) == _letters(field)]
        near = difflib.get_close_matches(field, map(str.lower, others), n=1, cutoff=0.85)
        if same or near:
            yield field, (same or [name for name in others if name.lower() == near[0]])[0]


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def _words(name: str) -> set[str]:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return set(re.findall(r"[a-z]+", apart.lower()))


def is_metadata(name: str) -> bool:
    """Whether a column is one of ours, or by its name says how a row was made."""
    return name.startswith(("fastdpo_", "__")) or any(map(_METADATA_WORD.fullmatch, _words(name)))


def may_hold_prompt(name: str) -> bool:
    """Whether a column that is not read speaks, by its name, of a prompt or a part of one."""
    if name in _OWN or is_metadata(name):
        return False
    known = any(map(_PROMPT_WORD.fullmatch, _words(name)))
    return known or name.strip().lower() in _PROMPT_NAMES


def other_texts(dataset: datasets.Dataset) -> list[str]:
    """Columns that are not read and may hold text of their own: no numbers, nothing on the row."""
    return [
        name
        for name, feature in dataset.features.items()
        if name not in _OWN and not is_metadata(name) and not _is_numbers(feature)
    ]


def _is_numbers(feature: Any) -> bool:
    while isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and "string" not in feature.dtype


def speaks_of_system(name: str) -> bool:
    """Whether a column is, by its name, a system prompt."""
    return "system" in _words(name)


def unread_columns(
    row: Mapping[str, Any], names: Sequence[str], prompt: Text, responses: Sequence[Text]
) -> list[str]:
    """Which of these columns of a row hold text that is neither in its prompt nor in a response.

    Differences in white space do not count, nor do an assistant's messages.
    """
    held = "".join("".join(text.split()) for text in _texts([prompt, *responses], all_roles=True))
    return [
        name
        for name in names
        if any("".join(text.split()) not in held for text in _texts(row.get(name)))
    ]


def _texts(value: Any, *, all_roles: bool = False) -> Iterator[str]:
    """The texts within a value: those of a conversation's prompting side, or of all its sides."""
    if isinstance(value, str):
        messages = written_messages(value)
        if isinstance(messages, list):
            yield from _texts(messages, all_roles=all_roles)
        else:
            yield value
    elif isinstance(value, Mapping):
        role = value.get("role") or value.get("from")
        if all_roles or role is None or role in ("system", "developer", "user", "human"):
            said = [value.get(key) for key in ("content", "value") if value.get(key) is not None]
            rest = [
                item
                for key, item in value.items()
                if isinstance(key, str) and (key == "text" or _PROMPT_WORD.fullmatch(key))
            ]
            yield from _texts(said or rest, all_roles=all_roles)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, all_roles=all_roles)
