"""How layouts of several answers with a verdict or scores are told, and of one with a thumb."""

from collections.abc import Mapping

from ..columns import row_kinds
from . import groups
from .layout import Ambiguous, Found, Reading
from .looks import TALK, USER, asks, is_transcript, sides_of, with_shared
from .sample import Sample
from .values import as_conversation, parsed
from .verdicts import is_thumb, word

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
    strength, asker = sample.first_filled(*_STRENGTH), _asker(sample)
    if two is None or strength is None or asker is None:
        return None
    names = {**asker, "first": two[0], "second": two[1], "verdict": strength, "way": "strength"}
    return Reading("helpsteer", with_shared(sample, names), groups.versus)


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
    return Reading("thumbs", with_shared(sample, names), groups.thumbs)


def labelled_messages(sample: Sample, forced: bool) -> Found:
    """A conversation that ends with an answer, and a thumb up or down for it."""
    talk, column = sample.first_filled(*TALK), _thumb_column(sample)
    if talk is None or column is None or sample.first_filled("prompt", *_ANSWER, *_WORSE):
        return None
    turns = as_conversation(sample.value(talk))
    if turns is None or (asks(turns[-1:]) and not forced):
        return None
    names = {"talk": talk, "thumb": column}
    return Reading("labelled_messages", with_shared(sample, names), groups.labelled_messages)


def _thumb_column(sample: Sample) -> str | None:
    """The column of a thumb, where there is one and no pair."""
    column = sample.first_filled(*_THUMB)
    values = sample.distinct(column) if column is not None else None
    if sides_of(sample) or not values or not any(map(is_thumb, values)):
        return None
    words = {word(value) for value in values}
    if all(said.lstrip("-").isdigit() for said in words) and not words <= {"0", "1", "-1"}:
        return None  # a scale
    return column
