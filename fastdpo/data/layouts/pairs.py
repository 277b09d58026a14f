"""Rows of a better and a worse answer, one function a way of laying them out."""

from typing import Any

from ..messages import BadRow
from .asking import Names, Raw, answers_after, extras, read_asked, split_answer, with_system
from .values import (
    as_conversation,
    begins_with,
    is_blank,
    parsed,
    read_messages,
    read_transcript,
    same_message,
    with_objects,
)

Fields = dict[str, Any]


def pair(raw: Raw, names: Names) -> Fields:
    """What was asked, in parts, and two answers."""
    asked = read_asked(raw, names)
    fields = {names[side]: raw.get(names[side]) for side in ("chosen", "rejected")}
    what = names.get("talk") or names["user"]
    chosen, rejected = answers_after(asked, fields, what)
    if "talk" in names and asked[-1]["role"] == "assistant":
        asked = _without_answer(asked, (chosen, rejected), what)
    return {"prompt": asked, "chosen": chosen, "rejected": rejected, **extras(raw, names)}


def _without_answer(asked: list[Any], answers: Any, what: str) -> list[Any]:
    """A conversation that ends with one of the answers, up to what was asked."""
    for answer in answers:
        if same_message(asked[-1], answer[-1]) and len(asked) > 1:
            return asked[:-1]
    raise BadRow(
        f"{what}: ends with the assistant's message, which is neither of the answers; expected it "
        "to end with what the user asks"
    )


def output_list(raw: Raw, names: Names) -> Fields:
    """An instruction and a list of two answers, the better first."""
    field = names["output"]
    listed = parsed(raw.get(field))
    if not isinstance(listed, list) or len(listed) != 2:
        raise BadRow.expected("a list of two answers, the better first", field, listed)
    asked = read_asked(raw, names)
    named = {f"{field}[{i}]": answer for i, answer in enumerate(listed)}
    chosen, rejected = answers_after(asked, named, names["user"])
    return {"prompt": asked, "chosen": chosen, "rejected": rejected, **extras(raw, names)}


def whole(raw: Raw, names: Names) -> Fields:
    """Two whole conversations, which begin with what was asked."""
    sides = {}
    for side in ("chosen", "rejected"):
        sides[side] = with_system(raw, names, read_messages(raw.get(names[side]), names[side]))
    return {**sides, **extras(raw, names)}


def swift(raw: Raw, names: Names) -> Fields:
    """A conversation that ends with the better answer, and the worse one beside it."""
    field = names["talk"]
    turns = with_system(raw, names, read_messages(raw.get(field), field))
    asked, chosen = split_answer(turns, field, "the better answer")
    (rejected,) = answers_after(asked, {names["rejected"]: raw.get(names["rejected"])}, field)
    return {"prompt": asked, "chosen": chosen, "rejected": rejected, **extras(raw, names)}


def swift_messages(raw: Raw, names: Names) -> Fields:
    """Two whole conversations: messages has the better answer, rejected_messages the worse."""
    chosen = with_system(raw, names, read_messages(raw.get(names["talk"]), names["talk"]))
    value = raw.get(names["rejected"])
    rejected = with_system(raw, names, read_messages(value, names["rejected"]))
    return {"chosen": chosen, "rejected": rejected, **extras(raw, names)}


def openai(raw: Raw, names: Names) -> Fields:
    """OpenAI's preference files: input with messages and tools, two outputs."""
    field = names["input"]
    held = parsed(raw.get(field))
    if not isinstance(held, dict):
        raise BadRow.expected("an object with messages", field, held)
    asked = read_messages(held.get("messages"), f"{field}.messages")
    named = {names[side]: raw.get(names[side]) for side in ("chosen", "rejected")}
    chosen, rejected = answers_after(asked, named, f"{field}.messages")
    made = {"prompt": asked, "chosen": chosen, "rejected": rejected}
    return made if is_blank(held.get("tools")) else made | {"tools": held["tools"]}


def system_beside(raw: Raw, names: Names) -> Fields:
    """TRL's columns with a system prompt in a column of its own; a text that holds it stays."""
    prompt, system = raw.get("prompt"), raw.get(names["system"])
    sides = {side: raw.get(side) for side in ("chosen", "rejected")}
    if is_blank(prompt):
        raise BadRow("prompt: is empty; expected text or messages")
    texts = all(isinstance(text, str) for text in (prompt, *sides.values()))
    if texts and not is_blank(system) and str(system).strip() in str(prompt):
        return {"prompt": prompt, **sides, **extras(raw, names)}
    return pair(raw, {**names, "user": "prompt"})


def transcripts(raw: Raw, names: Names) -> Fields:
    """Anthropic's transcripts, as messages."""
    made = {side: read_transcript(raw.get(side), side) for side in ("chosen", "rejected")}
    for side, talk in made.items():
        if talk[-1]["role"] != "assistant":
            raise BadRow(f"{side}: ends with what a human says; expected the assistant's answer")
    return dict(made)


def text_arguments(raw: Raw, names: Names) -> Fields:
    """TRL's columns whose messages call tools with JSON in a text, as OpenAI's do."""
    made = {}
    for field in names.values():
        value = raw.get(field)
        talk = as_conversation(value)
        made[field] = value
        if talk is not None:
            made[field] = [with_objects(message, f"{field}[{i}]") for i, message in enumerate(talk)]
    return made


def begins_so(chosen: Any, talk: Any) -> bool:
    """Whether an answer, as it stands in a row, is a conversation that begins with another one."""
    try:
        return begins_with(read_messages(chosen, "chosen"), read_messages(talk, "talk"))
    except BadRow:
        return False
