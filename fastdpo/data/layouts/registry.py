"""Every layout that is read, with whose it is, its columns and a row of it.

A layout is a function in `find_pairs` or `find_groups` that tells it, a function that makes the
canonical fields of a row, and an entry here. The page of the data and the key `layout` are made of
these entries.
"""

from collections.abc import Mapping
from typing import Any

from . import find_groups, find_pairs
from .layout import Layout

_Q, _GOOD, _BAD = "Is ice lighter than water?", "Yes, so it floats.", "Opinions differ."


def _said(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


_USER, _A, _B = _message("user", _Q), _message("assistant", _GOOD), _message("assistant", _BAD)
_PAIR = {"chosen": _GOOD, "rejected": _BAD}
_TWO = {"prompt": _Q, "response_1": _GOOD, "response_2": _BAD}
_HH = {side: f"\n\nHuman: {_Q}\n\nAssistant: {text}" for side, text in _PAIR.items()}
_CALL = {"name": "look_up", "arguments": '{"of": "ice"}'}
_CALLS = [{"type": "function", "function": _CALL}]

_ENTRIES: tuple[tuple[str, str, str, Any, Mapping[str, Any]], ...] = (
    (
        "trl",
        "TRL",
        "prompt, chosen, rejected; chosen, rejected; prompt, completion, label",
        find_pairs.trl,
        {"prompt": _Q, **_PAIR},
    ),
    (
        "openai_calls",
        "TRL with OpenAI's tool calls",
        "prompt, chosen, rejected, tools",
        find_pairs.text_arguments,
        {
            "prompt": [_USER],
            "chosen": [{"role": "assistant", "content": "", "tool_calls": _CALLS}],
            "rejected": [_B],
        },
    ),
    (
        "system",
        "TRL with a system prompt; axolotl's ultra",
        "system, [prompt], chosen, rejected",
        find_pairs.system_beside,
        {"system": "Be brief.", "prompt": _Q, **_PAIR},
    ),
    (
        "hh",
        "Anthropic HH, as messages",
        "chosen, rejected",
        find_pairs.transcripts,
        _HH,
    ),
    (
        "scored_pair",
        "UltraFeedback binarised, with its scores",
        "[prompt], chosen, rejected, score_chosen, score_rejected",
        find_groups.scored_pair,
        {
            "prompt": _Q,
            "chosen": [_USER, _A],
            "rejected": [_USER, _B],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
    ),
    (
        "alpaca",
        "Alpaca, LLaMA-Factory",
        "instruction, [input], [system], [history], chosen, rejected",
        find_pairs.instruction,
        {"instruction": "Answer.", "input": _Q, **_PAIR},
    ),
    (
        "alpaca_output",
        "Alpaca, LLaMA-Factory before",
        "instruction, [input], [system], [history], output",
        find_pairs.output_list,
        {"instruction": _Q, "output": [_GOOD, _BAD]},
    ),
    (
        "orca",
        "Orca (Intel, argilla), axolotl's intel and icr",
        "[system], question, query or input, chosen, rejected",
        find_pairs.instruction,
        {"system": "Be brief.", "question": _Q, **_PAIR},
    ),
    (
        "argilla",
        "argilla, axolotl's argilla",
        "[system], instruction, chosen_response, rejected_response",
        find_pairs.instruction,
        {"instruction": _Q, "chosen_response": _GOOD, "rejected_response": _BAD},
    ),
    (
        "sharegpt",
        "ShareGPT, LLaMA-Factory's ranking sets",
        "[conversations], [system], [tools], chosen, rejected",
        find_pairs.conversation,
        {
            "conversations": [_said("human", _Q)],
            "chosen": _said("gpt", _GOOD),
            "rejected": _said("gpt", _BAD),
        },
    ),
    (
        "axolotl",
        "axolotl's chat_template, LLaMA-Factory's OpenAI form",
        "messages, [system], [tools], chosen, rejected",
        find_pairs.conversation,
        {"messages": [_USER], "chosen": _A, "rejected": _B},
    ),
    (
        "swift",
        "ms-swift",
        "messages, [system], [tools], rejected_response or rejected_messages",
        find_pairs.swift,
        {"messages": [_USER, _A], "rejected_response": _BAD},
    ),
    (
        "swift_query",
        "ms-swift before",
        "query, [history], [system], response, rejected_response",
        find_pairs.swift_query,
        {"query": _Q, "response": _GOOD, "rejected_response": _BAD},
    ),
    (
        "whole_messages",
        "LLaMA-Factory's v1 converters",
        "chosen_messages, rejected_messages, [system], [tools]",
        find_pairs.whole_messages,
        {"chosen_messages": [_USER, _A], "rejected_messages": [_USER, _B]},
    ),
    (
        "openai",
        "OpenAI's preference fine-tuning",
        "input, preferred_output, non_preferred_output",
        find_pairs.openai,
        {
            "input": {"messages": [_USER], "tools": []},
            "preferred_output": [_A],
            "non_preferred_output": [_B],
        },
    ),
    (
        "stack",
        "Stack Exchange paired",
        "question, response_j, response_k",
        find_pairs.stack,
        {"question": _Q, "response_j": _GOOD, "response_k": _BAD},
    ),
    (
        "ultrafeedback",
        "openbmb/UltraFeedback",
        "instruction, completions",
        find_groups.ultrafeedback,
        {
            "instruction": _Q,
            "completions": [
                {"response": _GOOD, "overall_score": 8.5},
                {"response": _BAD, "overall_score": 3.0},
            ],
        },
    ),
    (
        "nectar",
        "Nectar",
        "prompt, answers",
        find_groups.nectar,
        {
            "prompt": f"\n\nHuman: {_Q}\n\nAssistant: ",
            "answers": [{"answer": _GOOD, "rank": 1}, {"answer": _BAD, "rank": 2}],
        },
    ),
    (
        "feedback",
        "feedback tables",
        "prompt, response_1, response_2, preference or winner",
        find_groups.feedback,
        {**_TWO, "preference": 1},
    ),
    (
        "feedback_index",
        "PKU-SafeRLHF, and where preference is the index 0 or 1",
        "prompt, response_0, response_1, better_response_id",
        find_groups.feedback_index,
        {"prompt": _Q, "response_0": _GOOD, "response_1": _BAD, "better_response_id": 0},
    ),
    (
        "feedback_first",
        "feedback tables in which 1 says that the first is better",
        "prompt, response_1, response_2, preference",
        find_groups.feedback_first,
        {**_TWO, "preference": 1},
    ),
    (
        "helpsteer",
        "HelpSteer",
        "prompt or context, response_1, response_2, preference_strength",
        find_groups.helpsteer,
        {**_TWO, "preference_strength": -2},
    ),
    (
        "shp",
        "SHP",
        "history, human_ref_A, human_ref_B, labels",
        find_groups.shp,
        {"history": _Q, "human_ref_A": _GOOD, "human_ref_B": _BAD, "labels": 1},
    ),
    (
        "arena",
        "LMSYS arena",
        "conversation_a, conversation_b, winner",
        find_groups.arena,
        {"conversation_a": [_USER, _A], "conversation_b": [_USER, _B], "winner": "model_a"},
    ),
    (
        "arena_texts",
        "LMSYS arena at Kaggle",
        "prompt, response_a, response_b, winner_model_a, winner_model_b, winner_tie",
        find_groups.arena_texts,
        {
            "prompt": [_Q],
            "response_a": [_GOOD],
            "response_b": [_BAD],
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
    ),
    (
        "thumbs",
        "thumbs up and down",
        "prompt, response or completion, thumb, feedback or rating",
        find_groups.thumbs,
        {"prompt": _Q, "response": _GOOD, "thumb": "up"},
    ),
    (
        "labelled_messages",
        "LLaMA-Factory's and ms-swift's sets for KTO",
        "messages or conversations, [system], [tools], label or kto_tag",
        find_groups.labelled_messages,
        {"messages": [_USER, _A], "label": True},
    ),
)
LAYOUTS: Mapping[str, Layout] = {entry[0]: Layout(*entry) for entry in _ENTRIES}
