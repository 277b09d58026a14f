"""Messages and answers as they stand in data sets, made into messages with role and content.

Read are OpenAI's messages, ShareGPT's with from and value, one message in place of a list, a text
in place of an answer, and each of them written as JSON. What the messages then hold is checked
with every other row, by `fastdpo.data.messages`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ..messages import ROLES, BadRow

Message: TypeAlias = dict[str, Any]

ASKING = ("system", "developer", "user")
"""Roles of what stands before an answer."""
_CALLS = "calls"
SPEAKERS: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": _CALLS,
    "tool_call": _CALLS,
}
"""ShareGPT's names of who speaks, with the roles that they are."""


class PlainText(str):
    """A text that is no JSON, whatever it looks like."""


def parsed(value: Any) -> Any:
    """What a text of JSON holds, where that is a list or an object; any other value as it is."""
    if (
        not isinstance(value, str)
        or isinstance(value, PlainText)
        or value[:100].lstrip()[:1] not in ("[", "{")
    ):
        return value
    try:
        held = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return held if isinstance(held, list | Mapping) else value


def is_message(value: Any) -> bool:
    """Whether a value is one message, of OpenAI's form or of ShareGPT's."""
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(value.get(name), str) for name in ("role", "from"))


def as_conversation(value: Any) -> list[Any] | None:
    """The list of messages that a value is, or is as JSON; None where it is anything else."""
    value = parsed(value)
    if isinstance(value, list) and value and all(map(is_message, value)):
        return value
    return None


def is_blank(value: Any) -> bool:
    """Whether a value is null, or a text, a list or an object with nothing in it."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | Mapping) and not value)


def read_text(value: Any, field: str) -> str:
    """A text that says something.

    Raises:
        BadRow: any other value.
    """
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, str):
        raise BadRow(f"{field}: is empty; expected text")
    raise BadRow.expected("text", field, value)


def read_messages(value: Any, field: str) -> list[Message]:
    """One message or a list of them, with role and content.

    Raises:
        BadRow: naming the message and what was expected.
    """
    value = parsed(value)
    if is_message(value):
        return [_read_message(value, field)]
    if not isinstance(value, list):
        raise BadRow.expected("a list of messages", field, value)
    if not value:
        raise BadRow.expected("at least one message", field, value)
    return [_read_message(item, f"{field}[{i}]") for i, item in enumerate(value)]


def read_answer(value: Any, field: str) -> list[Message]:
    """An answer as messages: a text is the assistant's.

    Raises:
        BadRow: neither text nor messages.
    """
    held = parsed(value)
    if is_message(held) or as_conversation(held):
        return read_messages(held, field)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(held, list) and any(map(is_message, held)):
        return read_messages(held, field)
    raise BadRow.expected("an answer: text, a message or a list of messages", field, value)


def _read_message(value: Any, field: str) -> Message:
    if not is_message(value):
        what = "a message with role and content, or with from and value"
        raise BadRow.expected(what, field, value)
    present = {key: item for key, item in value.items() if item is not None}
    if "role" not in present:
        return _of_sharegpt(present, field)
    if present["role"] not in ROLES:
        role = SPEAKERS.get(present["role"].lower(), present["role"])
        present["role"] = "assistant" if role == _CALLS else role
    if "content" not in present and "value" in present:
        present["content"] = present.pop("value")
    if isinstance(present.get("content"), list):
        present["content"] = [_with_text(part) for part in present["content"]]
    return with_objects(present, field)


def _with_text(part: Any) -> Any:
    """A part of text whose text stands in `value`, as in LLaMA-Factory's v1 sets."""
    if not isinstance(part, Mapping) or part.get("type") != "text" or part.get("text") is not None:
        return part
    return {"type": "text", "text": part.get("value")}


def _of_sharegpt(message: Mapping[str, Any], field: str) -> Message:
    role = SPEAKERS.get(message["from"].lower())
    if role is None:
        known = ", ".join(SPEAKERS)
        raise BadRow(f"{field}.from: unknown speaker {message['from']!r}; expected one of {known}")
    said = message.get("value", message.get("content"))
    if said is None:
        raise BadRow(f"{field}.value: missing; expected text")
    if role == _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(said, f"{field}.value")}
    return {"role": role, "content": said}


def _calls(value: Any, field: str) -> list[Message]:
    """The calls of a ShareGPT function_call: one object with name and arguments, or a list."""
    held = parsed(value)
    calls = [held] if isinstance(held, Mapping) else held
    named = isinstance(calls, list) and all(
        isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls
    )
    if not calls or not named:
        raise BadRow.expected('JSON such as {"name": "f", "arguments": {}}', field, value)
    message = {"tool_calls": [{"type": "function", "function": dict(call)} for call in calls]}
    made: list[Message] = with_objects(message, field)["tool_calls"]
    return made


def with_objects(message: Mapping[str, Any], field: str) -> Message:
    """A message whose calls have an object of arguments where OpenAI's form has JSON in a text:
    chat templates write them as JSON themselves.

    Raises:
        BadRow: a text of arguments that is no JSON of an object.
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    made = [_with_object(call, f"{field}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return {**message, "tool_calls": made}


def _with_object(call: Any, field: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    call = {key: item for key, item in call.items() if item is not None}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    held = parsed(arguments) if arguments.strip() else {}
    if not isinstance(held, Mapping):
        where = f"{field}.function.arguments"
        raise BadRow.expected("JSON of an object", where, arguments)
    return {**call, "function": {**function, "arguments": held}}


def has_text_arguments(messages: Any) -> bool:
    """Whether a message of a list calls a tool with its arguments as text."""
    calls = [
        call
        for message in messages or ()
        if isinstance(message, Mapping)
        for call in message.get("tool_calls") or ()
    ]
    functions = [call.get("function") for call in calls if isinstance(call, Mapping)]
    return any(isinstance(f, Mapping) and isinstance(f.get("arguments"), str) for f in functions)


def read_transcript(value: Any, field: str) -> list[Message]:
    """The messages of a transcript in Anthropic's form, "\\n\\nHuman: ...\\n\\nAssistant: ...".
    It may begin with "System:", which means nothing further on.

    Raises:
        BadRow: a text that does not begin so.
    """
    text = read_text(value, field)
    marks = {"Human:": "user", "Assistant:": "assistant", "System:": "system"}
    messages: list[Message] = []
    for part in re.split(r"\r?\n\r?\n", text.lstrip()):
        mark = next((mark for mark in marks if part.startswith(mark)), None)
        if mark is not None and (mark != "System:" or not messages):
            messages.append({"role": marks[mark], "content": part.removeprefix(mark)})
        elif messages:
            messages[-1]["content"] += f"\n\n{part}"
        elif part.strip():
            raise BadRow(f"{field}: does not begin with 'Human:'; expected such a transcript")
    return [{**message, "content": message["content"].strip()} for message in messages]


def begins_with(talk: Sequence[Message], start: Sequence[Message]) -> bool:
    """Whether a conversation begins with these messages, white space around texts aside."""
    return len(talk) >= len(start) and all(
        same_message(a, b) for a, b in zip(talk, start, strict=False)
    )


def same_message(one: Message, other: Message) -> bool:
    """Whether two messages are of one role and say the same, white space around texts aside."""

    def bare(message: Message) -> Any:
        content = message.get("content")
        return content.strip() if isinstance(content, str) else content

    return one["role"] == other["role"] and bare(one) == bare(other)
