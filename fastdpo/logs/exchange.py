"""A line of a request log as one exchange: what was asked, what was answered, and what a user said
of it.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import xxhash

from ..data.layouts.values import as_conversation, is_message, read_messages
from ..data.messages import CALLS, ROLES, BadRow, parse_tools

Message: TypeAlias = dict[str, Any]

THUMBS = {
    **dict.fromkeys(("up", "thumbs_up", "thumbsup", "like", "liked", "good", "positive"), 1.0),
    **dict.fromkeys(("👍", "+1", "yes", "helpful", "accepted", "true"), 1.0),
    **dict.fromkeys(("down", "thumbs_down", "thumbsdown", "dislike", "disliked", "bad"), 0.0),
    **dict.fromkeys(("negative", "👎", "-1", "no", "unhelpful", "rejected", "false"), 0.0),
}
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
_THOUGHTS = ("reasoning", "reasoning_text", "thinking", "redacted_thinking")
_KEPT = ("role", *CALLS, "tool_call_id", "name")
_UNREADABLE = "a message that training cannot read"


class _Unusable(Exception):
    """Why there is no exchange."""


@dataclass(frozen=True)
class Exchange:
    """What a line says.

    Attributes:
        messages: what was asked, all messages before the answer.
        answer: the messages of the answer, one where it calls no tools.
        tools: definitions of those that the answer could call.
        rating: what a user gave it; 1 and 0 for thumbs up and down.
        thumb: whether it was a thumb.
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
    thumb: bool = False
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


def said(answer: Sequence[Message]) -> list[Any]:
    """What an answer says, without the names of its calls."""
    return [
        [
            message["role"],
            message["content"].strip(),
            [call.get("function") for call in message.get("tool_calls", ())],
            message.get("function_call"),
        ]
        for message in answer
    ]


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
        tools = _tools(_find(line, "tools", names, _REQUEST))
        edited = _answer(_find(line, "edited", names))
    except _Unusable as unusable:
        return str(unusable)
    rating, thumb = _rating(_find(line, "rating", names))
    return Exchange(
        messages,
        answer,
        tools,
        rating,
        thumb,
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
    if field in names:
        value: Any = line
        for part in names[field].split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value
    for name in FIELDS[field]:
        for inner in _parts(line, inside):
            if inner.get(name) is not None:
                return inner[name]
    return None


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
    messages = _messages(_find(line, "messages", names))
    if not messages:
        raise _Unusable("no messages")
    answer = _answer(_find(line, "response", names))
    if messages[-1]["role"] == "assistant":
        if answer and said(answer) != said(messages[-1:]):
            raise _Unusable("its messages end with another answer")
        answer, messages = messages[-1:], messages[:-1]
    if not messages:
        raise _Unusable("no messages")
    roles = [message["role"] for message in answer]
    if ("assistant", "assistant") in itertools.pairwise(roles):
        raise _Unusable("more than one answer")
    if not answer or {roles[0], roles[-1]} != {"assistant"}:
        raise _Unusable("no answer")
    system = _text(_find(line, "system", names, _REQUEST)).strip()
    first = messages[0]
    if system and not (first["role"] == "system" and first["content"].strip() == system):
        messages = [{"role": "system", "content": system}, *messages]
    return messages, answer


def _messages(value: Any) -> list[Message]:
    """Messages of a request, and a text as a user's.

    Raises:
        _Unusable: one that training does not read.
    """
    value = as_conversation(value) or value
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value.strip() else []
    if not isinstance(value, list):
        return []
    return _read([item for item in value if not _is_thought(item)])


def _read(items: list[Any], empty: str = "an empty message") -> list[Message]:
    for item in items:
        if not is_message(item):
            raise _Unusable(_not_text(item) if isinstance(item, Mapping) else _UNREADABLE)
    try:
        read = read_messages(items, "messages") if items else []
    except BadRow:
        raise _Unusable(_UNREADABLE) from None
    found = []
    for message in read:
        if message["role"] not in ROLES:
            raise _Unusable("a message of an unknown role")
        kept = {name: message[name] for name in _KEPT if message.get(name)}
        content = _text(message.get("content"))
        if content.strip() or kept.keys() & {*CALLS, "tool_call_id"}:
            found.append({**kept, "content": content})
        elif message["role"] not in ("system", "developer"):
            raise _Unusable(empty)
    return found


def _text(content: Any) -> str:
    """The text of a content, of its parts together.

    Raises:
        _Unusable: a part that is no text.
    """
    if isinstance(content, list):
        return "".join(map(_text, content))
    if content is None or _is_thought(content):
        return ""
    if isinstance(content, Mapping) and isinstance(content.get("text"), str):
        return str(content["text"])
    if not isinstance(content, str):
        raise _Unusable(_not_text(content))
    return content


def _is_thought(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _THOUGHTS


def _not_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return f"a part that is not text{f': {kind}' if isinstance(kind, str) else ''}"


def _answer(value: Any) -> list[Message]:
    """The messages of an answer, however deep it lies: a text, parts, messages, choices, a body.

    Raises:
        _Unusable: a part that is no text.
    """
    if isinstance(value, Mapping):
        if is_message(value):
            return _answer([value])
        names = ("body", "choices", "output", "message", "content", "text")
        return _answer(next((value[name] for name in names if value.get(name) is not None), None))
    if isinstance(value, list):
        items = [item for item in value if not _is_thought(item)]
        kinds = [item.get("type") for item in items if isinstance(item, Mapping)]
        if any(map(is_message, items)) or "message" in kinds:
            return _read([_with_role(item) for item in items], "no answer")
        if kinds[:1] == [None]:  # choices: the one that was shown
            return _answer(items[0])
        return _answer(_text(items))
    said = isinstance(value, str) and value.strip()
    return [{"role": "assistant", "content": value}] if said else []


def _with_role(item: Any) -> Any:
    """An item of an output, which the Responses API's messages may be without their role."""
    is_output = isinstance(item, Mapping) and item.get("type") == "message"
    return {"role": "assistant", **item} if is_output else item


def _tools(value: Any) -> list[Any] | None:
    """Definitions of tools, those of the Responses API as chat templates expect them.

    Raises:
        _Unusable: no definitions.
    """
    try:
        tools = parse_tools(value)
    except BadRow:
        raise _Unusable("tools that training cannot read") from None
    made = []
    for tool in tools or ():
        if isinstance(tool, Mapping) and tool.get("type") == "function" and "function" not in tool:
            function = {name: item for name, item in tool.items() if name != "type"}
            tool = {"type": "function", "function": function}
        made.append(tool)
    return made or None


def _rating(value: Any) -> tuple[float | None, bool]:
    if isinstance(value, Mapping):
        known = ("rating", "score", "value", "thumb", "thumbs", "stars", "vote", "label")
        return next((_rating(value[n]) for n in known if value.get(n) is not None), (None, False))
    if isinstance(value, bool):
        return float(value), True
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value), False
    if isinstance(value, str):
        word = (
            value.strip().lower().replace(" ", "_").replace("-up", "_up").replace("-down", "_down")
        )
        if word in THUMBS:
            return THUMBS[word], True
        try:
            return (number, False) if math.isfinite(number := float(word)) else (None, False)
        except ValueError:
            return None, False
    return None, False


def _name(value: Any) -> str | None:
    return None if value is None or isinstance(value, list | dict | bool) else str(value)
