"""A line of a request log as one exchange: what was asked, what was answered, and what a user said
of it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from .messages import Message, Unusable, read_answer, read_asked, read_text, read_tools, said
from .rating import read_rating

FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "input", "prompt", "conversation"),
    "system": ("system", "instructions", "system_prompt", "system_message"),
    "tools": ("tools",),
    "response": ("response", "completion", "output", "answer", "choices"),
    "rating": ("rating", "score", "stars", "feedback", "thumb", "thumbs", "reward", "vote"),
    "edited": ("edited_response", "edited", "edit", "correction", "corrected"),
    "id": ("id", "request_id", "message_id", "custom_id"),
    "conversation": ("conversation_id", "session_id", "thread_id", "chat_id"),
    "retry_of": ("retry_of", "regenerated_from", "regeneration_of", "parent_id"),
    "regenerated": ("regenerated", "is_retry", "retry"),
}
"""What a field may be called, the likeliest first."""
_REQUEST = ("request", "response", "body")
_INSIDE = (*_REQUEST, "metadata", "feedback", "annotations")
_EARLIER = ("history", "previous_response_id")


@dataclass(frozen=True)
class Exchange:
    """What a line says.

    Attributes:
        messages: what was asked, all messages before the answer.
        answer: the messages of the answer, one where it calls no tools.
        tools: definitions of those that the answer could call.
        rating: what a user gave it; 1 and 0 for thumbs up and down.
        kind: of the rating: `THUMB`, or the name of its field.
        edited: the user's better answer.
        name: of this exchange, for others to be a retry of.
        conversation: of which it is part.
        retry_of: the name of an exchange whose answer was not good enough.
        regenerated: whether it answers once more what was answered before.
    """

    messages: list[Message]
    answer: list[Message]
    tools: list[Any] | None = None
    rating: float | None = None
    kind: str = ""
    edited: list[Message] | None = None
    name: str | None = None
    conversation: str | None = None
    retry_of: str | None = None
    regenerated: bool = False

    @property
    def key(self) -> bytes:
        """Names what was asked."""
        text = json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=True)
        return xxhash.xxh3_128_digest(text.encode())


def read_exchange(line: Mapping[str, Any], names: Mapping[str, str]) -> Exchange | str:
    """The exchange of a line, or why there is none.

    Args:
        line: its object: an OpenAI-style request and response, stored or of a batch, or a flat one.
        names: what fields are called, where it is none of `FIELDS`.
    """
    if reason := _broken(line):
        return reason
    try:
        messages, answer = _asked_and_answered(line, names)
        tools = read_tools(_find(line, "tools", names, _REQUEST))
        edited = read_answer(_find(line, "edited", names))
    except Unusable as unusable:
        return str(unusable)
    given = (read_rating(name, value) for name, value in _all(line, "rating", names))
    rating, kind = next((one for one in given if one), (None, ""))
    return Exchange(
        messages,
        answer,
        tools,
        rating,
        kind,
        edited or None,
        _name(_find(line, "id", names)),
        _name(_find(line, "conversation", names)),
        _name(_find(line, "retry_of", names)),
        _find(line, "regenerated", names) in (True, 1, "true"),
    )


def _find(
    line: Mapping[str, Any],
    field: str,
    names: Mapping[str, str],
    inside: Sequence[str] = _INSIDE,
) -> Any:
    """The value of a field, by its name or by its usual ones, in the line or in its parts."""
    return next((value for _, value in _all(line, field, names, inside)), None)


def _all(
    line: Mapping[str, Any],
    field: str,
    names: Mapping[str, str],
    inside: Sequence[str] = _INSIDE,
) -> Iterator[tuple[str, Any]]:
    """All that may be the value of a field, the likeliest first, each with its name."""
    if field in names:
        yield names[field].rpartition(".")[2], at(line, names[field])
        return
    for name in FIELDS[field]:
        for inner in _parts(line, inside):
            if inner.get(name) is not None:
                yield name, inner[name]


def at(line: Mapping[str, Any], name: str) -> Any:
    """The value of this name, whose dots lead into objects; None where there is none."""
    value: Any = line
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _parts(
    line: Mapping[str, Any], inside: Sequence[str] = _INSIDE, depth: int = 0
) -> Iterator[Mapping[str, Any]]:
    yield line
    for name in inside if depth < 3 else ():
        if isinstance(line.get(name), Mapping):
            yield from _parts(line[name], inside, depth + 1)


def _broken(line: Mapping[str, Any]) -> str | None:
    """Why a line is no whole exchange, by what its request and its response say of themselves."""
    for part in _parts(line):
        status = part.get("status_code")
        if part.get("error") or (isinstance(status, int) and status >= 400):
            return "the request failed"
        choices = part.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        ends = [one.get("finish_reason") for one in (part, first) if isinstance(one, Mapping)]
        cut = "length" in ends or part.get("stop_reason") == "max_tokens"
        if cut or part.get("incomplete_details"):
            return "the answer was cut off"
    if any(part.get(name) for part in _parts(line, _REQUEST) for name in _EARLIER):
        return f"what was said before is not in its messages ({' or '.join(_EARLIER)})"
    return None


def _asked_and_answered(
    line: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[list[Message], list[Message]]:
    messages = read_asked(_find(line, "messages", names))
    if not messages:
        raise Unusable("no messages")
    answer = read_answer(_find(line, "response", names))
    if messages[-1]["role"] == "assistant":
        if answer and said(answer) != said(messages[-1:]):
            raise Unusable("its messages end with another answer")
        answer, messages = messages[-1:], messages[:-1]
    if not messages:
        raise Unusable("no messages")
    if not answer:
        raise Unusable("no answer")
    system = read_text(_find(line, "system", names, _REQUEST)).strip()
    first = messages[0]
    if system and not (first["role"] == "system" and first["content"].strip() == system):
        messages = [{"role": "system", "content": system}, *messages]
    return messages, answer


def _name(value: Any) -> str | None:
    return None if value is None or isinstance(value, list | dict | bool) else str(value)
