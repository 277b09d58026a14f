"""How layouts of a better and a worse answer are told: from the names, the types and the contents
of a data set's columns.
"""

from typing import Any

from ..columns import FIELDS, TEXT_FIELDS, row_kinds
from . import pairs
from .layout import Ambiguous, Found, Reading
from .looks import (
    RESPONSES,
    SYSTEM,
    TALK,
    USER,
    asks,
    is_answer,
    is_transcript,
    sides_of,
    with_shared,
)
from .sample import Sample
from .values import ASKING, as_conversation, has_text_arguments, parsed


def trl(sample: Sample, forced: bool) -> Found:
    """The canonical columns."""
    if not row_kinds(sample.names):
        return None
    names = {name: name for name in sample.dataset.column_names}
    hint = ""
    if all(is_transcript(sample.value(side)) for side in ("chosen", "rejected")):
        hint = "transcripts are read as text, as in TRL; layout: hh reads them as messages"
    return Reading("trl", names, None, hint)


def text_arguments(sample: Sample, forced: bool) -> Found:
    """The canonical columns with messages whose tool calls have their arguments as text."""
    fields = [name for name in (*TEXT_FIELDS, "responses") if name in sample.names]
    if not row_kinds(sample.names) or "responses" in fields:
        return None
    if any(_calls_with_text(sample, name) for name in fields):
        names = {name: name for name in FIELDS if name in sample.names}
        return Reading("openai_calls", names, pairs.text_arguments)
    return None


def _calls_with_text(sample: Sample, name: str) -> bool:
    if any(has_text_arguments(as_conversation(row.get(name))) for row in sample.rows):
        return True
    if as_conversation(sample.value(name)) is None:
        return False
    return sample.has_type(name, "arguments: string") or sample.matches(
        name, r'"arguments"\s*:\s*"'
    )


def system_beside(sample: Sample, forced: bool) -> Found:
    """A pair with its system prompt in a column of its own."""
    if not {"chosen", "rejected"} <= sample.names or not sample.first_filled(*SYSTEM):
        return None
    names = with_shared(sample, {"chosen": "chosen", "rejected": "rejected"})
    if sample.filled("prompt"):
        return Reading("system", {"prompt": "prompt", **names}, pairs.system_beside)
    talks = [as_conversation(sample.value(side)) for side in ("chosen", "rejected")]
    if any(sample.first_filled(name) for name in (*USER, *TALK)):
        return None
    if all(talk is not None and asks(talk) for talk in talks):
        return Reading("system", names, pairs.whole)
    return None


def instruction(sample: Sample, forced: bool) -> Found:
    """What a user asks in a column of its own, and two answers: Alpaca, Orca, argilla."""
    two, user = sides_of(sample), sample.first_filled(*USER)
    if two is None or user is None or sample.filled("prompt"):
        return None
    talks = [as_conversation(sample.value(side)) for side in two]
    whole = all(talk is not None and asks(talk) for talk in talks)
    if not forced and whole and _already_asked(sample, user, talks[0]):
        return None
    name = "alpaca" if user == "instruction" else "orca"
    if two != RESPONSES[0]:
        name = "argilla"
    sides = dict(zip(("chosen", "rejected"), two, strict=True))
    return Reading(name, with_shared(sample, {"user": user, **sides}), pairs.pair)


def _already_asked(sample: Sample, user: str, talk: Any) -> bool:
    """Whether a conversation says what a column asks."""
    asked = str(sample.value(user)).strip()
    said = [str(message.get("content", message.get("value"))).strip() for message in talk]
    return asked in said


def output_list(sample: Sample, forced: bool) -> Found:
    """An instruction with a list of two answers."""
    user = sample.first_filled("instruction", "question", "query")
    listed = parsed(sample.value("output"))
    if user is None or not isinstance(listed, list) or len(listed) != 2 or sides_of(sample):
        return None
    if not forced:
        name = f"instruction: {user}"
        return Ambiguous(
            "output is a list of two answers, and nothing says which is the better",
            (
                ("the first is the better, as in LLaMA-Factory", "layout: alpaca_output"),
                (
                    "the second is the better",
                    f"columns: {{{name}, chosen: output.1, rejected: output.0}}",
                ),
            ),
        )
    added = sample.first_filled("input")
    parts = with_shared(sample, {"user": user, "input": added, "output": "output"})
    return Reading("alpaca_output", parts, pairs.output_list)


def conversation(sample: Sample, forced: bool) -> Found:
    """A conversation and two answers to it: ShareGPT, LLaMA-Factory, axolotl."""
    two, talk = sides_of(sample), sample.first_filled(*TALK)
    if two is None or (sample.filled("prompt") and not forced):
        return None
    chosen = sample.value(two[0])
    answer = as_conversation(chosen)
    if talk is None:
        if answer is None or "from" not in answer[0] or "role" in answer[0]:
            return None
        sides = dict(zip(("chosen", "rejected"), two, strict=True))
        return Reading("sharegpt", with_shared(sample, sides), pairs.whole)
    turns = as_conversation(sample.value(talk))
    if turns is None:
        return None
    name = "sharegpt" if "from" in turns[0] else "axolotl"
    parts = {"talk": talk, **dict(zip(("chosen", "rejected"), two, strict=True))}
    copied = answer is not None and pairs.begins_so(turns, answer)
    if is_answer(chosen) or forced or (pairs.begins_so(chosen, turns) and not copied):
        return Reading(name, with_shared(sample, parts), pairs.pair)
    if answer is None or copied or _already_in(turns, answer):
        if answer is not None and "from" in answer[0]:
            del parts["talk"]
            return Reading(name, with_shared(sample, parts), pairs.whole)
        return None  # a copy beside whole conversations
    return Ambiguous(
        f"{two[0]} is a conversation that does not begin with {talk}",
        (
            (f"it goes on where {talk} ends", f"layout: {name}"),
            (
                f"it is a whole conversation, and {talk} is not trained on",
                f"columns: {{chosen: {two[0]}, rejected: {two[1]}}}",
            ),
        ),
    )


def _already_in(turns: Any, answer: Any) -> bool:
    """Whether what is asked in one conversation is asked in another."""

    def asked(talk: Any) -> set[str]:
        return {
            str(message.get("content", message.get("value"))).strip()
            for message in talk
            if (message.get("role") or message.get("from")) in (*ASKING, "human")
        }

    return asked(turns) <= asked(answer)


def swift(sample: Sample, forced: bool) -> Found:
    """ms-swift's: the better answer ends the messages, the worse one has its own column."""
    if sample.first("chosen", "chosen_response", "response") or not sample.filled("messages"):
        return None
    if sample.filled("rejected_messages"):
        names = {"talk": "messages", "rejected": "rejected_messages"}
        return Reading("swift", with_shared(sample, names), pairs.swift_messages)
    if sample.filled("rejected_response"):
        names = {"talk": "messages", "rejected": "rejected_response"}
        return Reading("swift", with_shared(sample, names), pairs.swift)
    return None


def swift_query(sample: Sample, forced: bool) -> Found:
    """ms-swift's earlier form: query, response and rejected_response."""
    if not {"query", "response", "rejected_response"} <= sample.names:
        return None
    names = {"user": "query", "chosen": "response", "rejected": "rejected_response"}
    return Reading("swift_query", with_shared(sample, names), pairs.pair)


def whole_messages(sample: Sample, forced: bool) -> Found:
    """LLaMA-Factory's converted pairs: two whole conversations."""
    sides = {"chosen": "chosen_messages", "rejected": "rejected_messages"}
    if not all(map(sample.filled, sides.values())):
        return None
    return Reading("whole_messages", with_shared(sample, sides), pairs.whole)


def openai(sample: Sample, forced: bool) -> Found:
    """OpenAI's files for preference fine-tuning."""
    if not {"input", "preferred_output", "non_preferred_output"} <= sample.names:
        return None
    names = {
        "input": "input",
        "chosen": "preferred_output",
        "rejected": "non_preferred_output",
    }
    return Reading("openai", names, pairs.openai)


def stack(sample: Sample, forced: bool) -> Found:
    """Stack Exchange's pairs: response_j is the better."""
    if not {"question", "response_j", "response_k"} <= sample.names:
        return None
    names = {"user": "question", "chosen": "response_j", "rejected": "response_k"}
    return Reading("stack", with_shared(sample, names), pairs.pair)


def transcripts(sample: Sample, forced: bool) -> Found:
    """Anthropic's transcripts as messages, where that is asked for."""
    if not forced or not {"chosen", "rejected"} <= sample.names:
        return None
    return Reading("hh", {"chosen": "chosen", "rejected": "rejected"}, pairs.transcripts)
