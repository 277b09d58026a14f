"""How layouts of several answers with a verdict or scores are told, and of one with a thumb."""

from collections.abc import Mapping

from ..columns import row_kinds
from . import groups
from .layout import Found, Reading
from .looks import TALK, USER, asks, is_transcript, sides_of, with_shared
from .sample import Sample
from .unclear import contradiction, third_answer, unclear_thumb, unclear_verdict
from .values import as_conversation, parsed
from .verdicts import is_thumb, number, word

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
_THUMB = (
    "thumb", "thumbs", "feedback", "rating", "thumbs_up", "liked", "vote", "label", "kto_tag"
)  # fmt: skip
_ANSWER = ("completion", "response", "answer", "output")
_WORSE = ("rejected_response", "rejected_messages")


def scored_pair(sample: Sample, forced: bool) -> Found:
    """UltraFeedback binarised: a pair whose answers have scores, where the scores are asked for."""
    columns = ("chosen", "rejected", "score_chosen", "score_rejected")
    if not forced or not set(columns) <= sample.names:
        return None
    names = {name: name for name in columns}
    prompt = "prompt" if "prompt" in sample.names else None
    return Reading(
        "scored_pair", with_shared(sample, {"prompt": prompt, **names}), groups.scored_pair
    )


def ultrafeedback(sample: Sample, forced: bool) -> Found:
    """UltraFeedback: completions with their overall_score."""
    return _listed(sample, "ultrafeedback", "completions", "response", "overall_score", "scores")


def nectar(sample: Sample, forced: bool) -> Found:
    """Nectar: answers with their rank."""
    return _listed(sample, "nectar", "answers", "answer", "rank", "rankings")


def _listed(sample: Sample, name: str, field: str, text: str, said: str, kind: str) -> Found:
    listed = parsed(sample.value(field)) if field in sample.names else None
    user = sample.first_filled("prompt", *USER)
    if user is None or not isinstance(listed, list) or not listed:
        return None
    if not isinstance(listed[0], Mapping) or not {text, said} <= set(listed[0]):
        return None
    part = "prompt" if user == "prompt" else "user"
    names = {part: user, "answers": field, "text": text, "said": said, "as": kind}
    transcript = part == "prompt" and is_transcript(f"{sample.value(user)}\n\nAssistant:")
    function = groups.nectar if transcript else groups.completions
    return Reading(name, with_shared(sample, names), function)


def _asker(sample: Sample) -> dict[str, str] | None:
    """The column of what was asked, before two answers or one; None beside TRL's own columns."""
    if row_kinds(sample.names) and _labels_are_bool(sample):
        return None
    name = sample.first_filled("prompt", "instruction", "question", "query", "context", *TALK)
    if name is None:
        return None
    value = sample.value(name)
    if name == "prompt":
        return {"prompt": name, **({"history": "history"} if sample.filled("history") else {})}
    if name in TALK or as_conversation(value) is not None:
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
    if from_zero or names["verdict"] == "better_response_id":
        reading = Reading("feedback_index", names | {"way": "index"}, groups.versus)
        return (None if forced else third_answer(sample, reading)) or reading
    reading = Reading("feedback", names | {"way": "order"}, groups.versus)
    if forced:
        return reading
    others = [name for name in _VERDICT if name != names["verdict"] and sample.filled(name)]
    return (
        unclear_verdict(sample, names)
        or contradiction(sample, names, others)
        or third_answer(sample, reading)
        or reading
    )


def _two_answers(sample: Sample) -> tuple[dict[str, str], bool] | None:
    counted = next((two for two in _TWO if set(two) <= sample.names), None)
    from_zero = next((two for two in _FROM_ZERO if set(two) <= sample.names), None)
    two = counted or from_zero
    verdict, asker = sample.first_filled(*_VERDICT), _asker(sample)
    if two is None or verdict is None or asker is None:
        return None
    names = {**asker, "first": two[0], "second": two[1], "verdict": verdict}
    return with_shared(sample, names), counted is None


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
    strength = sample.first_filled(*_STRENGTH, *(_VERDICT if forced else ()))
    asker = _asker(sample)
    if two is None or strength is None or asker is None:
        return None
    names = {**asker, "first": two[0], "second": two[1], "verdict": strength, "way": "strength"}
    reading = Reading("helpsteer", with_shared(sample, names), groups.versus)
    return (None if forced else third_answer(sample, reading)) or reading


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
    return Reading("arena", with_shared(sample, names) | {"way": "order"}, groups.arena)


def arena_texts(sample: Sample, forced: bool) -> Found:
    """LMSYS's arena as Kaggle had it: lists of texts, and a column of 0 and 1 for each outcome."""
    wins = ("winner_model_a", "winner_model_b", "winner_tie")
    if not {"prompt", "response_a", "response_b", *wins} <= sample.names:
        return None
    names = {"prompt": "prompt", "first": "response_a", "second": "response_b"}
    return Reading("arena_texts", names | {"wins": " ".join(wins)}, groups.arena)


def thumbs(sample: Sample, forced: bool) -> Found:
    """An answer with a thumb up or down."""
    answer, asker, column = sample.first_filled(*_ANSWER), _asker(sample), _thumb_column(sample)
    if answer is None or asker is None or column is None:
        return None
    names = {**asker, "answer": answer, "thumb": column}
    reading = Reading("thumbs", with_shared(sample, names), groups.thumbs)
    return (None if forced else unclear_thumb(sample, reading)) or reading


def labelled_messages(sample: Sample, forced: bool) -> Found:
    """A conversation that ends with an answer, and a thumb up or down for it."""
    talk, column = sample.first_filled(*TALK), _thumb_column(sample)
    if talk is None or column is None or sample.first_filled("prompt", *_ANSWER, *_WORSE):
        return None
    turns = as_conversation(sample.value(talk))
    if turns is None or (asks(turns[-1:]) and not forced):
        return None
    names = with_shared(sample, {"talk": talk, "thumb": column})
    reading = Reading("labelled_messages", names, groups.labelled_messages)
    return (None if forced else unclear_thumb(sample, reading)) or reading


def _thumb_column(sample: Sample) -> str | None:
    """The column of a thumb, where there is one and no pair."""
    if sides_of(sample):
        return None
    return next((name for name in _THUMB if sample.filled(name) and _is_thumbs(sample, name)), None)


def _is_thumbs(sample: Sample, column: str) -> bool:
    """Whether a column holds thumbs, and is no scale."""
    values = sample.distinct(column)
    if not values or not any(map(is_thumb, values)):
        return False
    words = {word(value) for value in values}
    return words <= {"0", "1", "-1"} or any(number(said) is None for said in words)
