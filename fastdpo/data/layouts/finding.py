"""How each layout is told from the names, the types and the contents of a data set's columns."""

from collections.abc import Mapping
from typing import Any

from ..columns import TEXT_FIELDS, row_kinds
from . import groups, pairs
from .layout import Ambiguous, Found, Reading
from .sample import Sample
from .values import (
    ASKING,
    as_conversation,
    has_text_arguments,
    is_message,
    parsed,
)
from .verdicts import is_thumb, word

_SYSTEM = ("system", "system_prompt", "system_message")
_USER = ("instruction", "question", "query", "input", "user_prompt", "user_input")
_TALK = ("messages", "conversations", "conversation")
_RESPONSES = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
_TWO = (
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_a", "response_b"),
    ("response_A", "response_B"),
    ("completion_a", "completion_b"),
    ("answer_a", "answer_b"),
    ("output_1", "output_2"),
)
_FROM_ZERO = (("response_0", "response_1"), ("answer_0", "answer_1"))
_VERDICT = ("preference", "winner", "preferred", "better_response_id", "choice", "label", "better")
_STRENGTH = ("preference_strength", "overall_preference")
_THUMB = ("thumb", "thumbs", "feedback", "rating", "thumbs_up", "liked", "vote", "label")
_ANSWER = ("completion", "response", "answer", "output")


def _with(sample: Sample, names: Mapping[str, str | None], *more: str) -> dict[str, str]:
    """The parts that there are, with those that any layout may have: `system`, `tools`, ..."""
    parts = {part: name for part, name in names.items() if name is not None}
    optional = {"system": sample.first_filled(*_SYSTEM)}
    optional |= {name: name if sample.filled(name) else None for name in more}
    optional |= {
        name: name if name in sample.names else None for name in ("tools", "chat_template_kwargs")
    }
    return {part: name for part, name in optional.items() if name is not None} | parts


def _is_answer(value: Any) -> bool:
    """Whether a value is one answer: a text, a message, or messages that the assistant begins."""
    held = parsed(value)
    if is_message(held):
        return True
    talk = as_conversation(held)
    return isinstance(value, str) if talk is None else not _asks(talk)


def _asks(talk: Any) -> bool:
    """Whether a conversation begins with what comes before an answer."""
    first = talk[0].get("role") or talk[0].get("from")
    return first in (*ASKING, "human")


def _sides(sample: Sample) -> tuple[str, str] | None:
    return next((two for two in _RESPONSES if set(two) <= sample.names), None)


# pairs


def trl(sample: Sample, forced: bool) -> Found:
    """The canonical columns."""
    if not row_kinds(sample.names):
        return None
    names = {name: name for name in sample.dataset.column_names}
    hint = ""
    if all(_is_transcript(sample.value(side)) for side in ("chosen", "rejected")):
        hint = "transcripts are read as text, as in TRL; layout: hh reads them as messages"
    return Reading("trl", names, None, hint)


def _is_transcript(value: Any) -> bool:
    return (
        isinstance(value, str)
        and value.lstrip().startswith("Human:")
        and ("\n\nAssistant:" in value)
    )


def text_arguments(sample: Sample, forced: bool) -> Found:
    """The canonical columns with messages whose tool calls have their arguments as text."""
    fields = [name for name in (*TEXT_FIELDS, "responses") if name in sample.names]
    if not row_kinds(sample.names) or "responses" in fields:
        return None
    if any(_calls_with_text(sample, name) for name in fields):
        return Reading("openai_calls", {name: name for name in fields}, pairs.text_arguments)
    return None


def _calls_with_text(sample: Sample, name: str) -> bool:
    if any(has_text_arguments(as_conversation(row.get(name))) for row in sample.rows):
        return True
    return sample.matches(name, r'"arguments"\s*:\s*"')


def system_beside(sample: Sample, forced: bool) -> Found:
    """A pair with its system prompt in a column of its own."""
    if not {"chosen", "rejected"} <= sample.names or not sample.first_filled(*_SYSTEM):
        return None
    names = _with(sample, {"chosen": "chosen", "rejected": "rejected"})
    if sample.filled("prompt"):
        return Reading("system", {"prompt": "prompt", **names}, pairs.system_beside)
    talks = [as_conversation(sample.value(side)) for side in ("chosen", "rejected")]
    if any(sample.first_filled(name) for name in (*_USER, *_TALK)):
        return None
    if all(talk is not None and _asks(talk) for talk in talks):
        return Reading("system", names, pairs.whole)
    return None


def instruction(sample: Sample, forced: bool) -> Found:
    """What a user asks in a column of its own, and two answers: Alpaca, Orca, argilla."""
    two, user = _sides(sample), sample.first_filled(*_USER)
    if two is None or user is None or sample.filled("prompt"):
        return None
    talks = [as_conversation(sample.value(side)) for side in two]
    whole = all(talk is not None and _asks(talk) for talk in talks)
    if not forced and whole and _already_asked(sample, user, talks[0]):
        return None
    name = "alpaca" if user == "instruction" else "orca"
    if two != _RESPONSES[0]:
        name = "argilla"
    sides = dict(zip(("chosen", "rejected"), two, strict=True))
    more = ("input", "history") if user == "instruction" else ("history",)
    return Reading(name, _with(sample, {"user": user, **sides}, *more), pairs.pair)


def _already_asked(sample: Sample, user: str, talk: Any) -> bool:
    """Whether a conversation says what a column asks."""
    asked = str(sample.value(user)).strip()
    said = [str(message.get("content", message.get("value"))).strip() for message in talk]
    return asked in said


def output_list(sample: Sample, forced: bool) -> Found:
    """An instruction with a list of two answers."""
    user = sample.first_filled("instruction", "question", "query")
    listed = parsed(sample.value("output"))
    if user is None or not isinstance(listed, list) or len(listed) != 2 or _sides(sample):
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
    parts = _with(sample, {"user": user, "output": "output"}, "input", "history")
    return Reading("alpaca_output", parts, pairs.output_list)


def conversation(sample: Sample, forced: bool) -> Found:
    """A conversation and two answers to it: ShareGPT, LLaMA-Factory, axolotl."""
    two, talk = _sides(sample), sample.first_filled(*_TALK)
    if two is None or (sample.filled("prompt") and not forced):
        return None
    chosen = sample.value(two[0])
    answer = as_conversation(chosen)
    if talk is None:
        if answer is None or "from" not in answer[0] or "role" in answer[0]:
            return None
        sides = dict(zip(("chosen", "rejected"), two, strict=True))
        return Reading("sharegpt", _with(sample, sides), pairs.whole)
    turns = as_conversation(sample.value(talk))
    if turns is None:
        return None
    name = "sharegpt" if "from" in turns[0] else "axolotl"
    parts = {"talk": talk, **dict(zip(("chosen", "rejected"), two, strict=True))}
    if _is_answer(chosen) or pairs.begins_so(chosen, turns) or forced:
        return Reading(name, _with(sample, parts), pairs.pair)
    if answer is None or pairs.begins_so(turns, answer) or _already_in(turns, answer):
        if answer is not None and "from" in answer[0]:
            del parts["talk"]
            return Reading(name, _with(sample, parts), pairs.whole)
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
        return Reading("swift", _with(sample, names), pairs.swift_messages)
    if sample.filled("rejected_response"):
        names = {"talk": "messages", "rejected": "rejected_response"}
        return Reading("swift", _with(sample, names), pairs.swift)
    return None


def swift_query(sample: Sample, forced: bool) -> Found:
    """ms-swift's earlier form: query, response and rejected_response."""
    if not {"query", "response", "rejected_response"} <= sample.names:
        return None
    names = {"user": "query", "chosen": "response", "rejected": "rejected_response"}
    return Reading("swift_query", _with(sample, names, "history"), pairs.pair)


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
    return Reading("stack", _with(sample, names), pairs.pair)


def transcripts(sample: Sample, forced: bool) -> Found:
    """Anthropic's transcripts as messages, where that is asked for."""
    if not forced or not {"chosen", "rejected"} <= sample.names:
        return None
    return Reading("hh", {"chosen": "chosen", "rejected": "rejected"}, pairs.transcripts)


# groups and labels


def scored_pair(sample: Sample, forced: bool) -> Found:
    """UltraFeedback binarised: a pair whose answers have scores, where the scores are asked for."""
    columns = ("chosen", "rejected", "score_chosen", "score_rejected")
    if not forced or not set(columns) <= sample.names:
        return None
    names = {name: name for name in columns}
    prompt = "prompt" if "prompt" in sample.names else None
    return Reading("scored_pair", _with(sample, {"prompt": prompt, **names}), groups.scored_pair)


def ultrafeedback(sample: Sample, forced: bool) -> Found:
    """UltraFeedback: completions with their overall_score."""
    return _listed(sample, "ultrafeedback", "completions", "response", "overall_score", "scores")


def nectar(sample: Sample, forced: bool) -> Found:
    """Nectar: answers with their rank."""
    return _listed(sample, "nectar", "answers", "answer", "rank", "rankings")


def _listed(sample: Sample, name: str, field: str, text: str, said: str, kind: str) -> Found:
    listed = parsed(sample.value(field)) if field in sample.names else None
    user = sample.first_filled("prompt", *_USER)
    if user is None or not isinstance(listed, list) or not listed:
        return None
    if not isinstance(listed[0], Mapping) or not {text, said} <= set(listed[0]):
        return None
    part = "prompt" if user == "prompt" else "user"
    names = {part: user, "answers": field, "text": text, "said": said, "as": kind}
    transcript = part == "prompt" and _is_transcript(f"{sample.value(user)}\n\nAssistant:")
    function = groups.nectar if transcript else groups.completions
    return Reading(name, _with(sample, names), function)


def _asker(sample: Sample) -> dict[str, str] | None:
    """The column of what was asked, before two answers or one; None beside TRL's own columns."""
    if row_kinds(sample.names) and _labels_are_bool(sample):
        return None
    name = sample.first_filled("prompt", "instruction", "question", "query", "context", *_TALK)
    if name is None:
        return None
    value = sample.value(name)
    if name == "prompt":
        return {"prompt": name}
    if name in _TALK or as_conversation(value) is not None:
        return {"talk": name}
    return {"user": name}


def _labels_are_bool(sample: Sample) -> bool:
    """False where all that stands against TRL's labelled rows is that labels are words."""
    if row_kinds(sample.names) != ("label",):
        return True
    return not isinstance(sample.value("label"), str)


def feedback(sample: Sample, forced: bool) -> Found:
    """Two answers and which of them is better, counted from 1 or lettered."""
    found = _two_answers(sample)
    if found is None:
        return None
    names, from_zero = found
    verdict = names["verdict"]
    said = {word(value) for value in sample.distinct(verdict) or ()}
    if from_zero or verdict == "better_response_id":
        return Reading("feedback_index", names | {"way": "index"}, groups.versus)
    unclear = said <= {"0", "1", "true", "false", "tie"} and bool(said & {"0", "true", "false"})
    if not forced and (unclear or {"0", "1", "2"} <= said):
        return _zero_or_one(names) if unclear else _which_is_the_tie(names)
    return Reading("feedback", names | {"way": "order"}, groups.versus)


def _zero_or_one(names: Mapping[str, str]) -> Ambiguous:
    verdict, first, second = names["verdict"], names["first"], names["second"]
    return Ambiguous(
        f"{verdict} is 0 or 1, an index or a label",
        (
            (f"0 is {first}, 1 is {second}", "layout: feedback_index"),
            (f"1 says that {first} is better, 0 that {second} is", "layout: feedback_first"),
        ),
    )


def _which_is_the_tie(names: Mapping[str, str]) -> Ambiguous:
    verdict, first, second = names["verdict"], names["first"], names["second"]
    return Ambiguous(
        f"{verdict} is 0, 1 or 2, one of which is a tie",
        (
            (f"1 is {first}, 2 is {second} and 0 is a tie", "layout: feedback"),
            (
                f"0 is {first}, 1 is {second} and 2 is a tie",
                f"{verdict}: tie in place of 2, and layout: feedback_index",
            ),
        ),
    )


def _two_answers(sample: Sample) -> tuple[dict[str, str], bool] | None:
    counted = next((two for two in _TWO if set(two) <= sample.names), None)
    from_zero = next((two for two in _FROM_ZERO if set(two) <= sample.names), None)
    two = counted or from_zero
    verdict, asker = sample.first_filled(*_VERDICT), _asker(sample)
    if two is None or verdict is None or asker is None:
        return None
    names = {**asker, "first": two[0], "second": two[1], "verdict": verdict}
    return _with(sample, names), counted is None


def feedback_index(sample: Sample, forced: bool) -> Found:
    """Two answers and the index of the better, where that is asked for."""
    found = _two_answers(sample) if forced else None
    if found is None:
        return None
    return Reading("feedback_index", found[0] | {"way": "index"}, groups.versus)


def feedback_first(sample: Sample, forced: bool) -> Found:
    """Two answers and whether the first is the better, where that is asked for."""
    found = _two_answers(sample) if forced else None
    if found is None:
        return None
    return Reading("feedback_first", found[0] | {"way": "first"}, groups.versus)


def helpsteer(sample: Sample, forced: bool) -> Found:
    """HelpSteer: two answers and how much better one is."""
    two = next((two for two in _TWO if set(two) <= sample.names), None)
    strength, asker = sample.first_filled(*_STRENGTH), _asker(sample)
    if two is None or strength is None or asker is None:
        return None
    names = {**asker, "first": two[0], "second": two[1], "verdict": strength, "way": "strength"}
    return Reading("helpsteer", _with(sample, names), groups.versus)


def shp(sample: Sample, forced: bool) -> Found:
    """Stanford Human Preferences: labels is 1 where A is better."""
    if not {"history", "human_ref_A", "human_ref_B", "labels"} <= sample.names:
        return None
    names = {
        "user": "history",
        "first": "human_ref_A",
        "second": "human_ref_B",
        "verdict": "labels",
        "way": "first",
    }
    return Reading("shp", names, groups.versus)


def arena(sample: Sample, forced: bool) -> Found:
    """LMSYS's arena: two whole conversations and the winner."""
    if not {"conversation_a", "conversation_b", "winner"} <= sample.names:
        return None
    names = {"first": "conversation_a", "second": "conversation_b", "verdict": "winner"}
    return Reading("arena", _with(sample, names) | {"way": "order"}, groups.arena)


def arena_texts(sample: Sample, forced: bool) -> Found:
    """LMSYS's arena as Kaggle had it: lists of texts, and a column of 0 and 1 for each outcome."""
    wins = ("winner_model_a", "winner_model_b", "winner_tie")
    if not {"prompt", "response_a", "response_b", *wins} <= sample.names:
        return None
    names = {"prompt": "prompt", "first": "response_a", "second": "response_b"}
    return Reading("arena_texts", names | {"wins": " ".join(wins)}, groups.arena)


def thumbs(sample: Sample, forced: bool) -> Found:
    """An answer with a thumb up or down."""
    answer, asker = sample.first_filled(*_ANSWER), _asker(sample)
    column = sample.first_filled(*_THUMB)
    if answer is None or asker is None or column is None or _sides(sample):
        return None
    values = sample.distinct(column)
    if not values or not any(map(is_thumb, values)):
        return None
    words = {word(value) for value in values}
    if all(said.lstrip("-").isdigit() for said in words) and not words <= {"0", "1", "-1"}:
        return None  # a scale
    names = {**asker, "answer": answer, "thumb": column}
    return Reading("thumbs", _with(sample, names), groups.thumbs)
