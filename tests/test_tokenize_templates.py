"""What chat templates leave out and what stands twice: seen, said, and where it is not the template
that decides, tokens are TRL's.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import (
    CHATML,
    PAIR,
    TURNS,
    assistant,
    chat,
    error_of,
    make_tokenizer,
    report_of,
    user,
)
from like_trl import assert_like_trl
from test_tokenize import OwnTemplate
from transformers import PreTrainedTokenizerBase

from fastdpo.data.load import load_rows
from fastdpo.data.notes import (
    CONTENT_DROPPED,
    DOUBLE_BOS,
    DOUBLE_EOS,
    EMPTY_RESPONSE,
    NOT_THE_ASSISTANT,
    TOOLS_IGNORED,
)

pytestmark = pytest.mark.usefixtures("datasets_cache")

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ONE_CALL = PLAIN.replace(
    "{{ eos", "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}{{ eos"
)
OLD_CALL = PLAIN.replace(
    "{{ eos", "{% if m.function_call %}{{ m.function_call | tojson }}{% endif %}{{ eos"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if 'image' in p %}<image>{% endif %}{{ p.text }}"
    "{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_THINKING = PLAIN.replace("m.content |", "m.content.split('</think>')[-1] |")
ALL_THINKING = PLAIN.replace("{{ m.content", "<think>{{ m.reasoning_content }}</think>{{ m.content")
NAMED = PLAIN.replace("[{{ m.role }}]", "[{{ m.role }} {{ m.name }}]")

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add numbers."}}]


def calling(*names: str, **more: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": n, "arguments": '{"a": 1}'}} for n in names]
    return {"role": "assistant", "content": None, "tool_calls": calls} | more


CALLS = {
    "prompt": [user("What is 1 + 1?")],
    "chosen": [calling("add")],
    "rejected": [calling("subtract")],
    "tools": TOOLS,
}
RESULT = {"role": "tool", "content": "2"}
CALLED = chat([user("What is 1 + 1?"), calling("add"), RESULT], "2", "3", tools=TOOLS)


def test_calls_are_rendered_like_trl(tokenizer: PreTrainedTokenizerBase) -> None:
    for row in (CALLS, CALLED):
        made = assert_like_trl([row], tokenizer)
        assert "add" in tokenizer.decode(made[0]["prompt_ids"])
    assert report_of([CALLS], tokenizer).noted[EMPTY_RESPONSE] == 0


@pytest.mark.parametrize(
    ("row", "template", "field"),
    [
        (CALLS, PLAIN, "chosen[0].tool_calls[0]"),
        (CALLED, PLAIN, "prompt[1].tool_calls[0]"),
        # The tools are rendered, which have the functions' names as well.
        (CALLS, CHATML.replace("m.tool_calls", "false"), "chosen[0].tool_calls[0]"),
        (
            CALLS | {"chosen": [calling("add", content="Let me add.")]},
            PLAIN,
            "chosen[0].tool_calls",
        ),
        (CALLS | {"rejected": [calling("add", "add")]}, ONE_CALL, "rejected[0].tool_calls[1]"),
        (
            CALLS | {"chosen": [{"role": "assistant", "function_call": {"name": "add"}}]},
            CHATML,
            "chosen[0].function_call",
        ),
    ],
)
def test_a_template_without_calls_is_named(row: dict[str, Any], template: str, field: str) -> None:
    message = error_of([row], make_tokenizer(template))
    assert message.startswith(f"dataset, row 1: {field}"), message
    assert "the chat template renders nothing of it" in message


def test_a_call_of_the_older_kind_like_trl() -> None:
    row = chat([user("Hi")], "a", "b") | {
        side: [{"role": "assistant", "content": "", "function_call": {"name": side}}]
        for side in ("chosen", "rejected")
    }
    assert_like_trl([row], make_tokenizer(OLD_CALL))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (calling(tool_calls="[]"), "chosen[0].tool_calls: expected a list of calls, found text"),
        (calling(tool_calls=[{"id": "a"}]), "chosen[0].tool_calls[0]: expected a call with a func"),
        (
            calling(function_call={"x": 1}),
            "chosen[0].function_call: expected a call with a function",
        ),
    ],
)
def test_calls_that_are_none(
    message: dict[str, Any], reason: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert error_of([CALLS | {"chosen": [message]}], tokenizer).startswith(
        f"dataset, row 1: {reason}"
    )


def test_a_tokenizer_with_its_own_template_that_drops_calls(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    own = OwnTemplate(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    row = CALLS | {
        "chosen": [calling("add", content="a")],
        "rejected": [assistant("b")],
        "tools": None,
    }
    assert error_of([row], own).startswith("dataset, row 1: chosen[0].tool_calls[0]: the chat")


def test_tools_that_are_not_rendered(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [chat([user("Hi")], "a", "b", tools=tools) for tools in (TOOLS, None)]
    assert_like_trl(rows, make_tokenizer(PLAIN))
    caplog.clear()
    assert report_of(rows, make_tokenizer(PLAIN)).noted[TOOLS_IGNORED] == 1
    assert "in 1 of 2 rows the chat template renders nothing of the tools" in caplog.text
    assert report_of(rows, tokenizer).noted[TOOLS_IGNORED] == 0
    assert report_of([PAIR | {"tools": TOOLS}], tokenizer).noted[TOOLS_IGNORED] == 1


def thinking(text: str, answer: str) -> dict[str, Any]:
    return assistant(answer) | {"reasoning_content": text}


def test_responses_that_differ_in_dropped_thinking(tokenizer: PreTrainedTokenizerBase) -> None:
    row = chat([user("Hi")], "<think>a</think>42", "<think>b</think>42")
    assert error_of([row], make_tokenizer(NO_THINKING)) == (
        "dataset, row 1: chosen and rejected: differ in [0].content, but the chat template drops "
        "the part in which they differ; expected a template that renders it"
    )
    assert_like_trl([row], tokenizer)
    row = row | {"chosen": [thinking("a", "42")], "rejected": [thinking("b", "42")]}
    assert "differ in [0].reasoning_content, but the chat template" in error_of([row], tokenizer)
    assert_like_trl([row], make_tokenizer(ALL_THINKING))
    assert report_of([row], make_tokenizer(ALL_THINKING)).noted[CONTENT_DROPPED] == 0
    parted = [{"type": "text", "text": "42"}]
    same = row | {
        "chosen": [assistant("42")],
        "rejected": [{"role": "assistant", "content": parted}],
    }
    assert "are identical" in error_of([same], tokenizer)


def test_dropped_contents_are_said(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [chat([user("Hi")], "<think>a</think> 42", "41"), chat(TURNS, "\n a  b ", "b")]
    assert_like_trl(rows, make_tokenizer(NO_THINKING))
    caplog.clear()
    # That earlier turns lose their thinking is how the model will see them, too.
    assert report_of(rows, make_tokenizer(NO_THINKING)).noted[CONTENT_DROPPED] == 1
    assert "in 1 of 2 rows the chat template drops or rewrites" in caplog.text
    row = chat([user("Hi")], "a", "b") | {"chosen": [thinking("because", "a")]}
    assert report_of([row], tokenizer).noted[CONTENT_DROPPED] == 1
    named = chat([user("Hi") | {"name": "Ann"}], "a", "b")
    assert report_of([named], tokenizer).noted[CONTENT_DROPPED] == 1
    assert report_of([named], make_tokenizer(NAMED)).noted[CONTENT_DROPPED] == 0
    assert report_of(rows, tokenizer).noted[CONTENT_DROPPED] == 0


def parted(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The row with every content split into two parts of text."""
    row = copy.deepcopy(row)
    for message in (*row["prompt"], *row["chosen"], *row["rejected"]):
        half, text = len(message["content"]) // 2, message["content"]
        message["content"] = [
            {"type": "text", "text": part, **more} for part in (text[:half], text[half:])
        ]
    return row


SPOKEN = [chat([user("What is 12 + 30?")], "It is 42.", "It is 41."), chat(TURNS, "42", "4 2")]


def test_parts_of_text_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [parted(row) for row in SPOKEN]
    assert_like_trl(rows, tokenizer, clean=SPOKEN)
    assert_like_trl(rows, make_tokenizer(PLAIN), clean=SPOKEN)
    spaced = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    assert_like_trl(rows, make_tokenizer(spaced), clean=SPOKEN)


def test_a_template_that_reads_parts_like_trl() -> None:
    between = make_tokenizer(PARTS.replace("{{ p.text }}", "{{ p.text }}|"))
    rows = [parted(row) for row in SPOKEN]
    made = assert_like_trl(rows, between)
    assert "What is |12 + 30?|" in between.decode(made[0]["prompt_ids"])


def test_nulls_that_a_table_adds_are_no_images() -> None:
    """A table gives every part the fields of all; TRL's template then sees an image."""
    rows = [parted(row, image=None) for row in SPOKEN]
    assert_like_trl(rows, make_tokenizer(PARTS), clean=SPOKEN)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "image", "image": "a.png"}], "[0]: is a part of type image; only text can be"),
        ([{"type": "image_url", "image_url": "a"}], "[0]: is a part of type image_url; only text"),
        (["Hi"], "[0]: expected a part such as"),
        ([{"type": "text"}], "[0]: expected a part such as"),
        ([{"type": "note", "text": "Hi"}], "[0]: the chat template does not render a part of type"),
        ([], ": missing; expected text"),
    ],
)
def test_parts_that_are_no_text(
    content: list[Any], reason: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = chat([{"role": "user", "content": content}], "a", "b")
    assert error_of([row], tokenizer).startswith(f"dataset, row 1: prompt[0].content{reason}")


def test_results_of_tools_may_be_anything(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    results: list[Any] = [[1, 2], {"temperature": 3}, [{"temperature": 3}]]
    rows = [
        chat([user("Hi"), calling("add"), {"role": "tool", "content": content}], "2", "3")
        for content in results
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert_like_trl(load_rows(str(path), "train"), tokenizer)


RENDERED = {"prompt": "<s>user Hi", "chosen": " yes</s>\n", "rejected": " no</s>"}


def test_bos_and_eos_twice_like_trl(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(bos=True)
    made = assert_like_trl([RENDERED, PAIR], tokenizer)
    assert made[0]["prompt_ids"][:2] == [tokenizer.bos_token_id] * 2
    assert made[0]["response_ids"][0].count(tokenizer.eos_token_id) == 2
    caplog.clear()
    report = report_of([RENDERED, PAIR], tokenizer)
    assert (report.noted[DOUBLE_BOS], report.noted[DOUBLE_EOS]) == (1, 1)
    assert "in 1 of 2 rows the tokens begin with BOS twice, as in TRL" in caplog.text
    assert "in 1 of 2 rows the tokens end with EOS twice, as in TRL" in caplog.text
    assert report_of([RENDERED], make_tokenizer()).noted[DOUBLE_BOS] == 0


def test_a_template_that_ends_twice() -> None:
    twice = make_tokenizer(PLAIN.replace("{{ eos_token }}", "{{ eos_token }}\n{{ eos_token }}\n"))
    assert_like_trl(SPOKEN, twice)
    assert report_of(SPOKEN, twice).noted[DOUBLE_EOS] == 2
    assert report_of(SPOKEN, make_tokenizer(PLAIN)).noted[DOUBLE_EOS] == 0


def test_responses_that_are_nothing_but_their_end(tokenizer: PreTrainedTokenizerBase) -> None:
    rows: list[Any] = [PAIR | {"chosen": text} for text in ("", "</s>", " ", "a")]
    report = report_of(rows, tokenizer)
    assert report.noted[EMPTY_RESPONSE] == 3
    assert "; 3 with a response that is nothing but its end" in str(report)
    talks = [chat([user("Hi")], chosen, "b") for chosen in ("", "a")]
    assert report_of(talks, tokenizer).noted[EMPTY_RESPONSE] == 1


def test_responses_that_are_not_the_assistants(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {side: [user("Hi"), assistant(side)] for side in ("chosen", "rejected")}
    rows = [
        chat([user("Hi")], "a", "b"),
        chat([user("Hi")], "a", "b") | {"chosen": [assistant("a"), user("And?")]},
        {"prompt": [assistant("Hello")]} | asked,
        {"prompt": TURNS, "chosen": [assistant("a"), *TURNS[:2]], "rejected": [assistant("b")]},
    ]
    assert_like_trl(rows, tokenizer)
    caplog.clear()
    assert report_of(rows, tokenizer).noted[NOT_THE_ASSISTANT] == 2
    assert "in 2 of 4 rows a response begins or ends with a message" in caplog.text
