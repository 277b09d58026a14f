"""What the detection of several layouts looks for."""

from collections.abc import Mapping
from typing import Any

from ..columns import TEMPLATE_FIELDS
from .sample import Sample
from .values import ASKING, as_conversation, is_message, parsed

SYSTEM = ("system", "system_prompt", "system_message")
USER = ("instruction", "question", "query", "input", "user_prompt", "user_input")
TALK = ("messages", "conversations", "conversation")
RESPONSES = (("chosen", "rejected"), ("chosen_response", "rejected_response"))


def with_shared(sample: Sample, names: Mapping[str, str | None]) -> dict[str, str]:
    """The parts that there are, with those that any layout may have: `system`, `tools`, ..., and
    the input and the history beside what a user asks.
    """
    parts = {part: name for part, name in names.items() if name is not None}
    more = {"instruction": ("input", "history"), None: ()}.get(parts.get("user"), ("history",))
    optional = {"system": sample.first_filled(*SYSTEM)}
    optional |= {name: name if sample.filled(name) else None for name in more}
    optional |= {name: name if name in sample.names else None for name in TEMPLATE_FIELDS}
    return {part: name for part, name in optional.items() if name is not None} | parts


def is_answer(value: Any) -> bool:
    """Whether a value is one answer: a text, a message, or messages that the assistant begins."""
    held = parsed(value)
    if is_message(held):
        return True
    talk = as_conversation(held)
    return isinstance(value, str) if talk is None else not asks(talk)


def asks(talk: Any) -> bool:
    """Whether a conversation begins with what comes before an answer."""
    first = talk[0].get("role") or talk[0].get("from")
    return first in (*ASKING, "human")


def sides_of(sample: Sample) -> tuple[str, str] | None:
    return next((two for two in RESPONSES if set(two) <= sample.names), None)


def is_transcript(value: Any) -> bool:
    return (
        isinstance(value, str)
        and value.lstrip().startswith("Human:")
        and ("\n\nAssistant:" in value)
    )
