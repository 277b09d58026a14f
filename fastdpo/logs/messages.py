"""What was asked and what was answered, in the forms of OpenAI's interfaces, as messages that
training reads.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ..data.layouts.values import as_conversation, is_message, read_messages
from ..data.messages import CALLS, ROLES, BadRow, check_text, parse_tools

Message: TypeAlias = dict[str, Any]

_THOUGHTS = ("reasoning", "reasoning_text", "thinking", "redacted_thinking")
_KEPT = (*CALLS, "tool_call_id", "name")
_UNREADABLE = "a message that training cannot read"


class Unusable(Exception):
    """Why there is no exchange."""


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


def read_asked(value: Any) -> list[Message]:
    """Messages of a request, and a text as a user's.

    Raises:
        Unusable: one that training does not read.
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
            raise Unusable(_not_text(item) if isinstance(item, Mapping) else _UNREADABLE)
    try:
        read = read_messages(items, "messages") if items else []
    except BadRow:
        raise Unusable(_UNREADABLE) from None
    found = []
    for message in read:
        if message["role"] not in ROLES:
            raise Unusable("a message of an unknown role")
        kept = {name: message[name] for name in _KEPT if message.get(name)}
        content = read_text(message.get("content"))
        if content.strip() or kept.keys() & {*CALLS, "tool_call_id"}:
            found.append({"role": message["role"], "content": content, **kept})
        elif message["role"] not in ("system", "developer"):
            raise Unusable(empty)
    try:
        check_text(found or "", "messages", ROLES)
    except BadRow:
        raise Unusable(_UNREADABLE) from None
    return found


def read_text(content: Any) -> str:
    """The text of a content, of its parts together.

    Raises:
        Unusable: a part that is no text.
    """
    if isinstance(content, list):
        return "".join(map(read_text, content))
    if content is None or _is_thought(content):
        return ""
    if isinstance(content, Mapping) and isinstance(content.get("text"), str):
        return str(content["text"])
    if not isinstance(content, str):
        raise Unusable(_not_text(content))
    return content


def _is_thought(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _THOUGHTS


def _not_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return f"a part that is not text{f': {kind}' if isinstance(kind, str) else ''}"


def read_answer(value: Any) -> list[Message]:
    """The messages of an answer, however deep it lies: a text, parts, messages, choices, a body.

    Raises:
        Unusable: a part that is no text, or messages that are no answer of an assistant.
    """
    answer = _said_in(value)
    roles = [message["role"] for message in answer]
    if ("assistant", "assistant") in itertools.pairwise(roles):
        raise Unusable("more than one answer")
    if roles and (roles[0], roles[-1]) != ("assistant", "assistant"):
        raise Unusable("an answer that is not the assistant's")
    return answer


def _said_in(value: Any) -> list[Message]:
    if isinstance(value, Mapping):
        if is_message(value):
            return _said_in([value])
        names = ("body", "choices", "output", "message", "content", "text")
        return _said_in(next((value[name] for name in names if value.get(name) is not None), None))
    if isinstance(value, list):
        items = [item for item in value if not _is_thought(item)]
        kinds = [item.get("type") for item in items if isinstance(item, Mapping)]
        if any(map(is_message, items)) or "message" in kinds:
            return _read([_with_role(item) for item in items], "no answer")
        if kinds[:1] == [None]:  # choices: the one that was shown
            return _said_in(items[0])
        return _said_in(read_text(items))
    said = isinstance(value, str) and value.strip()
    return [{"role": "assistant", "content": value}] if said else []


def _with_role(item: Any) -> Any:
    """An item of an output, which the Responses API's messages may be without their role."""
    is_output = isinstance(item, Mapping) and item.get("type") == "message"
    return {"role": "assistant", **item} if is_output else item


def read_tools(value: Any) -> list[Any] | None:
    """Definitions of tools, those of the Responses API as chat templates expect them.

    Raises:
        Unusable: no definitions.
    """
    try:
        tools = parse_tools(value)
    except BadRow:
        raise Unusable("tools that training cannot read") from None
    made = []
    for tool in tools or ():
        if isinstance(tool, Mapping) and tool.get("type") == "function" and "function" not in tool:
            function = {name: item for name, item in tool.items() if name != "type"}
            tool = {"type": "function", "function": function}
        made.append(tool)
    return made or None
