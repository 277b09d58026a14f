"""Text and messages as they arrive from a data set, checked before a chat template sees them.

`BadRow` names the field and what was expected; the caller adds where the row came from and decides
whether to stop or to count it.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

Text: TypeAlias = str | list[dict[str, Any]]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
# Fields of a message that call tools: today's, and the one before it.
CALLS = ("tool_calls", "function_call")
# Roles of what a tool answered.
RESULT_ROLES = frozenset({"tool", "function", "ipython"})
_AS_JSON = """expected JSON such as [{"role": "user", "content": "Hi"}]"""
# What Python, NumPy and pandas print of messages, or JSON that was cut off. A text that only
# speaks of messages does not begin with one and name a known role.
_LIKE_MESSAGES = re.compile(
    r"""\s*(?:array\(\s*)?[\[(]*\s*\{\s*(['"])(?:role|content|from|value)\1\s*:"""
)
_LIKE_ROLE = re.compile(
    r"""(['"])(?:role|from)\1\s*:\s*(['"])(?:system|developer|user|assistant|tool|human|gpt)\2"""
)
# Arguments of `apply_chat_template` that decide how ids are made, not what the template sees.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "continue_final_message",
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


class BadRow(ValueError):
    """A row that cannot be trained on: the field and what was expected of it."""

    @classmethod
    def expected(cls, what: str, field: str, value: Any) -> "BadRow":
        """A field that holds something else than `what`."""
        return cls(f"{field}: expected {what}, found {describe(value)}")


def describe(value: Any) -> str:
    """What a value is, in a user's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        names = ", ".join(str(name)[:40] for name in list(value)[:8])
        return f"an object with {names or 'no fields'}"
    if isinstance(value, list):
        if not value:
            return "an empty list"
        if all(isinstance(item, Mapping) for item in value):
            return "a list of messages" if "role" in value[0] else "a list of objects"
        first = "a list" if isinstance(value[0], list) else describe(value[0])
        return f"a list of {len(value)} that begins with {first}"
    return type(value).__name__


def unreadable(value: Any) -> str | None:
    """Why a value that JSON may hold cannot be trained on; None where it can."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        return "lists or objects within each other too deep to be read"
    except UnicodeEncodeError:
        return "a text with half a surrogate pair (\\ud800 to \\udfff); expected valid Unicode"
    return None


def template_roles(template: str | Mapping[str, str] | None) -> frozenset[str]:
    """The roles that a message may have: the usual ones and each word that the template quotes."""
    if not template:
        return ROLES
    source = template if isinstance(template, str) else " ".join(template.values())
    return ROLES | frozenset(re.findall(r"""['"]([A-Za-z_][\w-]*)['"]""", source))


def written_messages(text: str) -> list[Any] | str | None:
    """The messages that a text holds as JSON.

    Returns:
        The messages; or why a text that is meant to be messages cannot be read; or None where it
        is a text like any other, JSON that is no messages included.
    """
    if text[:100].lstrip()[:1] not in ("[", "{", "a", '"'):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if _LIKE_MESSAGES.match(text) and _LIKE_ROLE.search(text):
            return (
                f"is text that begins {text.strip()[:24]!r}, messages that are no JSON; {_AS_JSON}"
            )
        return None
    if isinstance(value, str):
        return None if written_messages(value) is None else f"is JSON within JSON; {_AS_JSON}"
    if isinstance(value, Mapping) and len(value) == 1:
        inner = next(iter(value.values()))
        messages = inner if isinstance(inner, list) else []
        if messages and all(isinstance(m, Mapping) and "role" in m for m in messages):
            return f"is {describe(value)}, as JSON; {_AS_JSON}"
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, Mapping) for item in items):
        return None
    if all("role" in item for item in items) and isinstance(value, list):
        return unreadable(value) or value
    if all({"role", "content"} <= set(item) or {"from", "value"} <= set(item) for item in items):
        return f"is {describe(value)}, as JSON; {_AS_JSON}"
    return None


def check_text(value: Any, field: str, roles: Collection[str]) -> Text:
    """Return `value` where it is text or a list of messages, the parts of its contents tidied.

    Raises:
        BadRow: naming `field` (and the message within it) and what was expected.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow.expected("text or a list of messages", field, value)
    if not value:
        raise BadRow.expected("at least one message", field, value)
    return [_check_message(message, f"{field}[{i}]", roles) for i, message in enumerate(value)]


def _check_message(message: Any, field: str, roles: Collection[str]) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role is None:
        problem = BadRow.expected("a message with role and content", field, message)
        if isinstance(message, Mapping) and "from" in message:
            raise BadRow(f"{problem}; ShareGPT's from and value are not read")
        raise problem
    if not isinstance(role, str) or role not in roles:
        known = ", ".join(sorted(ROLES))
        raise BadRow(f"{field}.role: unknown role {role!r}; expected one of {known}")
    content = message.get("content")
    if _has_parts(message):
        content = _check_parts(content, f"{field}.content")
        message = {**message, "content": content or None}
    _check_calls(message, field)
    if not content and content != "" and not any(message.get(name) for name in CALLS):
        raise BadRow(f"{field}.content: missing; expected text")
    # A tool's result may be an object: what a template makes of it is the template's business.
    allowed = (str, list, Mapping) if role in RESULT_ROLES else (str, list)
    if content is not None and not isinstance(content, allowed):
        raise BadRow.expected("text", f"{field}.content", content)
    return dict(message)


def _check_calls(message: Mapping[str, Any], field: str) -> None:
    calls, call = message.get("tool_calls"), message.get("function_call")
    if calls is not None and not isinstance(calls, list):
        raise BadRow.expected("a list of calls", f"{field}.tool_calls", calls)
    listed = [(f"{field}.tool_calls[{i}]", item) for i, item in enumerate(calls or ())]
    for where, item in listed + ([] if call is None else [(f"{field}.function_call", call)]):
        function = item.get("function") or item if isinstance(item, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow.expected("a call with a function's name", where, item)


def says_something(text: Text, fields: Collection[str] = ("content",)) -> bool:
    """Whether there is more than white space in a text, or in one of these fields of messages."""
    if isinstance(text, str):
        return bool(text.strip())
    return any(str(message.get(name) or "").strip() for message in text for name in fields)


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as it is compared with others: without nulls, its parts joined to text."""
    present = {key: value for key, value in message.items() if value is not None}
    content = present.get("content")
    if isinstance(content, list) and all(map(is_text_part, content)):
        present["content"] = "".join(part["text"] for part in content)
    return present


def is_text_part(part: Any) -> bool:
    """Whether a part of a message's content is text, as in `{"type": "text", "text": "Hi"}`."""
    is_text = isinstance(part, Mapping) and part.get("type") in ("text", None)
    return is_text and isinstance(part.get("text"), str)


def _check_parts(parts: list[Any], field: str) -> list[dict[str, Any]]:
    """The parts without the nulls that a table adds for the fields of other parts."""
    checked = []
    for position, part in enumerate(parts):
        where = f"{field}[{position}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and re.search("image|video|audio|file", kind):
            raise BadRow(f"{where}: is a part of type {kind}; only text can be trained on")
        known = isinstance(kind, str) and kind != "text"
        if not isinstance(part, Mapping) or not (known or is_text_part(part)):
            raise BadRow.expected('a part such as {"type": "text", "text": "Hi"}', where, part)
        checked.append({key: value for key, value in part.items() if value is not None})
    return checked


def _has_parts(message: Mapping[str, Any]) -> bool:
    """Whether a message's content is a list of parts, and not a tool's result of its own."""
    content = message.get("content")
    if not isinstance(content, list):
        return False
    return message["role"] not in RESULT_ROLES or all(map(is_text_part, content))


def content_parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message's content; none where it is text, or a tool's result of its own."""
    return message["content"] if _has_parts(message) else []


def join_parts(message: dict[str, Any], field: str) -> dict[str, Any]:
    """The message with text for a content of parts, put together without anything between them.

    Raises:
        BadRow: a part that is not text.
    """
    parts = content_parts(message)
    for position, part in enumerate(parts):
        if not is_text_part(part):
            raise BadRow(
                f"{field}.content[{position}]: the chat template does not render a part of type "
                f"{part['type']}; expected text"
            )
    return {**message, "content": "".join(part["text"] for part in parts)} if parts else message


def parse_tools(value: Any) -> list[Any] | None:
    """Tool definitions, given as a list or as JSON.

    Raises:
        BadRow: where they are neither.
    """
    tools = _from_json(value, "tools")
    if tools is not None and not isinstance(tools, list):
        raise BadRow.expected("a list of tool definitions", "tools", tools)
    return tools


def parse_template_kwargs(value: Any) -> dict[str, Any]:
    """Further variables of the chat template, given as an object or as JSON.

    Raises:
        BadRow: where they are neither, or would change how ids are made.
    """
    kwargs = _from_json(value, "chat_template_kwargs")
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise BadRow.expected("an object", "chat_template_kwargs", kwargs)
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & set(kwargs)):
        raise BadRow(
            f"chat_template_kwargs: {', '.join(reserved)} cannot be set by a row; "
            "expected variables of the template"
        )
    return dict(kwargs)


def _from_json(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():  # what a table of text holds where there is nothing
        return None
    try:
        read = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{field}: expected JSON, found text that is none: {error}") from None
    if problem := unreadable(read):
        raise BadRow(f"{field}: {problem}")
    return read
