"""`fastdpo pairs`: rows from request logs, and what became of every line."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from data_samples import CHATML, make_tokenizer

from fastdpo.cli import main
from fastdpo.data.load import load_rows
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.errors import DataError
from fastdpo.logs.mask import Masker
from fastdpo.logs.pairs import make_rows


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def flat(question: str, answer: str, **more) -> dict:
    return {"messages": ask(question), "response": answer, **more}


def nested(question: str, answer: str, **more) -> dict:
    return {
        "request": {"model": "m", "messages": ask(question)},
        "response": {"choices": [{"message": {"role": "assistant", "content": answer}}]},
        **more,
    }


def batch(question: str, answer: str, **more) -> dict:
    body = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
    return {
        "custom_id": "x",
        "body": {"messages": ask(question)},
        "response": {"status_code": 200, "body": body},
        **more,
    }


def stored(question: str, answer: str, **more) -> dict:
    parts = [{"type": "message", "content": [{"type": "output_text", "text": answer}]}]
    return {"input": ask(question), "output": parts, **more}


def whole(question: str, answer: str, **more) -> dict:
    return {"messages": [*ask(question), *says(answer)], **more}


def prompted(question: str, answer: str, **more) -> dict:
    return {"prompt": question, "completion": answer, **more}


FORMS = [flat, nested, batch, stored, whole, prompted]


def made(lines: list, tmp_path: Path, *arguments, **options):
    path = tmp_path / "log.jsonl"
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    path.write_text(text, encoding="utf-8")
    result = make_rows([path], *arguments, **options)
    return list(result.rows), dict(result.outcomes)


@pytest.mark.parametrize("form", FORMS)
def test_the_best_answer_beats_the_worst_in_every_form_of_a_line(form, tmp_path):
    lines = [form("why?", answer, rating=r) for answer, r in (("b", 3), ("a", 5), ("c", 1))]
    rows, outcomes = made([*lines, form("other?", "d", rating=2)], tmp_path)
    assert rows == [{"prompt": ask("why?"), "chosen": says("a"), "rejected": says("c")}]
    assert outcomes == {
        "used": 2,
        "neither the best nor the worst": 1,
        "nothing to compare it with": 1,
    }


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ({"thumb": "up"}, {"thumb": "down"}),
        ({"feedback": "👍"}, {"feedback": "👎"}),
        ({"feedback": {"score": 1}}, {"feedback": {"score": -1}}),
        ({"metadata": {"rating": "5"}}, {"metadata": {"rating": "2"}}),
        ({"vote": True}, {"vote": False}),
        ({"feedback": "Thumbs Up"}, {"feedback": "thumbs-down"}),
    ],
)
def test_ratings_of_every_kind(up, down, tmp_path):
    rows, _ = made([flat("q", "bad", **down), flat("q", "good", **up)], tmp_path)
    assert rows == [{"prompt": ask("q"), "chosen": says("good"), "rejected": says("bad")}]


def test_an_edit_beats_what_it_changed(tmp_path):
    rows, outcomes = made(
        [flat("q", "helo", edited_response="hello"), flat("r", "same", edited_response="same ")],
        tmp_path,
    )
    assert rows == [{"prompt": ask("q"), "chosen": says("hello"), "rejected": says("helo")}]
    assert outcomes == {"used": 1, "no rating": 1}


@pytest.mark.parametrize("to", ["pairs", "groups"])
def test_ratings_of_different_kinds_are_not_compared(to, tmp_path):
    lines = [flat("q", "A", thumb="up"), flat("q", "B", stars=2), flat("q", "C", score=0.5)]
    assert made(lines, tmp_path, to) == ([], {"nothing to compare it with": 3})
    rows, _ = made([*lines, flat("q", "D", stars=1), flat("q", "E", thumb=-1)], tmp_path, to)
    first, second = rows
    if to == "pairs":
        assert (first["chosen"], first["rejected"]) == (says("B"), says("D"))
        assert (second["chosen"], second["rejected"]) == (says("A"), says("E"))
    else:
        assert (first["scores"], second["scores"]) == ([2, 1], [1, 0])


def test_ratings_of_two_kinds_that_say_the_opposite_make_one_pair(tmp_path):
    lines = [
        *(flat("q", answer, stars=n) for answer, n in (("A", 5), ("B", 1))),
        *(flat("q", answer, thumb=n) for answer, n in (("A", "down"), ("B", "up"))),
    ]
    rows, outcomes = made(lines, tmp_path)
    assert len(rows) == 1
    assert outcomes == {"used": 2, "another rating or retry says the opposite": 2}


def labels(lines: list, tmp_path: Path) -> dict[str, bool]:
    rows, _ = made(lines, tmp_path, "labels")
    return {row["completion"][0]["content"]: row["label"] for row in rows}


@pytest.mark.parametrize(
    ("ratings", "expected"),
    [
        ([{"thumb": 1}, {"thumb": 0}, {"stars": 5}, {"stars": 4}], [True, False, True, True]),
        ([{"vote": "1"}, {"vote": "-1"}, {"vote": 0}], [True, False, None]),
        ([{"vote": "+1"}, {"feedback": "👎"}], [True, False]),
        ([{"thumb": 1}, {"thumb": 1}], [True, True]),
        ([{"stars": 4}, {"stars": 5}, {"stars": 3}], [True, True, None]),
        ([{"stars": 1}], [False]),
        ([{"rating": 1}], [None]),
        ([{"rating": 7}, {"rating": 4}], [True, False]),
        ([{"rating": 2000}, {"rating": 1000}], [None, None]),
        ([{"score": 0.6}, {"score": 0.9}], [True, True]),
        ([{"reward": -3.5}, {"reward": 2.5}, {"reward": 0}], [False, True, None]),
        ([{"rating": "n/a", "thumb": "up"}], [True]),
    ],
)
def test_labels_are_told_by_the_middle_of_a_scale(ratings, expected, tmp_path):
    lines = [flat(f"q{i}", f"{i}", **rating) for i, rating in enumerate(ratings)]
    found = labels(lines, tmp_path)
    assert [found.get(f"{i}") for i in range(len(ratings))] == expected


def test_an_answer_with_several_ratings_has_their_mean(tmp_path):
    lines = [flat("q", "A", stars=5), flat("q", "A", stars=1), flat("q", "B", stars=4)]
    rows, outcomes = made(lines, tmp_path)
    assert rows == [{"prompt": ask("q"), "chosen": says("B"), "rejected": says("A")}]
    assert outcomes == {"used": 3}
    lines = [flat("q", "A", thumb="up"), flat("q", "A", thumb="down")]
    assert made(lines, tmp_path, "labels") == ([], {"its rating is in the middle": 2})
    rows, outcomes = made([*lines, flat("q", "A", thumb="up")], tmp_path, "labels")
    assert [row["label"] for row in rows] == [True]
    assert outcomes == {"used": 2, "says what an earlier line says": 1}


@pytest.mark.parametrize(
    ("first", "retry", "beats"),
    [
        ({}, {"thumb": "down"}, False),
        ({"thumb": "up"}, {}, False),
        ({"stars": 5}, {"thumb": "up"}, False),
        ({"thumb": "up"}, {"thumb": "up"}, False),
        ({"stars": 3}, {"stars": 3}, False),
        ({"thumb": "down"}, {}, True),
        ({"thumb": "down"}, {"stars": 4}, True),
        ({}, {"stars": 5}, True),
    ],
)
def test_a_retry_says_nothing_against_a_rating(first, retry, beats, tmp_path):
    lines = [flat("q", "A", id=1, **first), flat("q", "B", id=2, retry_of=1, **retry)]
    rows, _ = made(lines, tmp_path)
    pair = {"prompt": ask("q"), "chosen": says("B"), "rejected": says("A")}
    assert rows == ([pair] if beats else [])


@pytest.mark.parametrize(
    "lines",
    [
        [flat("q", "B", id=2, retry_of=1), flat("q", "A", id=1)],
        [flat("q", "A", id=1), flat("z", "C", id=1), flat("q", "B", id=2, retry_of=1)],
        [flat("q", "A", id=1), flat("q", "A", id=2, retry_of=1), flat("q", "B", retry_of=2)],
        [
            flat("q", "A", user="a", conversation_id="a"),
            flat("q", "C", user="b"),
            flat("q", "B", user="a", conversation_id="a", regenerated=True),
            flat("q", "D", user="c", regenerated=True),
        ],
    ],
)
def test_a_retry_finds_what_it_retried(lines, tmp_path):
    rows, _ = made(lines, tmp_path)
    assert rows == [{"prompt": ask("q"), "chosen": says("B"), "rejected": says("A")}]


def test_a_rating_says_more_than_a_retry(tmp_path):
    lines = [
        flat("q", "A", id=1, thumb="down"),
        flat("q", "B", retry_of=1),
        flat("q", "C", thumb="up"),
    ]
    rows, _ = made(lines, tmp_path)
    assert rows == [{"prompt": ask("q"), "chosen": says("C"), "rejected": says("A")}]


def test_retries_of_a_talk_that_begins_with_one_say_nothing(tmp_path):
    lines = [
        *(flat("q", answer, conversation_id="c", regenerated=True) for answer in "CB"),
        flat("q", "A", conversation_id="c"),
    ]
    assert made(lines, tmp_path)[0] == []


def test_answers_that_differ_by_personal_data_alone_are_no_pair(tmp_path):
    first, second = "Mail a@x.com now", "Mail b@y.org now"
    lines = [
        flat("q", first, edited=second),
        flat("r", first, thumb="up"),
        flat("r", second, thumb="down"),
    ]
    assert made(lines, tmp_path, masker=Masker())[0] == []
    assert len(made(lines, tmp_path)[0]) == 2


def test_a_retry_beats_the_answer_before_it(tmp_path):
    lines = [
        flat("q", "first", id="1"),
        flat("q", "third", id="2", retry_of="1"),
        flat("s", "one", conversation_id="c"),
        flat("s", "two", conversation_id="d"),
        flat("s", "three", conversation_id="c", regenerated=True),
        flat("t", "alone", retry_of="nothing"),
    ]
    rows, outcomes = made(lines, tmp_path)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        (says("third"), says("first")),
        (says("three"), says("one")),
    ]
    missing = "the answer that it retries is not in the log"
    assert outcomes == {"used": 4, "no rating": 1, missing: 1}


@pytest.mark.parametrize("name", ["log.json", "log.json.gz", "log.jsonl.zst", "log.json.zst"])
def test_logs_are_read_as_lists_and_packed(name, tmp_path):
    lines = [flat("q", answer, rating=n) for n, answer in enumerate("ab")]
    text = "\n".join(map(json.dumps, lines)) if "jsonl" in name else json.dumps(lines, indent=1)
    path = tmp_path / name
    packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=packing) as file:
        file.write(text.encode())
    assert [row["chosen"] for row in make_rows([path]).rows] == [says("b")]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no rows to make; the log is empty"),
        ("prompt,chosen\n", "1 lines: no JSON; expected JSONL"),
        ('"text"\n', "1 lines: no JSON object; expected JSONL"),
    ],
)
def test_a_log_that_is_none_is_told(text, error, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    assert main(["pairs", str(log), "-o", str(tmp_path / "out.jsonl")]) == 2
    assert error in capsys.readouterr().err


def test_a_damaged_log_is_named(tmp_path):
    whole = gzip.compress(json.dumps(flat("q", "a" * 999)).encode())
    for name, data in (("a.gz", whole[:20] + b"xxxx" + whole[24:]), ("a.zst", b"no zstd")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            make_rows([tmp_path / name])


def test_texts_and_numbers_that_cannot_be_written(tmp_path):
    lines = [flat("q", "\ud83d", rating=1), flat("q", "a", rating=10**400)]
    assert made(lines, tmp_path) == ([], {"no valid Unicode": 1, "no rating": 1})


def test_every_line_is_counted_once_with_its_reason(tmp_path):
    lines = [
        "no json",
        "[1]",
        {"messages": []},
        flat("q", ""),
        flat("q", "failed", status_code=500),
        flat("q", "a", rating=4),
        flat("q", "a", rating=4),
        flat("q", "b", rating=4),
        flat("r", "a", rating=2),
        flat("r", "b", rating=3),
    ]
    rows, outcomes = made(lines, tmp_path, min_margin=2)
    assert rows == []
    assert outcomes == {
        "no JSON": 1,
        "no JSON object": 1,
        "no messages": 1,
        "no answer": 1,
        "the request failed": 1,
        "says what an earlier line says": 1,
        "all answers to its prompt are rated alike": 2,
        "ratings differ by less than 2": 2,
    }
    assert sum(outcomes.values()) == len(lines)


def test_groups_hold_all_rated_answers_and_labels_each_of_them(tmp_path):
    lines = [flat("q", a, score=s) for a, s in (("x", 0.1), ("y", 0.9), ("z", 0.5), ("x", 0.3))]
    rows, outcomes = made(lines, tmp_path, "groups")
    assert rows == [
        {
            "prompt": ask("q"),
            "responses": [says("x"), says("y"), says("z")],
            "scores": [0.2, 0.9, 0.5],
        }
    ]
    assert outcomes == {"used": 4}
    rows, outcomes = made(lines[:3], tmp_path, "labels")
    assert [(row["completion"], row["label"]) for row in rows] == [
        (says("x"), False),
        (says("y"), True),
    ]
    assert outcomes == {"used": 2, "its rating is in the middle": 1}


@pytest.mark.parametrize(
    "asked",
    [
        lambda system: {"system": system, "messages": ask("q"), "response": "A"},
        lambda system: {"messages": [{"role": "system", "content": system}, *ask("q"), *says("A")]},
        lambda system: {
            "request": {"instructions": system, "input": "q"},
            "response": {"output": [{"type": "message", "content": [{"text": "A"}]}]},
        },
        lambda system: {
            "request": {"input": "q"},
            "response": {"instructions": system, "output": "A"},
        },
        lambda system: {
            "request": {
                "system": [{"type": "text", "text": system}],
                "messages": [{"role": "system", "content": system}, *ask("q")],
            },
            "response": {"content": [{"type": "text", "text": "A"}]},
            "metadata": {"system": "linux"},
        },
    ],
)
def test_a_system_prompt_is_part_of_what_was_asked(asked, tmp_path):
    lines = [asked("Be kind") | {"thumb": "up"}, asked("Be rude") | {"thumb": "down"}]
    rows, outcomes = made(lines, tmp_path)
    assert rows == [] and outcomes == {"nothing to compare it with": 2}
    lines.append(flat("q", "B", thumb="down", system="Be kind"))
    rows, _ = made(lines, tmp_path)
    system = {"role": "system", "content": "Be kind"}
    assert rows == [{"prompt": [system, *ask("q")], "chosen": says("A"), "rejected": says("B")}]


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
READ_CALL = {**CALL, "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("tool", [TOOL, {"type": "function", **TOOL["function"]}])
def test_tool_calls_stay(tool, tmp_path):
    result = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    asked = [*ask("q"), calling, result]
    lines = [
        {"tools": [tool], "messages": asked, "response": "A", "thumb": "up"},
        {"tools": [tool], "messages": asked, "response": "B", "thumb": "down"},
        {"messages": asked, "response": "C", "thumb": "up"},
        {
            "request": {"tools": [tool], "messages": ask("r")},
            "response": {"choices": [{"message": calling, "finish_reason": "tool_calls"}]},
            "thumb": "up",
        },
        {"tools": [tool], **flat("r", "No.", thumb="down")},
    ]
    rows, outcomes = made(lines, tmp_path)
    called = {"role": "assistant", "content": "", "tool_calls": [READ_CALL]}
    assert rows == [
        {
            "prompt": [*ask("q"), called, result],
            "chosen": says("A"),
            "rejected": says("B"),
            "tools": [TOOL],
        },
        {"prompt": ask("r"), "chosen": [called], "rejected": says("No."), "tools": [TOOL]},
    ]
    assert outcomes == {"used": 4, "nothing to compare it with": 1}
    written = tmp_path / "pairs.jsonl"
    written.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_rows(str(written), "train")[0]["prompt"][1]["tool_calls"] == [READ_CALL]


def test_calls_that_differ_by_their_names_alone_are_one_answer(tmp_path):
    calls = [[{**CALL, "id": name}] for name in ("c1", "c2")]
    lines = [
        flat("q", [{"role": "assistant", "content": "", "tool_calls": call}], rating=rating)
        for rating, call in enumerate(calls)
    ]
    assert made(lines, tmp_path) == ([], {"nothing to compare it with": 2})


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
BAD_CALL = {"function": {"name": "f", "arguments": "{bad"}}
CUT = {"role": "assistant", "content": "cut"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            flat("q", "A") | {"messages": [{"role": "user", "content": [{"text": "w"}, IMAGE]}]},
            "a part that is not text: image_url",
        ),
        (
            {"input": "q", "output": [{"type": "function_call", "name": "f", "arguments": "{}"}]},
            "a part that is not text: function_call",
        ),
        (flat("q", "A", messages=[{"role": "Wizard", "content": "q"}]), "unknown role"),
        (flat("q", "A", messages=[*ask("q"), *says("B")]), "end with another answer"),
        (flat("q", [*says("A"), *says("B")]), "more than one answer"),
        (flat("q", [*ask("q"), *says("B")]), "not the assistant's"),
        (flat("q", "A", edited=ask("B")), "not the assistant's"),
        (flat("q", [{**CUT, "tool_calls": ["x"]}]), "a message that training cannot read"),
        (flat("q", [{**CUT, "tool_calls": [BAD_CALL]}]), "a message that training cannot read"),
        ({"messages": ask("q"), "choices": [{"message": CUT, "finish_reason": "length"}]}, "cut"),
        (
            {
                "request": {"input": "q"},
                "response": {"output": "A", "incomplete_details": {"a": 1}},
            },
            "cut",
        ),
        ({"request": {"input": "q", "previous_response_id": "r"}, "output": "A"}, "said before"),
        (flat("q", "A", tools="f"), "tools that training cannot read"),
        (flat("q", "A", messages=[*ask(" "), *ask("q")]), "an empty message"),
    ],
)
def test_a_line_that_cannot_be_a_row_of_text_is_left_out_with_its_reason(line, reason, tmp_path):
    rows, outcomes = made([line | {"thumb": "up"}], tmp_path, "labels")
    assert rows == [] and len(outcomes) == 1 and reason in next(iter(outcomes))


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (
            {
                "prompt": "q",
                "output": [
                    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]},
                    {"type": "message", "content": [{"type": "output_text", "text": "A"}]},
                ],
            },
            "A",
        ),
        ({"prompt": "q", "choices": [{"text": "one"}, {"text": "two"}]}, "one"),
        (flat("q", "A", messages=[*ask("q"), *says("A")]), "A"),
        (flat("q", "A", messages=[{"role": "Human", "content": "q"}]), "A"),
        (flat("q", "A", messages=json.dumps(ask("q"))), "A"),
        (flat("q", "A", metadata={"system": "linux"}), "A"),
        (flat("q", [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]), "AB"),
    ],
)
def test_the_answer_is_what_was_shown(line, answer, tmp_path):
    rows, _ = made([line | {"thumb": "up"}], tmp_path, "labels")
    assert rows == [{"prompt": ask("q"), "completion": says(answer), "label": True}]


def test_columns_of_other_names(tmp_path):
    lines = [
        {"chat": {"q": "why?"}, "said": a, "meta": {"stars": s}} for a, s in (("a", 1), ("b", 2))
    ]
    names = {"messages": "chat.q", "response": "said", "rating": "meta.stars"}
    rows, _ = made(lines, tmp_path, names=names)
    assert rows == [{"prompt": ask("why?"), "chosen": says("b"), "rejected": says("a")}]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jo.do+x@mail.example.org now", "write to [EMAIL] now"),
        ("call +49 30 1234567 or (212) 555-0147", "call [PHONE] or [PHONE]"),
        ("card 4111 1111 1111 1111", "card [CARD]"),
        ("card 4111 1111 1111 1112", "card 4111 1111 1111 1112"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN [IBAN]."),
        ("IBAN DE88 3704 0044 0532 0130 00.", "IBAN DE88 3704 0044 0532 0130 00."),
        ("from 192.168.10.4 and 2001:db8::8a2e:370:7334", "from [IP] and [IP]"),
        ("version 1.2.3 and 999.1.1.1 at 10:30:00", "version 1.2.3 and 999.1.1.1 at 10:30:00"),
        ("key sk-proj-abcdefghij0123456789 is", "key [KEY] is"),
        ("ghp_0123456789abcdefghij0123", "[KEY]"),
        ("card 4111 1111 1111 1111 12/26, CVV 123", "card [CARD] 12/26, CVV 123"),
        ("card 4111 1111 1111 1111 123", "card [CARD] 123"),
        ("2 4111-1111-1111-1111", "2 [CARD]"),
        ("Amex 3782 822463 10005", "Amex [CARD]"),
        ("1.0000000000000 and 0000000000000", "1.0000000000000 and 0000000000000"),
        ("0.4111111111111111", "0.4111111111111111"),
        ("IBAN BE68 5390 0754 7034 BIC KREDBEBB", "IBAN [IBAN] BIC KREDBEBB"),
        ("sk-ant-api03-AbCdEf0123456789AbCdEf0123456789-xyz", "[KEY]"),
        ("sk-proj-aB3_dE-fG5hI7jK9lM1nO3pQ5rS7tU9vW1xY3z", "[KEY]"),
        ("pk_user_account_identifier_2024", "pk_user_account_identifier_2024"),
        ("glpat-abcdefghij1234567890", "[KEY]"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIEabcdefghijklm\n-----END RSA PRIVATE KEY----- x",
            "[KEY] x",
        ),
        ("a -----BEGIN PRIVATE KEY----- begins it", "a -----BEGIN PRIVATE KEY----- begins it"),
        ("0170 1234567, 030/1234567 or 020 7946 0958", "[PHONE], [PHONE] or [PHONE]"),
        ("06 12 34 56 78 or 555 123 4567", "[PHONE] or [PHONE]"),
        ("1-800-555-1234", "[PHONE]"),
        ("x[::2], a[1::2], b[1000::2], c[1:10:2]", "x[::2], a[1::2], b[1000::2], c[1:10:2]"),
        ("use ::add, a::add and std::b00::c0de", "use ::add, a::add and std::b00::c0de"),
        ("http://[2001:db8::1]/ and fe80::1%eth0", "http://[[IP]]/ and [IP]%eth0"),
        ("react@18.2.0 lodash@4.17.21-beta.rc", "react@18.2.0 lodash@4.17.21-beta.rc"),
        ("version 1.2.3.4, Chrome/120.0.0.1", "version 1.2.3.4, Chrome/120.0.0.1"),
        ("127.0.0.1, 0.0.0.0, 255.255.255.0", "127.0.0.1, 0.0.0.0, 255.255.255.0"),
        ("at 10.0.0.1. Then http://10.0.0.2:80/", "at [IP]. Then http://[IP]:80/"),
        ("in 2024 there were 1,234,567 of 48", "in 2024 there were 1,234,567 of 48"),
    ],
)
def test_personal_data_is_masked_by_its_patterns(text, masked):
    masker = Masker()
    assert masker([{"content": text}]) == [{"content": masked}]
    assert masker.counts.total() == len(re.findall(r"\[[A-Z]+\]", masked))


def test_the_command_writes_what_training_reads(tmp_path, capsys):
    first, second, out = (tmp_path / n for n in ("a.jsonl", "b.jsonl.gz", "pairs.jsonl"))
    lines = [flat(f"q{i}", a, rating=r) for i in range(3) for a, r in (("x@y.zz", 1), ("no", 0))]
    first.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    with gzip.open(second, "wt") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines[3:]))
    words = ["pairs", str(first), str(second), "-o", str(out)]
    assert main([*words, "--mask_pattern", "q1"]) == 0
    said = capsys.readouterr().out
    assert said == f"3 rows: {out}\n6 lines: used\nmasked: 3 EMAIL, 1 MASKED\n"
    tokens, report = tokenize_dataset(
        load_rows(str(out), "train"), make_tokenizer(CHATML), max_length=None
    )
    assert len(tokens) == report.rows_out == 3
    assert main([*words, "--no_mask"]) == 0
    assert "x@y.zz" in out.read_text() and "masked" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["{tmp}/log.jsonl"], "expected fastdpo pairs LOG -o FILE.jsonl"),
        (["{tmp}/log.jsonl", "-o", "{tmp}/x.csv"], "expected fastdpo pairs LOG -o FILE.jsonl"),
        (["{tmp}/none.jsonl", "-o", "{tmp}/x.jsonl"], "none.jsonl: cannot be read"),
        (["{tmp}/log.jsonl", "-o", "{tmp}/x.jsonl"], "no rows to make; 1 lines: no rating"),
        (["{tmp}/log.jsonl", "-o", "{tmp}/x.jsonl", "--to", "both"], "--to: expected pairs"),
        (["{tmp}/log.jsonl", "-o", "{tmp}/x.jsonl", "--min_margin", "a"], "--min_margin"),
        (
            ["{tmp}/log.jsonl", "-o", "{tmp}/x.jsonl", "--mask_pattern", "("],
            "no regular expression",
        ),
        (["{tmp}/log.jsonl", "-o", "{tmp}/x.jsonl", "--columns", "stars=a"], "--columns: expected"),
        (
            ["{tmp}/log.jsonl", "-o", "{tmp}/x.jsonl", "--columns", "rating=strs"],
            "no line has strs",
        ),
        (["{tmp}/log.jsonl", "-o", "{tmp}/x.jsonl", "--mask_pattern", ""], "got nothing"),
        (["{tmp}/log.jsonl", "-o", "{tmp}/../{tmp.name}/log.jsonl"], "is a log that is read"),
        (["{tmp}/log.jsonl", "-o", "{tmp}/x.jsonl", "--margin", "1"], "--margin: unknown"),
    ],
)
def test_what_is_wrong_is_one_line(words, error, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text(json.dumps(flat("q", "a")) + "\n")
    assert main(["pairs", *(word.format(tmp=tmp_path) for word in words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and error in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
