"""Rows of several answers to one prompt: two with a verdict, many with scores; and single ones."""

from collections.abc import Mapping
from typing import Any

from ..messages import BadRow
from ..prompts import split_implicit
from .asking import Names, Raw, answers_after, extras, read_asked, split_answer, with_system
from .values import (
    as_conversation,
    is_blank,
    parsed,
    read_answer,
    read_messages,
    read_text,
    read_transcript,
)
from .verdicts import WAYS, thumb

Fields = dict[str, Any]


def _is_chat(raw: Raw, names: Names) -> bool:
    """Whether the prompt is messages: text in `prompt` stays text, as in TRL."""
    before = (raw.get(names[part]) for part in ("system", "history") if part in names)
    if "prompt" not in names or not all(map(is_blank, before)):
        return True
    return as_conversation(raw.get(names["prompt"])) is not None


def _texts(raw: Raw, names: Names, answers: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """A prompt with its answers by their columns, as text or as messages."""
    if _is_chat(raw, names):
        parts = {**names, "user": names["prompt"]} if "prompt" in names else names
        asked = read_asked(raw, parts)
        return asked, answers_after(asked, answers, parts.get("talk") or parts["user"])
    prompt = read_text(raw.get(names["prompt"]), names["prompt"])
    held = [
        read_answer(value, field) if as_conversation(value) is not None else value
        for field, value in answers.items()
    ]
    for (field, _), value in zip(answers.items(), held, strict=True):
        if not isinstance(value, str | list):
            raise BadRow.expected("an answer: text or messages", field, value)
    return prompt, held


def versus(raw: Raw, names: Names) -> Fields:
    """Two answers and which is better, or a tie, from which nothing can be learnt."""
    named = {names[side]: raw.get(names[side]) for side in ("first", "second")}
    prompt, responses = _texts(raw, names, named)
    return _compared(prompt, responses, _verdict(raw, names)) | extras(raw, names)


def _verdict(raw: Raw, names: Names) -> int | None:
    if "wins" not in names:
        return WAYS[names["way"]](raw.get(names["verdict"]), names["verdict"])
    columns = names["wins"].split()
    won = [bool(WAYS["index"](raw.get(column), column)) for column in columns]
    if sum(won) != 1:
        raise BadRow(f"{columns[0]}: {sum(won)} of {', '.join(columns)} are 1; expected one")
    winner = won.index(True)
    return winner if winner < 2 else None


def _compared(prompt: Any, responses: list[Any], better: int | None) -> Fields:
    stated = [] if better is None else [[better, 1 - better]]
    return {"prompt": prompt, "responses": responses, "comparisons": stated}


def arena(raw: Raw, names: Names) -> Fields:
    """Two whole conversations that begin with the same messages, and which is better."""
    talks = []
    for side in ("first", "second"):
        field = names[side]
        talks.append(with_system(raw, names, _talk(raw, names, field)))
    try:
        prompt, *responses = split_implicit(*talks)
    except BadRow:
        first, second = names["first"], names["second"]
        raise BadRow(
            f"{second}: shares no first message with {first}; expected the same question in both"
        ) from None
    return _compared(prompt, responses, _verdict(raw, names))


def _talk(raw: Raw, names: Names, field: str) -> list[Any]:
    if "prompt" not in names:
        return read_messages(raw.get(field), field)
    asked, answers = parsed(raw.get(names["prompt"])), parsed(raw.get(field))
    for name, listed in ((names["prompt"], asked), (field, answers)):
        if not isinstance(listed, list) or not listed:
            raise BadRow.expected("a list of texts, one a turn", name, listed)
    if len(asked) != len(answers):
        raise BadRow(f"{field}: has {len(answers)} turns; expected {len(asked)}, one a question")
    turns = []
    for i, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        turns += [
            {"role": "user", "content": read_text(question, f"{names['prompt']}[{i}]")},
            {"role": "assistant", "content": read_text(answer, f"{field}[{i}]")},
        ]
    return turns


def completions(raw: Raw, names: Names) -> Fields:
    """A list of answers, each an object with its score or its rank."""
    field = names["answers"]
    listed = parsed(raw.get(field))
    if not isinstance(listed, list) or not listed:
        raise BadRow.expected("a list of answers, each with its score", field, listed)
    named, said = {}, []
    for i, item in enumerate(listed):
        if not isinstance(item, Mapping):
            raise BadRow.expected(f"an object with {names['text']}", f"{field}[{i}]", item)
        named[f"{field}[{i}].{names['text']}"] = item.get(names["text"])
        said.append(_number(item.get(names["said"]), f"{field}[{i}].{names['said']}"))
    prompt, responses = _texts(raw, names, named)
    return {"prompt": prompt, "responses": responses, names["as"]: said, **extras(raw, names)}


def nectar(raw: Raw, names: Names) -> Fields:
    """Nectar's ranked answers, after a transcript in Anthropic's form."""
    field = names["prompt"]
    asked = read_transcript(raw.get(field), field)
    asked = asked if asked[-1]["content"] else asked[:-1]
    if not asked:
        raise BadRow(f"{field}: asks nothing; expected a transcript that begins with 'Human:'")
    parts = {part: name for part, name in names.items() if part != "prompt"}
    return completions({**raw, field: asked}, {**parts, "talk": field})


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow.expected("a number", field, value)
    return value


def scored_pair(raw: Raw, names: Names) -> Fields:
    """A pair whose answers have scores, as a group: for losses that read scores."""
    said = [_number(raw.get(column), column) for column in ("score_chosen", "score_rejected")]
    prompt: Any
    responses: list[Any]
    sides = {side: raw.get(side) for side in ("chosen", "rejected")}
    if is_blank(raw.get("prompt")):
        talks = [read_messages(value, side) for side, value in sides.items()]
        prompt, *responses = split_implicit(*talks)
    else:
        prompt, responses = raw["prompt"], [sides["chosen"], sides["rejected"]]
    return {"prompt": prompt, "responses": responses, "scores": said, **extras(raw, names)}


def labelled_messages(raw: Raw, names: Names) -> Fields:
    """A conversation that ends with an answer, and a thumb up or down for it."""
    label, field = thumb(raw.get(names["thumb"]), names["thumb"]), names["talk"]
    turns = with_system(raw, names, read_messages(raw.get(field), field))
    prompt, answer = split_answer(turns, field, "the answer")
    return {"prompt": prompt, "completion": answer, "label": label, **extras(raw, names)}


def thumbs(raw: Raw, names: Names) -> Fields:
    """One answer with a thumb up or down."""
    label = thumb(raw.get(names["thumb"]), names["thumb"])
    answer = {names["answer"]: raw.get(names["answer"])}
    prompt, (completion,) = _texts(raw, names, answer)
    return {"prompt": prompt, "completion": completion, "label": label, **extras(raw, names)}
