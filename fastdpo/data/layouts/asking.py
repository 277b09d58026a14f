"""What stands before the answers of a row, as messages: instructions, histories, conversations."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from ..columns import TEMPLATE_FIELDS
from ..messages import BadRow
from .values import (
    ASKING,
    Message,
    as_conversation,
    begins_with,
    is_blank,
    parsed,
    read_answer,
    read_messages,
    read_text,
    same_message,
)

Raw: TypeAlias = Mapping[str, Any]
Names: TypeAlias = Mapping[str, str]
"""The column of each part of a row: of `talk`, `user`, `input`, `history`, `system` and so on."""


def read_asked(raw: Raw, names: Names) -> list[Message]:
    """The messages before the answers: system, history and what the user asks.

    Raises:
        BadRow: naming the column and what was expected.
    """
    if "talk" in names:
        turns = read_messages(raw.get(names["talk"]), names["talk"])
    else:
        turns = read_history(raw, names) + read_question(raw, names)
    return with_system(raw, names, turns)


def read_question(raw: Raw, names: Names) -> list[Message]:
    """What the user asks, an instruction with its input below it; messages as they are."""
    value = raw.get(names["user"])
    if (talk := as_conversation(value)) is not None:
        return read_messages(talk, names["user"])
    added = raw.get(names["input"]) if "input" in names else None
    if is_blank(value) and not is_blank(added):
        return [{"role": "user", "content": read_text(added, names["input"])}]
    text = read_text(value, names["user"])
    if not is_blank(added):
        text = f"{text}\n{read_text(added, names['input'])}"
    return [{"role": "user", "content": text}]


def read_history(raw: Raw, names: Names) -> list[Message]:
    """The turns before: messages, or pairs of what was asked and what was answered."""
    value = parsed(raw.get(names["history"])) if "history" in names else None
    if is_blank(value):
        return []
    if (talk := as_conversation(value)) is not None:
        return read_messages(talk, names["history"])
    expected = "pairs such as [[question, answer]]"
    if not isinstance(value, list):
        raise BadRow.expected(expected, names["history"], value)
    turns = []
    for i, pair in enumerate(value):
        field = f"{names['history']}[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow.expected("a pair such as [question, answer]", field, pair)
        turns += [
            {"role": "user", "content": read_text(pair[0], f"{field}[0]")},
            {"role": "assistant", "content": read_text(pair[1], f"{field}[1]")},
        ]
    return turns


def with_system(raw: Raw, names: Names, turns: list[Message]) -> list[Message]:
    """The messages after the row's system prompt, which they may begin with themselves."""
    value = raw.get(names["system"]) if "system" in names else None
    if is_blank(value):
        return turns
    system = {"role": "system", "content": read_text(value, names["system"])}
    if not turns or turns[0]["role"] not in ("system", "developer"):
        return [system, *turns]
    if same_message(turns[0], system):
        return turns
    raise BadRow(
        f"{names['system']}: differs from the system message that the conversation begins with; "
        "expected one of them"
    )


def split_answer(
    turns: list[Message], field: str, what: str
) -> tuple[list[Message], list[Message]]:
    """A conversation that ends with an answer, as what was asked and the answer.

    Raises:
        BadRow: an end that is not the assistant's, or nothing before it.
    """
    if turns[-1]["role"] != "assistant":
        raise BadRow(
            f"{field}: ends with a {turns[-1]['role']} message; expected {what}, the assistant's, "
            "at its end"
        )
    if len(turns) == 1:
        raise BadRow(f"{field}: is an answer alone; expected what was asked before it")
    return turns[:-1], turns[-1:]


def extras(raw: Raw, names: Names) -> dict[str, Any]:
    """What goes on to the chat template."""
    return {name: raw.get(names[name]) for name in TEMPLATE_FIELDS if name in names}


def answers_after(asked: list[Message], named: Mapping[str, Any], what: str) -> list[list[Message]]:
    """Answers as messages; whole conversations only where they begin with what was asked.

    Args:
        asked: the messages before.
        named: the answers by the columns they stand in.
        what: the column of what was asked, for messages.
    """
    answers = []
    for field, value in named.items():
        answer = read_answer(value, field)
        starts = [asked[i:] for i in range(len(asked)) if asked[i]["role"] in ASKING]
        if answer[0]["role"] in ASKING and not any(begins_with(answer, s) for s in starts):
            raise BadRow(
                f"{field}: is a conversation that does not begin with {what}; expected it to, or "
                "only what follows"
            )
        answers.append(answer)
    return answers
