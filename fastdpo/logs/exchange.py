"""A line of a request log as one exchange: what was asked, what was answered, and what a user said
of it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

THUMBS = {
    **dict.fromkeys(("up", "thumbs_up", "thumbsup", "like", "liked", "good", "positive"), 1.0),
    **dict.fromkeys(("👍", "+1", "yes", "helpful", "accepted", "true"), 1.0),
    **dict.fromkeys(("down", "thumbs_down", "thumbsdown", "dislike", "disliked", "bad"), 0.0),
    **dict.fromkeys(("negative", "👎", "-1", "no", "unhelpful", "rejected", "false"), 0.0),
}
FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "input", "prompt", "conversation"),
    "response": ("response", "completion", "output", "answer", "choices"),
    "rating": ("rating", "score", "stars", "feedback", "thumb", "thumbs", "reward", "vote"),
    "edited": ("edited_response", "edited", "edit", "correction", "corrected"),
    "id": ("id", "request_id", "message_id", "custom_id"),
    "conversation": ("conversation_id", "session_id", "thread_id", "chat_id"),
    "retry_of": ("retry_of", "regenerated_from", "regeneration_of", "parent_id"),
    "regenerated": ("regenerated", "is_retry", "retry"),
}
"""What a field may be called, the likeliest first."""
_INSIDE = ("request", "response", "body", "metadata", "feedback", "annotations")


@dataclass(frozen=True)
class Exchange:
    """What a line says.

    Attributes:
        messages: what was asked, all messages before the answer.
        answer: the answer's text.
        rating: what a user gave it; 1 and 0 for thumbs up and down.
        thumb: whether it was a thumb.
        edited: the user's better answer.
        name: of this exchange, for others to be a retry of.
        conversation: of which it is part.
        retry_of: the name of an exchange whose answer was not good enough.
        regenerated: whether it answers once more what was answered before.
    """

    messages: list[dict[str, Any]]
    answer: str
    rating: float | None = None
    thumb: bool = False
    edited: str | None = None
    name: str | None = None
    conversation: str | None = None
    retry_of: str | None = None
    regenerated: bool = False

    @property
    def key(self) -> bytes:
        """Names what was asked."""
        text = json.dumps(self.messages, sort_keys=True, ensure_ascii=True)
        return xxhash.xxh3_128_digest(text.encode())


def read_exchange(line: Mapping[str, Any], names: Mapping[str, str]) -> Exchange | str:
    """The exchange of a line, or why there is none.

    Args:
        line: its object: an OpenAI-style request and response, stored or of a batch, or a flat one.
        names: what fields are called, where it is none of `FIELDS`.
    """
    if _failed(line):
        return "the request failed"
    messages = _messages(_find(line, "messages", names))
    answer = _answer(_find(line, "response", names))
    if messages is None:
        return "no messages"
    if answer is None and messages[-1]["role"] == "assistant":
        answer, messages = _answer(messages[-1]["content"]), messages[:-1]
    if not messages:
        return "no messages"
    if not answer:
        return "no answer of text"
    rating, thumb = _rating(_find(line, "rating", names))
    return Exchange(
        messages,
        answer,
        rating,
        thumb,
        _answer(_find(line, "edited", names)),
        _name(_find(line, "id", names)),
        _name(_find(line, "conversation", names)),
        _name(_find(line, "retry_of", names)),
        _find(line, "regenerated", names) in (True, 1, "true"),
    )


def _find(line: Mapping[str, Any], field: str, names: Mapping[str, str]) -> Any:
    """The value of a field, by its name or by its usual ones, in the line or in its parts."""
    if field in names:
        value: Any = line
        for part in names[field].split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value
    for name in FIELDS[field]:
        for inner in _parts(line):
            if inner.get(name) is not None:
                return inner[name]
    return None


def _parts(line: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    yield line
    for name in _INSIDE if depth < 3 else ():
        if isinstance(line.get(name), Mapping):
            yield from _parts(line[name], depth + 1)


def _failed(line: Mapping[str, Any]) -> bool:
    for part in _parts(line):
        status = part.get("status_code")
        if part.get("error") or (isinstance(status, int) and status >= 400):
            return True
    return False


def _messages(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    found = []
    for message in value:
        text = _answer(message.get("content")) if isinstance(message, Mapping) else None
        if text is None or not isinstance(message.get("role"), str):
            return None
        found.append({"role": message["role"], "content": text})
    return found


def _answer(value: Any) -> str | None:
    """The text of an answer, however deep it lies: a text, parts, a message, choices, a body."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, Mapping):
        for name in ("body", "choices", "output", "message", "content", "text"):
            if value.get(name) is not None:
                return _answer(value[name])
        return None
    if isinstance(value, list) and value:
        parts = [_answer(part) for part in value]
        if any(isinstance(part, Mapping) and "message" in part for part in value):
            return parts[0]  # choices: the one that was shown
        texts = [part for part in parts if part]
        return "".join(texts) or None
    return None


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
