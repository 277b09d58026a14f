"""Rows of every layout, each with the messages, or the text, that are to be made of it."""

import json
from typing import Any

from data_samples import assistant, user

Row = dict[str, Any]

ASKED, GOOD, BAD = "What is 12 + 30?", "It is 42.", "It is 41."
SYSTEM = {"role": "system", "content": "Be brief."}
HISTORY = [user("Hi"), assistant("Hello!")]
CHAT = {"prompt": [user(ASKED)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
WITH_SYSTEM = CHAT | {"prompt": [SYSTEM, user(ASKED)]}
LONG = CHAT | {"prompt": [SYSTEM, *HISTORY, user(ASKED)]}
TEXT = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
SIDES = {"chosen": GOOD, "rejected": BAD}
WHOLE = {"chosen": [user(ASKED), assistant(GOOD)], "rejected": [user(ASKED), assistant(BAD)]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"name": "add", "arguments": {"a": 12, "b": 30}}


def human(text: str) -> Row:
    return {"from": "human", "value": text}


def gpt(text: str) -> Row:
    return {"from": "gpt", "value": text}


def calls(arguments: Any) -> Row:
    function = {"name": "add", "arguments": arguments}
    call = {"type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def compared(better: int | None, *, chat: bool = False, prompt: Any = None) -> Row:
    """Two answers, the good one first, as a group."""
    answers = [[assistant(GOOD)], [assistant(BAD)]] if chat else [GOOD, BAD]
    asked = prompt or ([user(ASKED)] if chat else ASKED)
    stated = [] if better is None else [[better, 1 - better]]
    return {"prompt": asked, "responses": answers, "comparisons": stated}


def listed(**said: Any) -> Row:
    answers = [[assistant(GOOD)], [assistant(BAD)]]
    return {"prompt": [user(ASKED)], "responses": answers, **said}


TWO = {"prompt": ASKED, "response_1": GOOD, "response_2": BAD}
CALLED_TALK = [
    {"from": "system", "value": "Be brief."},
    human(ASKED),
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "42"},
]
CALLED = [
    SYSTEM,
    user(ASKED),
    calls({"a": 12, "b": 30}),
    {"role": "tool", "content": "42"},
]
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: What is 12 + 30?\n\nAssistant: "

DETECTED: dict[str, list[tuple[Row, Row]]] = {
    "trl": [(TEXT, TEXT), ({"prompt": "q", "chosen": "a", "rejected": "b"},) * 2],
    "openai_calls": [
        (
            {**CHAT, "chosen": [calls('{"a": 12, "b": 30}')], "tools": json.dumps(TOOLS)},
            {**CHAT, "chosen": [calls({"a": 12, "b": 30})], "tools": TOOLS},
        ),
        ({**CHAT, "tools": None}, CHAT),
    ],
    "system": [
        (TEXT | {"system": "Be brief."}, WITH_SYSTEM),
        (TEXT | {"system": ""}, CHAT),
        (CHAT | {"system": "Be brief."}, WITH_SYSTEM),
        (WITH_SYSTEM | {"system": "Be brief."}, WITH_SYSTEM),
        (
            {
                "system": "Be brief.",
                "prompt": "<s>Be brief.\nHi",
                "chosen": GOOD,
                "rejected": BAD,
            },
            {"prompt": "<s>Be brief.\nHi", "chosen": GOOD, "rejected": BAD},
        ),
        ({"prompt": ASKED, "system": "Be brief.", **WHOLE}, WITH_SYSTEM),
    ],
    "alpaca": [
        ({"instruction": ASKED, "input": "", "history": [], "system": "", **SIDES}, CHAT),
        (
            {"instruction": "Add.", "input": "12, 30", "history": [], "system": "", **SIDES},
            CHAT | {"prompt": [user("Add.\n12, 30")]},
        ),
        (
            {
                "instruction": ASKED,
                "input": "",
                "system": "Be brief.",
                "history": [["Hi", "Hello!"]],
                **SIDES,
            },
            LONG,
        ),
    ],
    "orca": [
        ({"system": "Be brief.", "question": ASKED, **SIDES}, WITH_SYSTEM),
        ({"system": "", "question": ASKED, **SIDES}, CHAT),
        ({"system": None, "question": ASKED, **WHOLE}, CHAT),
    ],
    "argilla": [
        ({"instruction": ASKED, "chosen_response": GOOD, "rejected_response": BAD}, CHAT),
        (
            {"instruction": "Hi", "chosen_response": "a", "rejected_response": "b"},
            {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ),
    ],
    "sharegpt": [
        (
            {"conversations": [human(ASKED)], "chosen": gpt(GOOD), "rejected": gpt(BAD)},
            CHAT,
        ),
        (
            {
                "conversations": [human("Hi"), gpt("Hello!"), human(ASKED)],
                "chosen": gpt(GOOD),
                "rejected": gpt(BAD),
                "system": "Be brief.",
            },
            LONG,
        ),
        (
            {
                "conversations": CALLED_TALK,
                "chosen": gpt(GOOD),
                "rejected": gpt(BAD),
                "tools": json.dumps(TOOLS),
            },
            {**CHAT, "prompt": CALLED, "tools": TOOLS},
        ),
        (
            {
                "conversations": [human(ASKED)],
                "chosen": {"from": "function_call", "value": json.dumps([CALL])},
                "rejected": gpt(BAD),
            },
            CHAT | {"chosen": [calls(CALL["arguments"])]},
        ),
    ],
    "axolotl": [
        ({"messages": [user(ASKED)], "chosen": assistant(GOOD), "rejected": assistant(BAD)}, CHAT),
        (
            {
                "messages": [SYSTEM, *HISTORY, user(ASKED)],
                "chosen": assistant(GOOD),
                "rejected": assistant(BAD),
            },
            LONG,
        ),
        (
            {
                "messages": [SYSTEM, user(ASKED), calls('{"a": 12, "b": 30}'), CALLED[-1]],
                "chosen": assistant(GOOD),
                "rejected": assistant(BAD),
            },
            CHAT | {"prompt": CALLED},
        ),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}],
                "chosen": {"role": "assistant", "content": [{"type": "text", "text": GOOD}]},
                "rejected": assistant(BAD),
            },
            CHAT,
        ),
    ],
    "swift": [
        ({"messages": [user(ASKED), assistant(GOOD)], "rejected_response": BAD}, CHAT),
        (
            {
                "messages": [SYSTEM, *HISTORY, user(ASKED), assistant(GOOD)],
                "rejected_response": BAD,
            },
            LONG,
        ),
    ],
    "swift_query": [
        ({"query": ASKED, "response": GOOD, "rejected_response": BAD, "history": []}, CHAT),
        (
            {
                "query": ASKED,
                "response": GOOD,
                "rejected_response": BAD,
                "history": [["Hi", "Hello!"]],
                "system": "Be brief.",
            },
            LONG,
        ),
    ],
    "whole_messages": [
        ({f"{side}_messages": talk for side, talk in WHOLE.items()}, WHOLE),
        (
            {
                f"{side}_messages": [
                    {**message, "content": [{"type": "text", "value": message["content"]}]}
                    for message in [SYSTEM, *talk]
                ]
                for side, talk in WHOLE.items()
            },
            WITH_SYSTEM,
        ),
    ],
    "openai": [
        (
            {
                "input": {"messages": [user(ASKED)], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [assistant(GOOD)],
                "non_preferred_output": [assistant(BAD)],
            },
            CHAT,
        ),
        (
            {
                "input": {"messages": [user(ASKED)], "tools": TOOLS},
                "preferred_output": [calls('{"a": 12, "b": 30}')],
                "non_preferred_output": [assistant(BAD)],
            },
            {**CHAT, "chosen": [calls(CALL["arguments"])], "tools": TOOLS},
        ),
    ],
    "stack": [
        ({"question": ASKED, "response_j": GOOD, "response_k": BAD}, CHAT),
    ],
    "ultrafeedback": [
        (
            {
                "instruction": ASKED,
                "completions": [
                    {"response": GOOD, "overall_score": 8.5, "model": "m"},
                    {"response": BAD, "overall_score": 3, "critique": "No."},
                ],
            },
            listed(scores=[8.5, 3.0]),
        ),
    ],
    "nectar": [
        (
            {
                "prompt": TRANSCRIPT,
                "answers": [{"answer": GOOD, "rank": 1.0}, {"answer": BAD, "rank": 2.0}],
            },
            listed(rankings=[1, 2]) | {"prompt": [*HISTORY, user(ASKED)]},
        ),
    ],
    "feedback": [
        (TWO | {"preference": 1}, compared(0)),
        (TWO | {"preference": 2}, compared(1)),
        (TWO | {"prompt": "Hi", "preference": 2}, compared(1, prompt="Hi")),
    ],
    "feedback_index": [
        (
            {"prompt": ASKED, "response_0": GOOD, "response_1": BAD, "better_response_id": 0},
            compared(0),
        ),
        (
            {"prompt": ASKED, "response_0": GOOD, "response_1": BAD, "better_response_id": 1},
            compared(1),
        ),
    ],
    "helpsteer": [
        (TWO | {"preference_strength": -2}, compared(0)),
        (TWO | {"preference_strength": 3}, compared(1)),
    ],
    "shp": [
        (
            {"history": ASKED, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
            compared(0, chat=True),
        ),
        (
            {"history": ASKED, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 0},
            compared(1, chat=True),
        ),
    ],
    "arena": [
        (
            {
                "conversation_a": [user(ASKED), assistant(GOOD)],
                "conversation_b": [user(ASKED), assistant(BAD)],
                "winner": "model_a",
            },
            compared(0, chat=True),
        ),
        (
            {
                "conversation_a": [*HISTORY, user(ASKED), assistant(GOOD)],
                "conversation_b": [*HISTORY, user(ASKED), assistant(BAD)],
                "winner": "model_b",
            },
            compared(1, chat=True, prompt=[*HISTORY, user(ASKED)]),
        ),
    ],
    "arena_texts": [
        (
            {
                "prompt": json.dumps([ASKED]),
                "response_a": json.dumps([GOOD]),
                "response_b": json.dumps([BAD]),
                "winner_model_a": 0,
                "winner_model_b": 1,
                "winner_tie": 0,
            },
            compared(1, chat=True),
        ),
    ],
    "thumbs": [
        (
            {"prompt": ASKED, "response": GOOD, "thumb": "up"},
            {"prompt": ASKED, "completion": GOOD, "label": True},
        ),
        (
            {"prompt": "Hi", "response": BAD, "thumb": "down"},
            {"prompt": "Hi", "completion": BAD, "label": False},
        ),
    ],
    "labelled_messages": [
        (
            {"messages": [user(ASKED), assistant(GOOD)], "label": True},
            {"prompt": [user(ASKED)], "completion": [assistant(GOOD)], "label": True},
        ),
        (
            {"messages": [SYSTEM, *HISTORY, user(ASKED), assistant(BAD)], "label": False},
            {"prompt": LONG["prompt"], "completion": [assistant(BAD)], "label": False},
        ),
    ],
}
"""Layouts that the columns tell: rows of one data set, and what is to be made of each."""

NAMED: dict[str, list[tuple[Row, Row]]] = {
    "alpaca_output": [
        ({"instruction": ASKED, "input": "", "output": [GOOD, BAD]}, CHAT),
        (
            {"instruction": "Add.", "input": "12, 30", "output": [GOOD, BAD]},
            CHAT | {"prompt": [user("Add.\n12, 30")]},
        ),
    ],
    "hh": [
        (
            {"chosen": f"{TRANSCRIPT}{GOOD}", "rejected": f"{TRANSCRIPT}{BAD}"},
            CHAT | {"prompt": [*HISTORY, user(ASKED)]},
        ),
    ],
    "scored_pair": [
        (
            {"prompt": ASKED, **WHOLE, "score_chosen": 8.5, "score_rejected": 3.0},
            listed(scores=[8.5, 3.0]),
        ),
    ],
    "feedback_first": [
        (TWO | {"preference": 1}, compared(0)),
        (TWO | {"preference": 0}, compared(1)),
    ],
    "feedback_index": [
        (TWO | {"preference": 1}, compared(1)),
        (TWO | {"preference": 0}, compared(0)),
    ],
}
"""Layouts that only the key `layout` tells, or that it decides."""

BAD_VALUES: dict[str, tuple[Row, str]] = {
    "trl": ({"chosen": 3}, "chosen: expected text or a list of messages, found the number 3"),
    "openai_calls": (
        {"chosen": [calls("add(12, 30)")]},
        "chosen[0].tool_calls[0].function.arguments: expected JSON of an object, found text",
    ),
    "system": ({"system": 5}, "system: expected text, found the number 5"),
    "alpaca": ({"instruction": None}, "instruction: expected text, found null"),
    "orca": ({"question": ["a"]}, "question: expected text, found a list of 1"),
    "argilla": ({"chosen_response": 4}, "chosen_response: expected an answer: text, a message"),
    "sharegpt": (
        {"conversations": [{"from": "robot", "value": "Hi"}]},
        "conversations[0].from: unknown speaker 'robot'; expected one of human, user, gpt",
    ),
    "axolotl": (
        {"messages": [user("Hi"), assistant("so")]},
        "messages: ends with the assistant's message, which is neither of the answers",
    ),
    "swift": (
        {"messages": [user("Hi")]},
        "messages: ends with a user message; expected the better",
    ),
    "swift_query": ({"history": "Hi"}, "history: expected pairs such as [[question, answer]]"),
    "openai": ({"input": "Hi"}, "input: expected an object with messages, found text"),
    "stack": ({"response_k": None}, "response_k: expected an answer: text, a message or a list"),
    "ultrafeedback": (
        {"completions": [{"response": "a", "overall_score": None}]},
        "completions[0].overall_score: expected a number, found null",
    ),
    "nectar": ({"prompt": "What?"}, "prompt: does not begin with 'Human:'"),
    "feedback": (
        {"preference": "neither of us"},
        "preference: expected 1 or 2, A or B, model_a or model_b, or tie, found",
    ),
    "feedback_index": (
        {"better_response_id": 2},
        "better_response_id: expected 0 for the first answer or 1 for the second, found 2",
    ),
    "helpsteer": (
        {"preference_strength": "much"},
        'preference_strength: expected a number, below 0 where the first is better, found "much"',
    ),
    "shp": ({"labels": 7}, "labels: expected 1 for the first answer or 0 for the second, found 7"),
    "arena": (
        {"conversation_b": [user("Other?"), assistant("b")]},
        "conversation_b: shares no first message with conversation_a",
    ),
    "arena_texts": ({"winner_tie": 1}, "winner_model_a: 2 of winner_model_a, winner_model_b"),
    "thumbs": ({"thumb": None}, "thumb: expected up or down (true or false, 1 or 0, +1 or -1)"),
    "whole_messages": (
        {"rejected_messages": 3},
        "rejected_messages: expected a list of messages, found the number 3",
    ),
    "labelled_messages": (
        {"messages": [user("Hi")]},
        "messages: ends with a user message; expected the answer, the assistant's, at its end",
    ),
}
"""Of each layout that the columns tell: a change that spoils a row, and what is said of it."""
