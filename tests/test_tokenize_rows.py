"""What bad rows, tokenizers and settings get, and what the report says of the rest."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_samples import (
    CHATML,
    LABELS,
    PAIR,
    assistant,
    chat,
    make_tokenizer,
    tokenize_rows,
    user,
)
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from fastdpo.data.load import load_rows
from fastdpo.data.messages import BadRow
from fastdpo.data.needs import COMPARISONS
from fastdpo.data.notes import BOUNDARY_MOVED, IDENTICAL_AFTER_TRUNCATION, TRUNCATED
from fastdpo.data.rows import parse_row
from fastdpo.data.tokenize import COLUMNS, TokenizeReport, tokenize_dataset
from fastdpo.errors import ConfigError, DataError, ModelError

pytestmark = pytest.mark.usefixtures("datasets_cache")

GROUP = {"prompt": "p", "responses": ["a", "b"], "comparisons": [[0, 1]]}
SCORED = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}
RANKED = {"prompt": "p", "responses": ["a", "b", "c"], "rankings": [1, 3, 2]}
LABELLED = {"prompt": "p", "completion": "a", "label": True}
TALK = chat([user("Hi")], "a", "b")
BAD_ROWS = [
    (PAIR, {"chosen": 5}, "chosen: expected text or a list of messages, found the number 5"),
    (PAIR, {"chosen": None}, "chosen: expected text or a list of messages, found null"),
    (PAIR, {"prompt": True}, "prompt: expected text or a list of messages, found true"),
    (
        PAIR,
        {"rejected": ["b"]},
        "rejected[0]: expected a message with role and content",
    ),
    (PAIR, {"chosen": "b"}, "chosen and rejected: are identical"),
    (PAIR, {"chosen": "b</s>"}, "chosen and rejected: are identical"),
    (TALK, {"chosen": "a"}, "chosen: is text where prompt is a list of messages"),
    (TALK, {"prompt": []}, "prompt: expected at least one message, found an empty list"),
    (TALK, {"chosen": TALK["rejected"]}, "chosen and rejected: are identical"),
    (TALK, {"prompt": [user("a"), {"role": "robot", "content": "b"}]}, "prompt[1].role: unknown"),
    (TALK, {"prompt": [{"role": "user"}]}, "prompt[0].content: missing; expected text"),
    (TALK, {"prompt": [{"role": "user", "content": 5}]}, "prompt[0].content: expected text, found"),
    (TALK, {"prompt": [{"content": "b"}]}, "prompt[0]: expected a message with role and content"),
    (TALK, {"prompt": [{"from": "human", "value": "b"}]}, "prompt[0]: expected a message with rol"),
    (TALK, {"tools": "{"}, "tools: expected JSON"),
    (TALK, {"tools": '{"a": 1}'}, "tools: expected a list of tool definitions"),
    (TALK, {"chat_template_kwargs": "[]"}, "chat_template_kwargs: expected an object"),
    (TALK, {"chat_template_kwargs": '{"tokenize": 1}'}, "chat_template_kwargs: tokenize cannot"),
    (TALK, {"prompt": [{"role": ["user"], "content": "a"}]}, "prompt[0].role: unknown role ["),
    (
        TALK,
        {"prompt": [user("a") | {"content": {"a": 1}}]},
        "prompt[0].content: expected text, fou",
    ),
    (
        TALK,
        {"prompt": [[[user("a")]]]},
        "prompt[0]: expected a message with role and content, foun",
    ),
    (PAIR, {"prompt": json.dumps(json.dumps(TALK["prompt"]))}, "prompt: is JSON within JSON"),
    (
        PAIR,
        {"prompt": json.dumps({"messages": TALK["prompt"]})},
        "prompt: is an object with messages, as JSON",
    ),
    (TALK, {"tools": "[" * 5000}, "tools: expected JSON, found text that is none"),
    (GROUP, {"responses": "ab"}, "responses: expected a list"),
    (GROUP, {"responses": []}, "responses: expected a list"),
    (GROUP, {"responses": ["a", 1]}, "responses[1]: expected text"),
    (GROUP, {"responses": ["a", [assistant("b")]]}, "responses[1]: is a list of messages where"),
    (GROUP, {"responses": ["a", "a"]}, "responses[0] and responses[1]: are identical"),
    (GROUP, {"comparisons": "0 1"}, "comparisons: expected a list such as"),
    (GROUP, {"comparisons": [[0, 1], [0, 2]]}, "comparisons[1]: expected indices of responses fro"),
    (GROUP, {"comparisons": [[0, -1]]}, "comparisons[0]: expected indices"),
    (GROUP, {"comparisons": [[0, 0.5]]}, "comparisons[0]: expected indices"),
    (GROUP, {"comparisons": [[0, 0]]}, "comparisons[0]: compares response 0 with itself"),
    (GROUP, {"comparisons": [[0]]}, "comparisons[0]: expected [winner, loser]"),
    (GROUP, {"comparisons": [[0, 1, -1]]}, "comparisons[0]: expected a finite weight"),
    (GROUP, {"comparisons": [[0, 1, 10**400]]}, "comparisons[0]: expected a finite weight of at l"),
    (GROUP, {"comparisons": [{"winner": 1}]}, "comparisons[0]: expected indices of responses from"),
    (SCORED, {"scores": [1]}, "scores: expected a list of 2 numbers"),
    (SCORED, {"scores": [1, None]}, "scores[1]: expected a finite number, found null"),
    (SCORED, {"scores": [1, float("nan")]}, "scores[1]: expected a finite number"),
    (SCORED, {"scores": ["1", "0"]}, "scores[0]: expected a finite number, found text"),
    (SCORED, {"scores": [10**400, 1]}, "scores[0]: expected a finite number, found the number inf"),
    (LABELLED, {"label": "False"}, "label: expected true or false, found text"),
    (LABELLED, {"label": "yes"}, "label: expected true or false, found text"),
    (LABELLED, {"label": "true"}, "label: expected true or false, found text"),
    (LABELLED, {"label": 2}, "label: expected true or false, found the number 2"),
    (LABELLED, {"label": None}, "label: expected true or false, found null"),
    (LABELLED, {"label": float("nan")}, "label: expected true or false, found "),
    (SCORED, {"scores": [1, float("-inf")]}, "scores[1]: expected a finite number"),
    (GROUP, {"scores": [1, None]}, "scores[1]: expected a finite number, found null"),
    (SCORED, {"scores": None}, "scores: expected a list of 2 numbers, one a response, found null"),
    (RANKED, {"rankings": None}, "rankings: expected a list of 3 numbers, one a response, found n"),
    (RANKED, {"rankings": [1, 2]}, "rankings: expected a list of 3 whole numbers, one a response"),
    (RANKED, {"rankings": "1 2 3"}, "rankings: expected a list of 3 whole numbers, one a response"),
    (RANKED, {"rankings": [0, 1, 2]}, "rankings[0]: expected a whole number from 1 (the best) to"),
    (RANKED, {"rankings": [1, 2, 4]}, "rankings[2]: expected a whole number from 1 (the best) to"),
    (RANKED, {"rankings": [1, 2.5, 2.5]}, "rankings[1]: expected a whole number from 1 (the best"),
    (RANKED, {"rankings": [1, None, 2]}, "rankings[1]: expected a whole number from 1 (the best)"),
    (RANKED, {"rankings": [True, 2, 3]}, "rankings[0]: expected a whole number from 1 (the best)"),
    (RANKED, {"rankings": [1, 2, float("nan")]}, "rankings[2]: expected a whole number from 1"),
    (SCORED, {"logps": [-1]}, "logps: expected a list of 2 numbers, one a response"),
    (SCORED, {"logps": [-1, None]}, "logps[1]: expected a finite log-probability, at most 0, fou"),
    (SCORED, {"logps": [-1, 3.5]}, "logps[1]: expected a finite log-probability, at most 0, found"),
    (SCORED, {"logps": [float("-inf"), -1]}, "logps[0]: expected a finite log-probability, at mo"),
    (SCORED, {"logps": ["-1", -1]}, "logps[0]: expected a finite log-probability, at most 0, foun"),
]


@pytest.mark.parametrize("text", ['"Quoted" words', '"', '"[1]"', '{"a": [{"b": "x"}]}'])
def test_text_in_quotes_is_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    rows = Dataset.from_list([PAIR | {"prompt": text}])
    made, _ = tokenize_dataset(rows, tokenizer, max_length=None)
    assert tokenizer.decode(made[0]["prompt_ids"]) == text


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_blank_text_is_no_tools(tokenizer: PreTrainedTokenizerBase, column: str) -> None:
    rows = Dataset.from_list([TALK | {column: ""}, TALK | {column: None}])
    made, _ = tokenize_dataset(rows, tokenizer, max_length=None)
    assert made[0] == made[1]


@pytest.mark.parametrize(("row", "change", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_by_its_line_or_skipped(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    change: dict[str, Any],
    reason: str,
) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(row), "", json.dumps(row | change), json.dumps(row)]
    path.write_text("\n".join(lines), encoding="utf-8")
    rows = load_rows(str(path), "train")
    needs = LABELS if "label" in row else COMPARISONS
    with pytest.raises(DataError) as caught:
        tokenize_dataset(rows, tokenizer, max_length=None, needs=needs, source=str(path))
    assert str(caught.value).startswith(f"{path}, line 3: {reason}")

    made, report = tokenize_dataset(
        rows, tokenizer, max_length=None, needs=needs, source=str(path), skip_bad_rows=True
    )
    assert (len(made), report.rows_in, report.rows_out, report.skipped) == (2, 3, 2, 1)
    assert report.identical_pairs == int("identical" in reason)
    assert report.reasons[0].startswith(f"{path}, line 3: {reason}")
    assert made.column_names == list(COLUMNS)


def test_integers_that_no_float_can_hold() -> None:
    for row in (SCORED | {"scores": [10**400, 1]}, GROUP | {"comparisons": [[0, 1, 10**400]]}):
        with pytest.raises(BadRow, match="expected a finite"):
            parse_row(row, "group")


def test_a_part_of_a_file_has_rows_but_no_lines(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (PAIR, PAIR, PAIR | {"chosen": "b"})))
    with pytest.raises(DataError, match=rf"^{path}, row 2: chosen and rejected: are"):
        tokenize_rows(load_rows(str(path), "train[1:]"), tokenizer, source=str(path))


def test_rows_that_cannot_be_read_are_counted_with_the_rest(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "data.jsonl"
    bad = json.dumps(PAIR | {"chosen": "b"})
    path.write_text("\n".join([json.dumps(PAIR), "{", "", bad]), encoding="utf-8")
    rows = load_rows(str(path), "train", skip_bad_rows=True)
    made, report = tokenize_dataset(
        rows, tokenizer, max_length=None, source=str(path), skip_bad_rows=True
    )
    assert (len(made), report.skipped, report.identical_pairs) == (1, 2, 1)
    assert report.reasons[0].startswith(f"{path}, line 2: invalid JSON at column")
    assert report.reasons[1].startswith(f"{path}, line 4: chosen and rejected: are identical")


def test_implicit_prompts_that_do_not_work(tokenizer: PreTrainedTokenizerBase) -> None:
    for row, reason in [
        ({"chosen": "", "rejected": "b"}, "dataset, row 1: chosen: is empty"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, "dataset, row 1: chosen: shares no"),
    ]:
        with pytest.raises(DataError) as caught:
            tokenize_rows([row], tokenizer)
        assert str(caught.value).startswith(reason)


def test_a_template_that_refuses(tokenizer: PreTrainedTokenizerBase) -> None:
    strict = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('No tools here') }}"
        "{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    bad = chat([user("a"), {"role": "tool", "content": "b"}], "a", "b")
    with pytest.raises(DataError, match="row 2: the chat template cannot render it: No tools here"):
        tokenize_rows([TALK, bad], strict)
    assert len(tokenize_rows([TALK, bad], strict, skip_bad_rows=True)) == 1


def test_a_role_that_only_the_template_knows() -> None:
    template = CHATML + "{% if 'observation' in messages %}{% endif %}"
    row = chat([{"role": "observation", "content": "b"}], "a", "b")
    assert len(tokenize_rows([row], make_tokenizer(template))) == 1


def test_a_response_without_tokens() -> None:
    """An empty message has the template's tokens in most templates, and none in some."""
    bare = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="row 1: rejected: has no tokens"):
        tokenize_rows([chat([user("Hi")], "a", "")], bare)


def test_a_token_outside_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [PAIR, PAIR | {"chosen": "assistant"}]
    largest = max(max(ids) for row in tokenize_rows(rows, tokenizer) for ids in row["response_ids"])
    assert len(tokenize_rows(rows, tokenizer, vocab_size=largest + 1)) == 2
    with pytest.raises(DataError, match=rf"row 2: chosen: token {largest} \(.*vocabulary of"):
        tokenize_rows(rows, tokenizer, vocab_size=largest)


def test_tokenizers_that_lack_something() -> None:
    with pytest.raises(ModelError, match="no eos_token"):
        tokenize_rows([PAIR], make_tokenizer(eos_token=None))
    with pytest.raises(ModelError, match="no chat template"):
        tokenize_rows([TALK], make_tokenizer(), skip_bad_rows=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length: expected at least 2"),
        ({"max_comparisons_per_group": 0}, "max_comparisons_per_group: expected at least 1"),
    ],
)
def test_settings_that_cannot_be_honoured(
    tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenize_dataset(Dataset.from_list([PAIR]), tokenizer, **{"max_length": 8} | options)


def test_nothing_left(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="has no rows"):
        tokenize_rows(Dataset.from_list([PAIR]).select([]), tokenizer)
    long = PAIR | {"prompt": "The quick brown fox"}
    with pytest.raises(DataError, match=r"0 of 1 rows kept.*max_length is 2"):
        tokenize_rows([long], tokenizer, 2)


def test_the_report(tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture) -> None:
    long = "The quick brown fox " * 20
    rows = [
        PAIR,
        PAIR | {"prompt": long},
        PAIR | {"chosen": long},
        {"prompt": "p", "chosen": long + "a", "rejected": long + "b"},
        PAIR | {"chosen": "b"},
        {"prompt": "The quick bro", "chosen": "wn", "rejected": "!"},
        PAIR | {"chosen": None},
    ]
    made, report = tokenize_dataset(
        Dataset.from_list(rows), tokenizer, max_length=16, skip_bad_rows=True, source="some rows"
    )
    assert report == TokenizeReport(
        source="some rows",
        rows_in=7,
        rows_out=4,
        dropped_prompt_too_long=1,
        skipped=2,
        identical_pairs=1,
        noted=Counter({TRUNCATED: 2, IDENTICAL_AFTER_TRUNCATION: 1, BOUNDARY_MOVED: 1}),
        reasons=report.reasons,
    )
    assert str(report) == (
        "some rows: 4 of 7 rows kept; 1 dropped, the prompt alone reaching max_length; "
        "1 skipped as bad; 1 skipped with identical responses; 2 truncated to max_length; "
        "1 identical once truncated"
    )
    assert len(made) == 4
    assert max(len(made[1]["prompt_ids"]) + len(ids) for ids in made[1]["response_ids"]) == 16
    assert caplog.text.count("the tokenised prompt is not how") == 1
    assert "in 1 of 7 rows" in caplog.text


def test_the_dataset_is_what_the_contract_says(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_list([PAIR, PAIR | {"chosen": "b"}, PAIR | {"prompt": "q"}])
    made, _ = tokenize_dataset(rows, tokenizer, max_length=None, skip_bad_rows=True)
    integers = List(Value("int32"))
    assert made.features == {
        "prompt_ids": integers,
        "response_ids": List(integers),
        "winners": integers,
        "losers": integers,
        "weights": List(Value("float32")),
        "labels": List(Value("bool")),
        "scores": List(Value("float64")),
        "ranks": integers,
        "logps": List(Value("float64")),
        "digests": List(Value("int64")),
    }
    assert made.data.num_rows == len(made) == 2, "rows are read through an indices mapping"
    assert made[1]["prompt_ids"] == tokenizer("q")["input_ids"]
