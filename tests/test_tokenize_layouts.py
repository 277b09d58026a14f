"""Layouts of data sets as they are found: the prompt is trained on, once, or the run stops and
names the column. Tokens are compared with what TRL makes of rows that say the same plainly.
"""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import (
    LABELS,
    PAIR,
    SYSTEM,
    TURNS,
    assistant,
    chat,
    error_of,
    make_tokenizer,
    report_of,
    tokenize,
    tokenize_rows,
    user,
)
from datasets import Dataset
from like_trl import assert_like_trl, trl_rows
from transformers import PreTrainedTokenizerBase
from trl import KTOTrainer

from fastdpo.data.load import load_rows
from fastdpo.data.notes import (
    EMPTY_PROMPT,
    PROMPT_AS_MESSAGE,
    PROMPT_REPEATED,
    PROMPT_TWICE,
    UNREAD_COLUMN,
)
from fastdpo.errors import DataError

pytestmark = pytest.mark.usefixtures("datasets_cache")

Rows = list[dict[str, Any]]
TEXT = [
    {"prompt": "What is 12 + 30?", "chosen": " It is 42.", "rejected": " It is 41."},
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
]
TALKS = [chat([user(row["prompt"])], row["chosen"], row["rejected"]) for row in TEXT]
WHOLE = [
    {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in [*TALKS, *TEXT]
]
WHOLE_TALKS, WHOLE_TEXT = WHOLE[:2], WHOLE[2:]
SIDES = ("chosen", "rejected")


def with_columns(rows: Rows, **columns: Any) -> Rows:
    return [row | columns for row in rows]


def write(path: Path, rows: Rows) -> Path:
    """Rows in the kind of file that the path names; in CSV and `.text.parquet`, values are JSON."""
    as_text = [
        {k: v if isinstance(v, str) or v is None else json.dumps(v) for k, v in row.items()}
        for row in rows
    ]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, as_text[0])
            writer.writeheader()
            writer.writerows(as_text)
    elif path.suffix == ".parquet":
        Dataset.from_list(as_text if ".text" in path.name else rows).to_parquet(path)
    else:
        lines = as_text if ".text" in path.name else rows
        path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return path


META = {"id": 7, "source": "ultra", "score_chosen": 8.5, "model_name": "m", "category": "maths"}
HARMLESS = {
    "ultrafeedback_binarized": (
        [
            {"prompt": a["prompt"], "prompt_id": "f0e1", **b, "messages": b["chosen"], **META}
            for a, b in zip(TEXT, WHOLE_TALKS, strict=True)
        ],
        TALKS,
    ),
    "without its prompt": ([row | {"messages": row["chosen"]} for row in WHOLE_TALKS], TALKS),
    "hh-rlhf": (WHOLE_TEXT, WHOLE_TEXT),
    "trl-lib": (with_columns(WHOLE_TALKS, score_chosen=8.5, score_rejected=2.0), WHOLE_TALKS),
    "orpo-dpo-mix": (
        [
            {"source": "s", "conversation": b["chosen"], "prompt": a["prompt"], **b, "question": ""}
            for a, b in zip(TEXT, WHOLE_TALKS, strict=True)
        ],
        TALKS,
    ),
    "metadata": (
        with_columns(
            TEXT, **META, prompt_id="a", input_tokens=3, labelling_prompt="Rate", system=""
        ),
        TEXT,
    ),
    "a template of its own": (
        [
            row | {"prompt": f"### Question:\n{row['prompt']}\n###", "question": row["prompt"]}
            for row in TEXT
        ],
        [row | {"prompt": f"### Question:\n{row['prompt']}\n###"} for row in TEXT],
    ),
    "system in its place": (
        [row | {"prompt": [SYSTEM, *row["prompt"]], "system": "Be brief."} for row in TALKS],
        [row | {"prompt": [SYSTEM, *row["prompt"]]} for row in TALKS],
    ),
    "numbers": (with_columns(WHOLE_TEXT, question=5, input=None), WHOLE_TEXT),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_columns_that_say_nothing_new_are_no_error(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, clean = HARMLESS[name]
    assert_like_trl(rows, tokenizer, clean=clean)
    assert report_of(rows, tokenizer).noted[UNREAD_COLUMN] == 0


ANSWERS = [{"chosen": " Yes, 42.", "rejected": " No, 41."}, {"chosen": "a", "rejected": "b"}]
QUESTION = "What is it?"
LOST = [
    (with_columns(ANSWERS, **{name: QUESTION}), name)
    for name in ("context", "system", "Question", "passage", "problem")
]
LOST += [
    (with_columns(ANSWERS, history=[[QUESTION, "so"]]), "history"),
    (with_columns(ANSWERS, conversation=[{"input": QUESTION, "output": "a"}]), "conversation"),
    (with_columns(ANSWERS, prompt="", context=QUESTION), "context"),
    (with_columns(WHOLE_TALKS, context="In the spring."), "context"),
]


@pytest.mark.parametrize(("rows", "columns"), LOST)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_that_holds_the_question_is_named(
    tmp_path: Path, kind: str, rows: Rows, columns: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / f"data.{kind}", rows)
    for skip in (False, True):
        loaded = load_rows(str(path), "train", skip_bad_rows=skip)
        message = error_of(loaded, tokenizer, source=str(path), skip_bad_rows=skip)
        where = "line 1" if kind == "jsonl" else "row 1"
        assert message.startswith(f"{path}, {where}: {columns}: holds text that is in none of"), (
            message
        )


def test_a_question_that_whole_conversations_do_not_ask(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = with_columns(WHOLE_TALKS, question="Which of them?")
    path = write(tmp_path / "data.jsonl", rows)
    message = error_of(load_rows(str(path), "train"), tokenizer, source=str(path))
    assert message == (
        f"{path}, line 1: chosen: is a conversation that does not begin with question; expected "
        "it to, or only what follows"
    )


def test_a_column_that_holds_the_question_is_named_in_csv(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "data.csv", with_columns(ANSWERS, history=[[QUESTION, "so"]]))
    message = error_of(load_rows(str(path), "train"), tokenizer, source=str(path))
    assert message.startswith(f"{path}, line 2: history: holds text")


def test_a_column_beside_a_prompt_is_said(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = with_columns(TEXT, context="In the spring.", history=[["Hi", "Hello"]])
    _, report = tokenize(rows, tokenizer)
    assert report.noted[UNREAD_COLUMN] == 2
    assert "in 2 of 2 rows a column that is not read holds text" in caplog.text
    assert "(context, history)" in caplog.text


@pytest.mark.parametrize(
    "name", ["Prompt", "prompt ", " PROMPT", "promt", "prompts", "\ufeffprompt"]
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_column_named_almost_as_prompt(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / f"data.{kind}"
    write(path, [{"chosen": "a", "rejected": "b", name: QUESTION}])
    with pytest.raises(DataError) as caught:
        load_rows(str(path), "train")
    assert str(caught.value).startswith(f"{path}: column {name!r} is not read; expected 'prompt'")


def test_columns_named_almost_as_others(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "p", "Chosen": "a", "reject": "b"}])
    with pytest.raises(DataError, match=r"\(is 'Chosen' for chosen, 'reject' for rejected\?\)"):
        load_rows(str(path), "train")


def test_no_row_has_a_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = with_columns(ANSWERS, frage=QUESTION, source="s", vector=[1.0], n=3)
    message = error_of(rows, tokenizer)
    assert message.startswith("dataset: no row has a prompt, and the text of frage is not")
    _, report = tokenize(with_columns(ANSWERS, source="s", n=3), tokenizer)
    assert report.noted[EMPTY_PROMPT] == 2
    assert "; 2 with an empty prompt" in str(report)
    some = [ANSWERS[0], {"chosen": "The sky is blue", "rejected": "The sky is red"}]
    assert report_of(with_columns(some, frage=QUESTION), tokenizer).noted[EMPTY_PROMPT] == 1


def test_no_row_of_a_csv_has_a_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "data.csv", with_columns(ANSWERS, frage=QUESTION))
    assert "the text of frage is not" in error_of(load_rows(str(path), "train"), tokenizer)


def begun(rows: Rows) -> Rows:
    """Rows whose responses begin with the prompt that stands beside them."""
    return [row | {side: row["prompt"] + row[side] for side in SIDES} for row in rows]


@pytest.mark.parametrize("rows", [TEXT, TALKS], ids=["text", "messages"])
def test_a_repeated_prompt_counts_once(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    assert_like_trl(begun(rows), tokenizer, clean=rows)
    caplog.clear()
    assert report_of(begun(rows), tokenizer).noted[PROMPT_REPEATED] == 2
    assert (
        caplog.text.count("in 2 of 2 rows the responses begin with the prompt, which is taken") == 1
    )


def test_one_text_in_twenty_may_not_repeat_its_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    text = [{"prompt": f"{i} is", "chosen": " a", "rejected": " b"} for i in range(20)]
    assert_like_trl([*begun(text[1:]), text[0]], tokenizer, clean=[*text[1:], text[0]])


def test_texts_that_begin_with_the_prompt_by_chance(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """What one row looks like is no layout: the word "A" begins many answers."""
    rows = [*TEXT, {"prompt": "A", "chosen": "A cat", "rejected": "A dog"}]
    assert_like_trl(rows, tokenizer)
    assert report_of(rows, tokenizer).noted[PROMPT_TWICE] == 1
    assert "in 1 of 3 rows the responses begin with the text of the prompt" in caplog.text


def test_an_empty_prompt_is_not_repeated(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": " ", "chosen": "  a", "rejected": " b"}] * 2
    assert_like_trl(rows, tokenizer)
    noted = report_of(rows, tokenizer).noted
    assert (noted[PROMPT_REPEATED], noted[PROMPT_TWICE], noted[EMPTY_PROMPT]) == (0, 0, 2)


def test_conversations_that_repeat_the_end_of_the_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    clean = [chat([SYSTEM, *TURNS], "42", "41")]
    last = {side: [TURNS[-1], *clean[0][side]] for side in SIDES}
    assert_like_trl([clean[0] | last], tokenizer, clean=clean)
    spaced = [user(" Hi "), *TURNS[1:]]
    spelt = {side: [SYSTEM, *spaced, *clean[0][side]] for side in SIDES}
    assert_like_trl([clean[0] | spelt], tokenizer, clean=clean)
    prefill = chat([user("Hi"), assistant("a")], "a", "b")
    assert_like_trl([prefill], tokenizer)
    assert report_of([prefill], tokenizer).noted[PROMPT_REPEATED] == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": TALKS[0]["rejected"]}, "rejected: does not begin with the prompt's messages"),
        ({"rejected": TALKS[0]["prompt"]}, "rejected: is the prompt's messages alone"),
        ({"chosen": [SYSTEM, *TALKS[0]["chosen"]]}, "chosen: does not begin with the prompt's"),
    ],
)
def test_conversations_that_repeat_the_prompt_in_part(
    change: dict[str, Any], reason: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [begun(TALKS)[0] | change]
    assert error_of(rows, tokenizer).startswith(f"dataset, row 1: {reason}")


def test_a_response_that_begins_with_the_system(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [TALKS[0] | {side: [SYSTEM, *TALKS[0][side]] for side in SIDES}]
    assert error_of(rows, tokenizer).startswith("dataset, row 1: chosen[0]: is a system message")


def test_a_text_prompt_that_begins_conversations(tokenizer: PreTrainedTokenizerBase) -> None:
    """As in UltraFeedback; the prompt is what TRL takes for it where the column is not there."""
    whole = [
        {"chosen": [*start, *row["chosen"]], "rejected": [*start, *row["rejected"]]}
        for start in ([user("Hi")], [SYSTEM, user("Hi")], TURNS)
        for row in TALKS
    ]
    rows = [{"prompt": "Hi\n"} | row for row in whole]
    assert_like_trl(rows, tokenizer, clean=whole)
    assert report_of(rows, tokenizer).noted[PROMPT_REPEATED] == 6
    last = [{"prompt": "What is 12 + 30?"} | row for row in whole[-2:]]
    assert_like_trl(last, tokenizer, clean=whole[-2:])
    message = error_of([rows[0] | {"prompt": "Hello"}], tokenizer)
    assert message.startswith("dataset, row 1: chosen: is a conversation in which no user says")


def test_a_text_prompt_of_messages_is_a_users(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row | {"prompt": text["prompt"]} for row, text in zip(TALKS, TEXT, strict=True)]
    assert_like_trl(rows, tokenizer, clean=TALKS)
    assert report_of(rows, tokenizer).noted[PROMPT_AS_MESSAGE] == 2
    assert "the prompt is read as a user's message" in caplog.text


def test_groups_and_labels_repeat_prompts_too(tokenizer: PreTrainedTokenizerBase) -> None:
    for plain in (TEXT[0], TALKS[0]):
        group = {"prompt": plain["prompt"], "scores": [1, 0]}
        group["responses"] = [plain[side] for side in SIDES]
        whole = group | {"responses": [plain["prompt"] + plain[side] for side in SIDES]}
        assert tokenize_rows([whole], tokenizer) == tokenize_rows([group], tokenizer)
        if not isinstance(plain["prompt"], str):
            text = whole | {"prompt": TEXT[0]["prompt"]}
            assert tokenize_rows([text], tokenizer) == tokenize_rows([group], tokenizer)
        labelled = {"prompt": plain["prompt"], "completion": plain["chosen"], "label": True}
        (made,) = tokenize_rows(
            [labelled | {"completion": plain["prompt"] + plain["chosen"]}], tokenizer, needs=LABELS
        )
        (theirs,) = trl_rows(Dataset.from_list([labelled]), tokenizer, None, KTOTrainer)
        assert made["prompt_ids"] == theirs["prompt_ids"]
        assert made["response_ids"] == [theirs["completion_ids"]]


@pytest.mark.parametrize("kind", ["csv", "text.parquet", "text.jsonl"])
def test_messages_as_json_text(
    tmp_path: Path, kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / f"data.{kind}", TALKS)
    assert_like_trl(load_rows(str(path), "train"), tokenizer, clean=TALKS)
    whole = [{"prompt": TEXT[0]["prompt"]} | WHOLE_TALKS[0]]
    path = write(tmp_path / f"whole.{kind}", whole)
    assert_like_trl(load_rows(str(path), "train"), tokenizer, clean=TALKS[:1])


@pytest.mark.parametrize(
    "written",
    [
        "[{'role': 'user', 'content': 'Hi'}]",
        "[{'content': \"I'm\", 'role': 'user'}\n {'content': 'Hi', 'role': 'assistant'}]",
        "array([{'content': 'Hi', 'role': 'user'}], dtype=object)",
        '[{"role": "user", "content": "cut of',
        "[{'from': 'human', 'value': 'Hi'}]",
        '[{"from": "human", "value": "Hi"}]',
        '{"role": "user", "content": "Hi"}',
    ],
)
@pytest.mark.parametrize("fields", [("prompt",), SIDES])
def test_messages_in_another_notation_are_refused(
    tmp_path: Path, written: str, fields: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [PAIR, PAIR | dict.fromkeys(fields, written)]
    path = write(tmp_path / "data.csv", rows)
    message = error_of(load_rows(str(path), "train"), tokenizer, source=str(path))
    assert message.startswith(f"{path}, line 3: {fields[0]}: is ")
    assert 'expected JSON such as [{"role": "user"' in message


def test_text_that_shows_messages_stays_text(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        PAIR | {"chosen": '[{"role": "user", "content": "Hi"}]', "rejected": "{'role': 'admin'}"},
        PAIR | {"chosen": "[{'role': 'admin'}]", "rejected": "[1, 2]"},
        PAIR | {"prompt": '{"a": 1}', "chosen": "[]", "rejected": "[{}]"},
        PAIR | {"prompt": "array([1])", "chosen": '["role"]', "rejected": "{" * 2000},
    ]
    assert_like_trl(rows, tokenizer)


def test_messages_and_text_in_one_data_set(tokenizer: PreTrainedTokenizerBase) -> None:
    text = [{k: json.dumps(v) for k, v in row.items()} for row in TALKS]
    made = tokenize_rows([text[0], PAIR, text[1]], tokenizer)
    assert made[::2] == tokenize_rows(TALKS, tokenizer)
    assert made[1:2] == tokenize_rows([PAIR], make_tokenizer())
    mixed = text[0] | {"rejected": "Green."}
    assert "row 1: chosen: is text where prompt is a list" in error_of([mixed], tokenizer)
