"""Every layout of preference data is read as the messages, or the text, that it means.

Tokens are compared with those of rows written by hand in TRL's columns, and what cannot be read is
named with its file, its line and its column.
"""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from data_samples import assistant, chat, error_of, tokenize, tokenize_rows, user
from datasets import Dataset
from layout_samples import (
    ASKED,
    BAD,
    BAD_VALUES,
    CHAT,
    DETECTED,
    GOOD,
    NAMED,
    TEXT,
    TRANSCRIPT,
    TWO,
    WHOLE,
    Row,
    calls,
    compared,
    gpt,
    human,
)
from transformers import PreTrainedTokenizerBase

from fastdpo.config.datasets import FIELDS as MAPPED_FIELDS
from fastdpo.config.datasets import LAYOUTS as LAYOUT_NAMES
from fastdpo.data.columns import FIELDS, row_kinds
from fastdpo.data.layouts.registry import LAYOUTS
from fastdpo.data.load import load_rows
from fastdpo.data.needs import Needs
from fastdpo.data.notes import UNREAD_COLUMN
from fastdpo.errors import DataError

pytestmark = pytest.mark.usefixtures("datasets_cache")

ANY = Needs(("comparisons", "label", "scores", "ranks"))
COLUMNS = (
    "prompt_ids",
    "response_ids",
    "winners",
    "losers",
    "labels",
    "scores",
    "ranks",
)


def write(path: Path, rows: list[Row]) -> Path:
    """Rows as the file that the path names; in CSV, all that is no text is JSON."""
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items() if v}
                )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, rows: list[Row], **options: Any) -> Dataset:
    return load_rows(str(write(path, rows)), "train", **options)


def refusal(path: Path, rows: list[Row], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(path, rows, **options)
    return str(caught.value)


def assert_same_tokens(
    read: Dataset, expected: list[Row], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The same tokens as rows in TRL's columns, each of which is tokenised by itself."""
    made = tokenize_rows(read, tokenizer, needs=ANY)
    theirs = [tokenize_rows([row], tokenizer, needs=ANY)[0] for row in expected]
    assert [{n: row[n] for n in COLUMNS} for row in made] == [
        {n: row[n] for n in COLUMNS} for row in theirs
    ]


def parted(cases: list[tuple[Row, Row]]) -> tuple[list[Row], list[Row]]:
    """Rows with the same columns in all, and what is to be made of each."""
    names = dict.fromkeys(name for row, _ in cases for name in row)
    return [dict.fromkeys(names) | row for row, _ in cases], [made for _, made in cases]


@pytest.mark.parametrize("kind", ["jsonl", "json.text"])
@pytest.mark.parametrize("layout", DETECTED)
def test_a_layout_is_told_from_its_columns(
    tmp_path: Path,
    kind: str,
    layout: str,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows, expected = parted(DETECTED[layout])
    if kind == "json.text":
        rows = [
            {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
            for row in rows
        ]
    with caplog.at_level(logging.INFO):
        read = load(tmp_path / "data.jsonl", rows)
    name = "TRL's columns" if layout == "trl" else layout
    assert f"data.jsonl is read as {name} (" in caplog.text
    assert_same_tokens(read, expected, tokenizer)


@pytest.mark.parametrize("layout", DETECTED)
def test_a_layout_in_parquet(
    tmp_path: Path, layout: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, expected = parted(DETECTED[layout][:1])
    assert_same_tokens(load(tmp_path / "data.parquet", rows), expected, tokenizer)


@pytest.mark.parametrize("layout", ["alpaca", "sharegpt", "axolotl", "feedback", "thumbs"])
def test_a_layout_in_csv(tmp_path: Path, layout: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rows, expected = parted(DETECTED[layout])
    assert_same_tokens(load(tmp_path / "data.csv", rows), expected, tokenizer)


@pytest.mark.parametrize("layout", NAMED)
def test_a_layout_is_named(tmp_path: Path, layout: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rows, expected = parted(NAMED[layout])
    assert_same_tokens(load(tmp_path / "data.jsonl", rows, layout=layout), expected, tokenizer)


@pytest.mark.parametrize("layout", DETECTED)
def test_a_layout_that_is_told_may_be_named(
    tmp_path: Path, layout: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, expected = parted(DETECTED[layout])
    assert_same_tokens(load(tmp_path / "data.jsonl", rows, layout=layout), expected, tokenizer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_example_of_a_layout_is_one(
    tmp_path: Path, layout: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    read = load(tmp_path / "data.jsonl", [dict(LAYOUTS[layout].example)], layout=layout)
    (made,) = tokenize_rows(read, tokenizer, needs=ANY)
    texts = [tokenizer.decode(ids) for ids in (made["prompt_ids"], *made["response_ids"])]
    assert "Is ice lighter than water?" in texts[0]
    assert "Yes, so it floats." in texts[1] or "look_up" in texts[1]


@pytest.mark.parametrize("layout", DETECTED)
def test_a_bad_row_is_named(
    tmp_path: Path, layout: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    change, reason = BAD_VALUES[layout]
    rows, _ = parted(DETECTED[layout][:1])
    path = tmp_path / "data.jsonl"
    read = load(path, [rows[0], rows[0] | change])
    message = error_of(read, tokenizer, source=str(path), needs=ANY)
    assert message.startswith(f"{path}, line 2: {reason}")
    made, report = tokenize(read, tokenizer, source=str(path), needs=ANY, skip_bad_rows=True)
    assert (len(made), report.skipped) == (1, 1)
    assert report.reasons[0] == message


@pytest.mark.parametrize("layout", [name for name in DETECTED if name != "trl"])
def test_a_row_without_a_field_is_named(
    tmp_path: Path, layout: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, _ = parted(DETECTED[layout][:1])
    needed = {
        "openai_calls": "chosen",
        "system": "rejected",
        "alpaca": "chosen",
        "orca": "question",
        "sharegpt": "rejected",
        "axolotl": "messages",
        "feedback": "response_2",
        "helpsteer": "preference_strength",
        "thumbs": "response",
        "swift_query": "rejected_response",
    }
    field = needed.get(layout) or list(rows[0])[-1]
    path = tmp_path / "data.jsonl"
    read = load(path, [rows[0], {k: v for k, v in rows[0].items() if k != field}])
    message = error_of(read, tokenizer, source=str(path), needs=ANY)
    assert message.startswith(f"{path}, line 2: ")
    assert field in message


def test_a_column_of_several_types(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"messages": [user(ASKED)], "chosen": GOOD, "rejected": assistant(BAD)},
        {"messages": json.dumps([user(ASKED)]), "chosen": [assistant(GOOD)], "rejected": BAD},
        {"messages": user(ASKED), "chosen": json.dumps([assistant(GOOD)]), "rejected": [gpt(BAD)]},
    ]
    assert_same_tokens(load(tmp_path / "data.jsonl", rows), [CHAT] * 3, tokenizer)


def test_a_text_that_looks_like_a_number_stays_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [
        {"instruction": "42", "chosen": "1e3", "rejected": "007"},
        {"instruction": "42", "chosen": [assistant("1e3")], "rejected": "007"},
    ]
    expected = chat([user("42")], "1e3", "007")
    assert_same_tokens(load(tmp_path / "data.jsonl", rows), [expected] * 2, tokenizer)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_arguments_of_a_late_row_are_objects(
    tmp_path: Path, kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    called = CHAT | {"chosen": [calls('{"a": 12, "b": 30}')]}
    read = load(tmp_path / f"data.{kind}", [CHAT] * 60 + [called])
    expected = CHAT | {"chosen": [calls({"a": 12, "b": 30})]}
    assert_same_tokens(read.select([0, 60]), [CHAT, expected], tokenizer)
    as_they_are = load_rows(str(tmp_path / f"data.{kind}"), "train", layout="trl")
    assert as_they_are.column_names == ["prompt", "chosen", "rejected"]


def test_text_about_arguments_is_no_call(tmp_path: Path) -> None:
    rows = [TEXT, TEXT | {"chosen": '[{"role": "tool", "arguments": "x"}'}]
    assert load(tmp_path / "data.jsonl", rows).column_names == ["prompt", "chosen", "rejected"]


def test_sharegpt_pairs_of_whole_conversations(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"chosen": [human(ASKED), gpt(GOOD)], "rejected": [human(ASKED), gpt(BAD)]}]
    assert_same_tokens(load(tmp_path / "data.jsonl", rows), [CHAT], tokenizer)
    copied = [row | {"conversations": row["chosen"]} for row in rows]
    assert_same_tokens(load(tmp_path / "copied.jsonl", copied), [CHAT], tokenizer)
    asked = [row | {"conversations": [human(ASKED)]} for row in rows]
    assert_same_tokens(load(tmp_path / "asked.jsonl", asked), [CHAT], tokenizer)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"response_1": GOOD, "response_2": BAD, "preference": 1}, compared(0, chat=True)),
        ({"response_0": GOOD, "response_1": BAD, "winner": 1}, compared(1, chat=True)),
        (
            {"response_1": GOOD, "response_2": BAD, "preference_strength": -2},
            compared(0, chat=True),
        ),
        ({"output": GOOD, "kto_tag": True}, {"completion": [assistant(GOOD)], "label": True}),
        (
            {
                "completions": [
                    {"response": GOOD, "overall_score": 2},
                    {"response": BAD, "overall_score": 1},
                ]
            },
            {"responses": [[assistant(GOOD)], [assistant(BAD)]], "scores": [2, 1]},
        ),
    ],
)
def test_verdicts_follow_the_whole_of_what_is_asked(
    tmp_path: Path, said: Row, expected: Row, tokenizer: PreTrainedTokenizerBase
) -> None:
    """An instruction with its input, its history and its system prompt, as in Alpaca."""
    before = {"system": "Be brief.", "history": [["Hi", "Hello!"]]}
    turns = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello!")]
    rows = [{"instruction": "Add.", "input": "12, 30", **before, **said}]
    prompt = [*turns, user("Add.\n12, 30")]
    assert_same_tokens(load(tmp_path / "a.jsonl", rows), [expected | {"prompt": prompt}], tokenizer)
    if "completions" not in said:
        rows = [{"prompt": "Add.", "history": [["Hi", "Hello!"]], **said}]
        expected = expected | {"prompt": [*turns[1:], user("Add.")]}
        assert_same_tokens(load(tmp_path / "b.jsonl", rows), [expected], tokenizer)


ROLE_JSON = '{"role": "assistant", "content": "x"}'
MAIL = '{"from": "bob", "to": "al"}'
MAILS = '[{"from": "bob", "to": "al"}, {"from": "human", "value": "x"}]'


@pytest.mark.parametrize("answers", [(ROLE_JSON, "nope"), (MAILS, "nope"), (MAIL, MAIL + " ")])
def test_an_answer_that_is_json_is_text(tmp_path: Path, answers: tuple[str, str]) -> None:
    """Rows that ask for JSON get it with `role` or `from` in it."""
    one, other = answers
    two = {"response_1": one, "response_2": other, "preference": 1}
    pair = chat([user("q")], one, other)
    chats = {"prompt": [user("q")], "responses": [[assistant(one)], [assistant(other)]]}
    texts = {"prompt": "q", "responses": [one, other]}
    first = {"comparisons": [[0, 1]]}
    columns = {"prompt": "q", "responses": ["a", "b"], "scores": "s"}
    cases: list[tuple[Row, Row, dict[str, Any]]] = [
        ({"instruction": "q", "chosen": one, "rejected": other}, pair, {}),
        ({"instruction": "q", "output": [one, other]}, pair, {"layout": "alpaca_output"}),
        ({"instruction": "q", **two}, chats | first, {}),
        ({"prompt": "q", **two}, texts | first, {}),
        (
            {"q": "q", "a": one, "b": other, "s": [2, 1]},
            texts | {"scores": [2, 1]},
            {"columns": columns},
        ),
    ]
    for number, (row, expected, how) in enumerate(cases):
        read = load(tmp_path / f"{number}.jsonl", [row], **how)
        made = {name: read[0][name] for name in expected}
        assert made == expected, read[0]


@pytest.mark.parametrize("place", [0, -1])
def test_one_cut_answer_makes_no_text_of_messages_as_json(tmp_path: Path, place: int) -> None:
    rows = [
        {"instruction": "q"}
        | {name: json.dumps(assistant(f"{name[0]}{i}")) for name in ("chosen", "rejected")}
        for i in range(4)
    ]
    rows[place]["rejected"] = rows[place]["rejected"][:-3]
    read = load(tmp_path / "data.jsonl", rows)
    assert read["chosen"][:] == [[assistant(f"c{i}")] for i in range(4)]
    assert read[place]["rejected"] == [assistant(rows[place]["rejected"])]


def test_thumbs_for_answers_of_which_one_is_json(tmp_path: Path) -> None:
    rows = [{"question": "q", "response": text, "thumb": "up"} for text in (ROLE_JSON, "nope")]
    made = load(tmp_path / "data.jsonl", rows)["completion"][:]
    assert made == [[assistant(ROLE_JSON)], [assistant("nope")]]


def test_a_conversation_that_holds_the_better_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"messages": WHOLE["chosen"], "chosen": GOOD, "rejected": BAD}]
    assert_same_tokens(load(tmp_path / "data.jsonl", rows), [CHAT], tokenizer)


def test_two_whole_conversations_of_ms_swift(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"messages": WHOLE["chosen"], "rejected_messages": WHOLE["rejected"]}]
    assert_same_tokens(load(tmp_path / "data.jsonl", rows), [CHAT], tokenizer)


def test_transcripts_are_text_unless_the_key_says_otherwise(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"chosen": TRANSCRIPT + GOOD, "rejected": TRANSCRIPT + BAD}]
    with caplog.at_level(logging.INFO):
        read = load(tmp_path / "data.jsonl", rows)
    assert "read as text, as in TRL; layout: hh reads them as messages" in caplog.text
    expected = {"prompt": f"{TRANSCRIPT}It is", "chosen": " 42.", "rejected": " 41."}
    made, theirs = tokenize_rows(read, tokenizer), tokenize_rows([rows[0]], tokenizer)
    assert made == theirs
    prompt = tokenizer.decode(made[0]["prompt_ids"] + made[0]["response_ids"][0])
    assert prompt == expected["prompt"] + expected["chosen"] + tokenizer.eos_token


@pytest.mark.parametrize(
    ("verdict", "better"),
    [
        ("A", 0),
        ("b", 1),
        ("model_a", 0),
        ("Model B", 1),
        ("response_1", 0),
        ("2", 1),
        (2.0, 1),
    ],
)
def test_words_for_the_better_answer(
    tmp_path: Path, verdict: Any, better: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    read = load(tmp_path / "data.jsonl", [TWO | {"winner": verdict}])
    assert_same_tokens(read, [compared(better)], tokenizer)


@pytest.mark.parametrize("tie", ["tie", "tie (bothbad)", "Both", "equal", "draw"])
def test_ties_are_dropped_and_counted(
    tmp_path: Path, tie: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [TWO | {"winner": "model_a"}, TWO | {"winner": tie}]
    made, report = tokenize(load(tmp_path / "data.jsonl", rows), tokenizer)
    assert (len(made), report.rows_in, report.rows_out) == (1, 2, 1)


def test_no_strength_is_a_tie(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [TWO | {"preference_strength": n} for n in (-1, 0, 1)]
    made, _ = tokenize(load(tmp_path / "data.jsonl", rows), tokenizer)
    assert [row["winners"] for row in made] == [[0], [1]]


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("up", True),
        ("Thumbs-Up", True),
        ("👍", True),
        ("👍🏽", True),
        ("+1", True),
        (1, True),
        (True, True),
        ("good", True),
        ("down", False),
        ("👎", False),
        (-1, False),
        (0, False),
        (False, False),
        ("no", False),
    ],
)
def test_words_for_a_thumb(
    tmp_path: Path, said: Any, label: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    read = load(tmp_path / "data.jsonl", [{"prompt": ASKED, "response": GOOD, "feedback": said}])
    expected = {"prompt": ASKED, "completion": GOOD, "label": label}
    assert_same_tokens(read, [expected], tokenizer)


def test_a_labelled_conversation_of_sharegpt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    talk = [human(ASKED), gpt(BAD)]
    row = {"conversations": talk, "kto_tag": False, "system": "Be brief."}
    asked = [{"role": "system", "content": "Be brief."}, user(ASKED)]
    expected = {"prompt": asked, "completion": [assistant(BAD)], "label": False}
    assert_same_tokens(load(tmp_path / "data.jsonl", [row]), [expected], tokenizer)


def test_a_label_beside_a_conversation_without_an_answer_is_none(tmp_path: Path) -> None:
    rows = [{"messages": [user(ASKED)], "label": True}]
    assert "missing columns: found label, messages" in refusal(tmp_path / "a.jsonl", rows)


def test_stars_are_no_thumbs(tmp_path: Path) -> None:
    rows = [{"prompt": ASKED, "response": GOOD, "rating": n} for n in (1, 5)]
    assert "missing columns: found prompt, rating, response" in refusal(tmp_path / "a.jsonl", rows)


AMBIGUOUS = {
    "a list of two": (
        [{"instruction": ASKED, "output": [GOOD, BAD]}],
        "output is a list of two answers, and nothing says which is the better: write layout: "
        "alpaca_output where the first is the better, as in LLaMA-Factory, or columns: "
        "{instruction: instruction, chosen: output.1, rejected: output.0} where the second is the "
        "better",
    ),
    "zero or one": (
        [TWO | {"preference": n} for n in (0, 1)],
        "preference is 0 or 1, an index or a label: write layout: feedback_index where 0 is "
        "response_1, 1 is response_2, or layout: feedback_first where 1 says that response_1 is "
        "better, 0 that response_2 is",
    ),
    "zero or one, and a word for ties": (
        [TWO | {"preference": n} for n in ("0", "1", "draw")],
        "preference is 0 or 1, an index or a label: write layout: feedback_index where 0 is "
        "response_1, 1 is response_2, or layout: feedback_first where 1 says that response_1 is "
        "better, 0 that response_2 is",
    ),
    "three numbers": (
        [TWO | {"preference": n} for n in (0, 1, 2)],
        "preference is 0, 1 or 2, one of which is a tie: write layout: feedback where 1 is "
        "response_1, 2 is response_2 and 0 is a tie, or preference: tie in place of 2, and layout: "
        "feedback_index where 0 is response_1, 1 is response_2 and 2 is a tie",
    ),
    "two numbers, one of which may be a tie": (
        [TWO | {"preference": n} for n in (0, 2)],
        "preference is 0, 1 or 2, one of which is a tie: write layout: feedback where 1 is "
        "response_1, 2 is response_2 and 0 is a tie, or preference: tie in place of 2, and layout: "
        "feedback_index where 0 is response_1, 1 is response_2 and 2 is a tie",
    ),
    "a scale": (
        [TWO | {"preference": n} for n in (-3, 1, 2, None)],
        "preference is a scale, of -3 to 2: write layout: helpsteer where response_1 is better "
        "below 0 and response_2 above it, or 1, 2 or tie in preference where it means anything "
        "else",
    ),
    "a scale of many values": (
        [TWO | {"preference": n / 10} for n in range(5, 70)],
        "preference is a scale, of 0.5 to 5.4: write layout: helpsteer where response_1 is better "
        "below 0 and response_2 above it, or 1, 2 or tie in preference where it means anything "
        "else",
    ),
    "two verdicts": (
        [TWO | {"preference": p, "winner": w} for p, w in ((1, "a"), (1, "b"))],
        "preference and winner contradict each other: write layout: feedback where preference "
        "counts, or datasets: [{path: ..., columns: [prompt, response_1, response_2, winner]}] "
        "where winner does",
    ),
    "three answers": (
        [TWO | {"response_3": "So?", "preference": 1}],
        "response_3 is a third answer beside response_1 and response_2: write layout: feedback "
        "where preference compares response_1 and response_2, or columns: {prompt: prompt, "
        "responses: [response_1, response_2, response_3], rankings: ...} where a column holds the "
        "ranks of all",
    ),
    "an answer before the first": (
        [TWO | {"response_0": "So?", "preference_strength": 1}],
        "response_0 is a third answer beside response_1 and response_2: write layout: helpsteer "
        "where preference_strength compares response_1 and response_2, or columns: {prompt: "
        "prompt, responses: [response_1, response_2, response_0], rankings: ...} where a column "
        "holds the ranks of all",
    ),
    "votes": (
        [{"prompt": ASKED, "response": GOOD, "vote": n} for n in (1, 0, -1)],
        "vote is -1, 0 or 1: write layout: thumbs where 0 is a thumb down, or null in place of 0 "
        "in vote, and skip_bad_rows: true where 0 is no thumb",
    ),
    "one star or a thumb": (
        [{"messages": [user(ASKED), assistant(GOOD)], "rating": 1}],
        "rating is always 1: write layout: labelled_messages where 1 is a thumb up, or true or "
        "false, in a column named thumb, where it is a number of stars",
    ),
    "another conversation": (
        [{"conversations": [human("Hi"), gpt("Hello!"), human("So?")], **WHOLE}],
        "chosen is a conversation that does not begin with conversations: write layout: sharegpt "
        "where it goes on where conversations ends, or columns: {chosen: chosen, rejected: "
        "rejected} where it is a whole conversation, and conversations is not trained on",
    ),
    "two layouts": (
        [{"instruction": "Hi", "messages": [user(ASKED)], "chosen": GOOD, "rejected": BAD}],
        "the columns are those of two layouts: write layout: alpaca where the columns instruction, "
        "chosen, rejected, or layout: axolotl where the columns messages, chosen, rejected",
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_may_be_read_in_two_ways_is_refused(tmp_path: Path, name: str) -> None:
    rows, expected = AMBIGUOUS[name]
    path = tmp_path / "data.jsonl"
    assert refusal(path, rows) == f"{path}: {expected}"


def test_a_second_column_of_verdicts_may_count_in_another_way(tmp_path: Path) -> None:
    rows = [TWO | {"preference": p, "better": p - 1, "label": "easy"} for p in (1, 2)]
    assert load(tmp_path / "a.jsonl", rows)["comparisons"][:] == [[[0, 1]], [[1, 0]]]


def test_a_comment_beside_a_thumb_is_none(tmp_path: Path) -> None:
    rows = [
        {"prompt": ASKED, "response": GOOD, "feedback": said, "rating": rating}
        for said, rating in (("Nice!", "up"), ("Meh", "down"))
    ]
    assert load(tmp_path / "a.jsonl", rows)["label"][:] == [True, False]


def test_a_scale_is_read_as_it_is_named(tmp_path: Path) -> None:
    rows = [TWO | {"preference": n} for n in (-3, 1, 2)]
    made = load(tmp_path / "a.jsonl", rows, layout="helpsteer")
    assert made["comparisons"][:] == [[[0, 1]], [[1, 0]], [[1, 0]]]


def test_the_keys_of_an_ambiguity_decide(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"instruction": ASKED, "output": [BAD, GOOD]}]
    columns = {"instruction": "instruction", "chosen": "output.1", "rejected": "output.0"}
    read = load(tmp_path / "a.jsonl", rows, columns=columns)
    assert_same_tokens(read, [CHAT], tokenizer)
    rows = AMBIGUOUS["another conversation"][0]
    read = load(tmp_path / "b.jsonl", rows, columns={"chosen": "chosen", "rejected": "rejected"})
    assert_same_tokens(read, [CHAT], tokenizer)
    rows = AMBIGUOUS["two layouts"][0]
    read = load(tmp_path / "c.jsonl", rows, layout="alpaca")
    assert tokenize(read, tokenizer)[1].noted[UNREAD_COLUMN] == 1


MAPPED: dict[str, tuple[dict[str, Any], Row, Row]] = {
    "text": (
        {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"},
        {"frage": ASKED, "gut": GOOD, "schlecht": BAD},
        TEXT,
    ),
    "a user's message": (
        {"instruction": "frage", "system": "rolle", "chosen": "gut", "rejected": "schlecht"},
        {"frage": ASKED, "rolle": "", "gut": GOOD, "schlecht": BAD},
        CHAT,
    ),
    "within lists": (
        {"prompt": "q", "chosen": "answers.0.text", "rejected": "answers.-1.text"},
        {"q": ASKED, "answers": [{"text": GOOD}, {"text": BAD}]},
        TEXT,
    ),
    "within JSON": (
        {"prompt": "data.q", "chosen": "data.a.0", "rejected": "data.a.1"},
        {"data": json.dumps({"q": ASKED, "a": [GOOD, BAD]})},
        TEXT,
    ),
    "a name with a dot": (
        {"prompt": "q.text", "chosen": "a", "rejected": "b"},
        {"q.text": ASKED, "a": GOOD, "b": BAD},
        TEXT,
    ),
    "messages": (
        {"prompt": "talk", "chosen": "good", "rejected": "bad"},
        {"talk": [human(ASKED)], "good": gpt(GOOD), "bad": BAD},
        CHAT,
    ),
    "every item": (
        {"prompt": "q", "responses": "answers.*.text", "scores": "answers.*.stars"},
        {"q": ASKED, "answers": [{"text": GOOD, "stars": 5}, {"text": BAD, "stars": 1}]},
        {"prompt": ASKED, "responses": [GOOD, BAD], "scores": [5, 1]},
    ),
    "columns as a list": (
        {"prompt": "q", "responses": ["a", "b"], "rankings": "order"},
        {"q": ASKED, "a": GOOD, "b": BAD, "order": [1, 2]},
        {"prompt": ASKED, "responses": [GOOD, BAD], "rankings": [1, 2]},
    ),
    "a thumb": (
        {"prompt": "q", "completion": "a", "label": "ok"},
        {"q": ASKED, "a": GOOD, "ok": "👎"},
        {"prompt": ASKED, "completion": GOOD, "label": False},
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_columns_are_mapped(tmp_path: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    columns, row, expected = MAPPED[name]
    read = load(tmp_path / "data.jsonl", [row, row], columns=columns)
    assert_same_tokens(read, [expected] * 2, tokenizer)


def test_a_mapping_that_a_row_does_not_have(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"q": "p", "a": ["x", "y"]}, {"q": "p", "a": ["x"]}]
    path = tmp_path / "data.jsonl"
    columns = {"prompt": "q", "chosen": "a.0", "rejected": "a.1"}
    message = error_of(load(path, rows, columns=columns), tokenizer, source=str(path))
    assert message == f"{path}, line 2: a.1: missing: the list has 1 items"


def test_prompts_that_the_key_columns_leaves_out_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"prompt": "ask.text", "chosen": "a", "rejected": "b"}
    row = {"ask": {"text": "q"}, "a": "x", "b": "y", "system": "Be rude", "question": "Why?"}
    with caplog.at_level(logging.INFO):
        load(tmp_path / "a.jsonl", [row | {"history": [], "rank": 1}], columns=columns)
    assert "question, system may hold a part of the prompt and are not read" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load(
            tmp_path / "b.jsonl",
            [row],
            columns=columns | {"system": "system", "prompt": "question"},
        )
    assert "not read" not in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "frage", "chosen": "good", "rejected": "b"},
            "columns: prompt: no column 'frage'; expected one of b, good, q",
        ),
        ({"prompt": "q", "chosen": "good"}, "columns: names prompt, chosen; expected prompt"),
    ],
)
def test_a_mapping_that_cannot_be(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    path = tmp_path / "data.jsonl"
    said = refusal(path, [{"q": "p", "good": "x", "b": "y"}], columns=columns)
    assert said.startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        (
            {"id": 1, "ask": "p", "good_answer": "x", "bad_answer": "y"},
            "columns: {prompt: ask, chosen: good_answer, rejected: bad_answer}",
        ),
        (
            {"the text": "p", "winner_text": "x", "loser": "y"},
            'columns: {prompt: "the text", chosen: winner_text, rejected: loser}',
        ),
        ({"a": "p", "b": 3}, "columns: {prompt: a, chosen: ..., rejected: ...}"),
    ],
)
def test_an_unknown_layout_is_refused_with_a_mapping(
    tmp_path: Path, row: Row, mapping: str
) -> None:
    path = tmp_path / "data.jsonl"
    message = refusal(path, [row])
    assert message.startswith(f"{path}: missing columns: found ")
    assert message.endswith(f"; any other columns by a mapping such as {mapping}")


def test_a_layout_that_the_columns_do_not_allow(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    assert refusal(path, [TEXT], layout="arena") == (
        f"{path}: layout: arena: expected columns conversation_a, conversation_b, winner; found "
        "chosen, prompt, rejected"
    )


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", json.dumps({"data": [TEXT]}), "data holds rows; expected a list of them"),
        ("a.json", json.dumps({"v": 1, "rows": [TEXT]}), "rows holds rows; expected a list of"),
        ("a.json", json.dumps({"data": [{"q": "x"}]}), "data holds rows; expected a list of"),
        ("a.csv", "prompt;chosen;rejected\na;b;c\n", "the header has ';' in it; expected commas"),
    ],
)
def test_a_file_whose_rows_are_not_found_is_named(
    tmp_path: Path, name: str, text: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_rows(str(path), "train")
    assert str(caught.value).startswith(f"{path}: {reason}")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_a_human_quotes_is_no_system_prompt(tmp_path: Path, end: str) -> None:
    said = "log:\n\nSystem: error 5\n\nwhy?"
    sides = {
        side: f"\n\nSystem: S\n\nHuman: {said}\n\nAssistant: {text}".replace("\n", end)
        for side, text in (("chosen", GOOD), ("rejected", BAD))
    }
    system = {"role": "system", "content": "S"}
    made = load(tmp_path / "a.jsonl", [sides], layout="hh")[0]
    assert made["chosen"] == [system, user(said), assistant(GOOD)]
    assert made["rejected"] == [system, user(said), assistant(BAD)]


def test_images_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": [user(ASKED)], "chosen": GOOD, "rejected": BAD}
    assert "has a column of images" in refusal(tmp_path / "a.jsonl", [row | {"images": ["a.png"]}])
    image = {"role": "user", "content": [{"type": "image", "url": "a.png"}]}
    read = load(tmp_path / "b.jsonl", [row | {"messages": [image]}])
    assert "is a part of type image; only text" in error_of(read, tokenizer)


def test_trl_columns_are_not_written_again(tmp_path: Path) -> None:
    read = load(tmp_path / "data.parquet", [TEXT, TEXT])
    assert read.column_names == ["prompt", "chosen", "rejected"]


def test_a_conversion_is_cached(tmp_path: Path) -> None:
    rows = DETECTED["alpaca"][0][0]
    first = load(tmp_path / "data.jsonl", [rows])
    again = load_rows(str(tmp_path / "data.jsonl"), "train")
    assert first.cache_files
    assert first.cache_files == again.cache_files
    assert first._fingerprint == again._fingerprint


def test_the_line_shows_an_example(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load(tmp_path / "data.jsonl", [{"instruction": f"{'so ' * 40}?", **SIDES_OF_TEXT}])
    (line,) = [record.message for record in caplog.records if "is read as" in record.message]
    assert line == (
        f"layout: {tmp_path}/data.jsonl is read as alpaca (instruction, chosen, rejected); for "
        f"example prompt '...{('so ' * 40 + '?')[-40:]}' | chosen 'It is 42.' | rejected 'It is "
        "41.'"
    )


def test_the_example_shows_the_text_of_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "42."}]
    row = {"prompt": [user(ASKED)], "chosen": [assistant(parts)], "rejected": [assistant(BAD)]}
    with caplog.at_level(logging.INFO):
        load(tmp_path / "data.jsonl", [row])
    assert "| chosen 'It is 42.' |" in caplog.text


def test_all_cores_convert_where_rows_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int | None] = []
    true = Dataset.map

    def counted(self: Dataset, *args: Any, num_proc: int | None = None, **options: Any) -> Any:
        seen.append(num_proc)
        return true(self, *args, **options)

    monkeypatch.setattr(Dataset, "map", counted)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3))
    monkeypatch.setattr("fastdpo.data.processes._ROWS_OF_A_PROCESS", 512)
    row = {"question": ASKED, **SIDES_OF_TEXT}
    for count, num_proc in ((513, None), (1500, None), (1600, None), (513, 2), (500, 2)):
        load(tmp_path / "data.jsonl", [row | {"question": str(count)}] * count, num_proc=num_proc)
    assert seen == [None, 2, 3, 2, None]


SIDES_OF_TEXT = {"chosen": GOOD, "rejected": BAD}


def test_the_key_names_the_layouts_that_there_are() -> None:
    assert tuple(LAYOUTS) == LAYOUT_NAMES
    assert {*DETECTED, *NAMED} == set(LAYOUTS)
    assert set(MAPPED_FIELDS) == {*FIELDS, "instruction", "system", "history"}
    assert all(not row_kinds(LAYOUTS[name].example) for name in ("alpaca_output", "swift", "arena"))
