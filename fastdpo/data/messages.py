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
        return f"an object with {', '.join(map(str, value)) or 'no fields'}"
    if isinstance(value, list):
        if not value:
            return "an empty list"
        if all(isinstance(item, Mapping) for item in value):
            return "a list of messages" if "role" in value[0] else "a list of objects"
        return f"a list of {len(value)} that begins with {describe(value[0])}"
    return type(value).__name__


def template_roles(template: str | Mapping[str, str] | None) -> frozenset[str]:
    """The roles that a message may have: the usual ones and each word that the template quotes."""
    if not template:
        return ROLES
    source = template if isinstance(template, str) else " ".join(template.values())
    return ROLES | frozenset(re.findall(r"""['"]([A-Za-z_][\w-]*)['"]""", source))


def check_text(value: Any, field: str, roles: Collection[str]) -> Text:
    """Return `value` unchanged where it is text or a list of messages.

    Raises:
        BadRow: naming `field` (and the message within it) and what was expected.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow(f"{field}: expected text or a list of messages, found {describe(value)}")
    if not value:
        raise BadRow(f"{field}: expected at least one message, found an empty list")
    for position, message in enumerate(value):
        _check_message(message, f"{field}[{position}]", roles)
    return value


def _check_message(message: Any, field: str, roles: Collection[str]) -> None:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role is None:
        expected = "expected a message with role and content"
        hint = ""
        if isinstance(message, Mapping) and "from" in message:
            hint = "; ShareGPT's from and value are not read"
        raise BadRow(f"{field}: {expected}, found {describe(message)}{hint}")
    if role not in roles:
        known = ", ".join(sorted(ROLES))
        raise BadRow(f"{field}.role: unknown role {role!r}; expected one of {known}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise BadRow(f"{field}.content: missing; expected text")
    # A tool's result may be an object: what a template makes of it is the template's business.
    if content is not None and not isinstance(content, str | list | Mapping):
        raise BadRow(f"{field}.content: expected text, found {describe(content)}")


def implicit_prompt_length(chosen: Text, rejected: Text) -> int:
    """How many characters or messages the prompt of a row without `prompt` has.

    The longest common prefix, less a space at its end (which belongs to the completions' first
    word), and never all of the shorter one: its last element stays its completion. TRL's
    `extract_prompt` does the same but where the first characters differ already and chosen ends
    in a space: there it takes all of chosen but that space for the prompt, and we take nothing.

    Raises:
        BadRow: where one of the two is empty.
    """
    shorter = min(len(chosen), len(rejected))
    if shorter == 0:
        empty = "chosen" if not chosen else "rejected"
        raise BadRow(f"{empty}: is empty; expected it to begin with the prompt")
    start = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if start is None:
        return shorter - 1
    return start - 1 if start > 0 and chosen[start - 1] == " " else start


def parse_tools(value: Any) -> list[Any] | None:
    """Tool definitions, given as a list or as JSON.

    Raises:
        BadRow: where they are neither.
    """
    tools = _from_json(value, "tools")
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"tools: expected a list of tool definitions, found {describe(tools)}")
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
        raise BadRow(f"chat_template_kwargs: expected an object, found {describe(kwargs)}")
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & set(kwargs)):
        raise BadRow(
            f"chat_template_kwargs: {', '.join(reserved)} cannot be set by a row; "
            "expected variables of the template"
        )
    return dict(kwargs)


def _from_json(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRow(f"{field}: expected JSON, found text that is none: {error}") from None
