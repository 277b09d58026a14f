"""`convert`: labelled rows made of pairs, and groups made of labelled rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import (
    CHATS,
    LABELS,
    PAIR,
    SCORES,
    SYSTEM,
    TEXT_ROWS,
    TURNS,
    assistant,
    chat,
    error_of,
    report_of,
    tokenize,
    tokenize_rows,
    user,
)
from datasets import Dataset
from like_trl import trl_rows
from test_tokenize_cache import Untouchable
from transformers import PreTrainedTokenizerBase
from trl import KTOTrainer

from fastdpo.data.load import load_rows
from fastdpo.data.tokenize import tokenize_dataset

pytestmark = pytest.mark.usefixtures("datasets_cache")

Rows = list[dict[str, Any]]
SIDES = ("chosen", "rejected")
UNPAIR: dict[str, Any] = {"convert": "unpair", "needs": LABELS}
PAIRING: dict[str, Any] = {"convert": "pair"}
WHOLE = [{side: row["prompt"] + row[side] for side in SIDES} for row in CHATS[:4]]


def labelled(*rows: tuple[Any, Any, Any]) -> Rows:
    return [{"prompt": p, "completion": c, "label": label} for p, c, label in rows]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# unpair


@pytest.mark.parametrize(
    "rows",
    [
        TEXT_ROWS,
        CHATS,
        WHOLE,
        [{"chosen": "The sky is blue", "rejected": "The sky is red"}] * 2,
        [PAIR | {"prompt": f"{i} is", "chosen": f" {i}"} for i in range(1003)],
        [row | {"tools": json.dumps([{"type": "function"}])} for row in CHATS[:2]],
    ],
    ids=["text", "messages", "no prompt", "text without prompt", "more than 1000", "tools"],
)
def test_unpaired_rows_are_trls(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokens, the labels and the order of TRL's KTO trainer on the same pairs."""
    made, report = tokenize(rows, tokenizer, **UNPAIR)
    expected = trl_rows(Dataset.from_list(rows), tokenizer, None, KTOTrainer)
    assert len(made) == len(expected) == 2 * len(rows)
    for row, theirs in zip(made, expected, strict=True):
        assert row["prompt_ids"] == theirs["prompt_ids"]
        assert row["response_ids"] == [theirs["completion_ids"]]
        assert row["labels"] == [theirs["label"]]
        assert row["winners"] == row["ranks"] == []
    assert str(report).startswith(f"dataset: {len(rows)} pairs made {len(made)} labelled rows; ")


def test_processes_do_not_change_the_order(tokenizer: PreTrainedTokenizerBase) -> None:
    alone = tokenize_rows(TEXT_ROWS, tokenizer, **UNPAIR)
    assert tokenize_rows(TEXT_ROWS, tokenizer, num_proc=2, **UNPAIR) == alone


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_texts_stay_as_written(
    tmp_path: Path, kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """In a column of JSON, a text such as 42 would come back as a number."""
    rows = [{"prompt": "42", "chosen": "1e3", "rejected": "null"}]
    rows += [{"prompt": "[1]", "chosen": '"a"', "rejected": "{}"}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(path, rows)
    else:
        path.write_text('prompt,chosen,rejected\n42,1e3,null\n[1],"""a""",{}\n')
    loaded = load_rows(str(path), "train")
    made = tokenize_rows(loaded, tokenizer, **UNPAIR)
    texts = [tokenizer.decode(row["response_ids"][0]) for row in made]
    assert texts == ["1e3</s>", '"a"</s>', "null</s>", "{}</s>"]
    assert [tokenizer.decode(row["prompt_ids"]) for row in made] == ["42", "[1]"] * 2


def test_mixed_rows_are_unpaired(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "rows.jsonl", [CHATS[0], PAIR, CHATS[1]])
    made = tokenize_rows(load_rows(path, "train"), tokenizer, **UNPAIR)
    pair = tokenize_rows([PAIR], tokenizer)[0]
    own: dict[str, list] = {"response_ids": [], "digests": []}
    assert made[1] | own == made[4] | own | {"labels": [True]}
    assert made[1]["digests"][:2] == made[4]["digests"][:2] != made[1]["digests"][2:]
    assert [made[1]["response_ids"][0], made[4]["response_ids"][0]] == pair["response_ids"]


def test_a_conversation_is_parted_where_its_pair_is(tokenizer: PreTrainedTokenizerBase) -> None:
    """Alone, the turns that only one side has would be taken for a part of the prompt."""
    turns = {side: [user("Hi"), *TURNS[1:], assistant(side)] for side in SIDES}
    rejected = [user("Hi"), assistant("Go away."), user("Why?"), assistant("rejected")]
    row = {"prompt": "Hi", "chosen": turns["chosen"], "rejected": rejected}
    made = tokenize_rows([row], tokenizer, **UNPAIR)
    clean = {"prompt": [user("Hi")], "chosen": row["chosen"][1:], "rejected": rejected[1:]}
    assert made == tokenize_rows([clean], tokenizer, **UNPAIR)


def test_bad_pairs_are_named_by_their_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [PAIR, PAIR | {"chosen": 5}, PAIR, PAIR | {"rejected": None}]
    path = write(tmp_path / "rows.jsonl", rows)
    loaded = load_rows(path, "train")
    message = error_of(loaded, tokenizer, source=path, **UNPAIR)
    assert message.startswith(f"{path}, line 2: chosen: expected text or a list of messages, found")
    made, report = tokenize(loaded, tokenizer, source=path, skip_bad_rows=True, **UNPAIR)
    assert len(made) == 4
    assert (report.rows_in, report.skipped) == (6, 2)
    assert report.reasons[1].startswith(f"{path}, line 4: rejected: expected text or a list of mes")
    implicit = [WHOLE[0], {"chosen": [user("a")], "rejected": [user("b")]}]
    assert error_of(implicit, tokenizer, **UNPAIR).startswith("dataset, row 2: chosen: shares no")
    system = chat([user("Hi")], "a", "b") | {"rejected": [SYSTEM, assistant("b")]}
    message = error_of([CHATS[0], CHATS[1], system], tokenizer, **UNPAIR)
    assert message.startswith("dataset, row 3: completion[0]: is a system message")


def test_lines_of_a_file_that_the_fast_reader_reads(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in (PAIR, PAIR, PAIR | {"chosen": None})]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    message = error_of(load_rows(str(path), "train"), tokenizer, source=str(path), **UNPAIR)
    assert message.startswith(f"{path}, line 5: chosen: expected text")


def test_rows_that_cannot_be_read_stay_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n{{\n", encoding="utf-8")
    rows = load_rows(str(path), "train", skip_bad_rows=True)
    report = report_of(rows, tokenizer, source=str(path), skip_bad_rows=True, **UNPAIR)
    assert (report.rows_out, report.skipped) == (2, 1)
    assert report.reasons[0].startswith(f"{path}, line 2: invalid JSON")


# pair


def test_labelled_rows_of_a_prompt_become_one_group(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = labelled(
        ("p", " a", True), ("q", " x", True), ("p", " b", False), ("p", " c", True),
        ("q", " y", True), ("p", " d", False), ("r", " z", False),
    )  # fmt: skip
    made, report = tokenize(rows, tokenizer, **PAIRING)
    group = {
        "prompt": "p",
        "responses": [" a", " b", " c", " d"],
        "comparisons": [[0, 1], [0, 3], [2, 1], [2, 3]],
    }
    assert made == tokenize_rows([group], tokenizer)
    assert str(report) == (
        "dataset: 7 labelled rows made 1 groups, 3 dropped, all labels of the prompt equal; "
        "1 of 1 rows kept"
    )


@pytest.mark.parametrize("row", [TEXT_ROWS[0], CHATS[0]], ids=["text", "messages"])
def test_pairing_undoes_unpairing(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    rows = labelled((row["prompt"], row["chosen"], True), (row["prompt"], row["rejected"], False))
    made = tokenize_rows(rows, tokenizer, **PAIRING)
    assert made == tokenize_rows([row], tokenizer)


def test_prompts_with_other_tools_are_others(tokenizer: PreTrainedTokenizerBase) -> None:
    talk = CHATS[0]
    rows = labelled(
        (talk["prompt"], talk["chosen"], True), (talk["prompt"], talk["rejected"], False)
    )
    tools = [[{"type": "function", "function": {"name": name}}] for name in "ab"]
    rows = [row | {"tools": one} for one in tools for row in rows]
    made = tokenize_rows(rows, tokenizer, **PAIRING)
    assert len(made) == 2
    assert made == tokenize_rows([talk | {"tools": one} for one in tools], tokenizer)


def test_paired_texts_stay_as_written(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = labelled(("42", "1e3", True), ("42", "null", False))
    mixed = labelled((CHATS[0]["prompt"], CHATS[0]["chosen"], True))
    path = write(tmp_path / "rows.jsonl", [*rows, *mixed])
    (made,) = tokenize_rows(load_rows(path, "train"), tokenizer, **PAIRING)
    assert tokenizer.decode(made["prompt_ids"]) == "42"
    assert [tokenizer.decode(ids) for ids in made["response_ids"]] == ["1e3</s>", "null</s>"]


def test_bad_labelled_rows_are_named_by_their_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    good = labelled(("p", " a", True), ("p", " b", False))
    rows = [*good, *labelled(("p", " c", "yes"), ("q", " a", True), ("q", None, False))]
    path = write(tmp_path / "rows.jsonl", rows)
    loaded = load_rows(path, "train")
    message = error_of(loaded, tokenizer, source=path, **PAIRING)
    assert message == f"{path}, line 3: label: expected true or false, found text"
    made, report = tokenize(loaded, tokenizer, source=path, skip_bad_rows=True, **PAIRING)
    assert made == tokenize_rows([PAIR | {"chosen": " a", "rejected": " b"}], tokenizer)
    assert report.skipped == 2
    # A group has the line of its first row.
    assert report.reasons[1].startswith(f"{path}, line 4: responses[1]: expected text or a list")


def test_scores_beside_labels_are_not_read(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = labelled(("p", " a", True), ("p", " b", False))
    scored = [row | {"scores": [1], "logps": [2.0]} for row in rows]
    assert tokenize_rows(scored, tokenizer, **PAIRING) == tokenize_rows(rows, tokenizer, **PAIRING)


# both


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        (
            UNPAIR,
            labelled(("p", " a", True)),
            "convert: unpair has nothing to convert; expected rows of chosen, rejected, found "
            "prompt, completion, label",
        ),
        (
            UNPAIR,
            [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}],
            "convert: unpair has nothing to convert; expected rows of chosen, rejected, found "
            "prompt, responses, scores",
        ),
        (
            PAIRING,
            [PAIR],
            "convert: pair has nothing to convert; expected rows of prompt, completion, label, "
            "found prompt, chosen, rejected",
        ),
        (
            PAIRING,
            labelled(("p", " a", True), ("q", " b", False)),
            "2 labelled rows made 0 groups, 2 dropped, all labels of the prompt equal; expected a "
            "prompt with both labels",
        ),
        (
            {"convert": "unpair", "needs": SCORES},
            [PAIR],
            "grpo needs rows of prompt, responses, scores; found prompt, completion, label, which "
            "convert: unpair has made",
        ),
    ],
)
def test_conversions_that_make_nothing(
    tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], rows: Rows, message: str
) -> None:
    assert error_of(rows, tokenizer, **options) == f"dataset: {message}"


@pytest.mark.parametrize("convert", ["unpair", "pair"])
def test_the_second_call_reads_the_cache(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerBase,
    convert: str,
) -> None:
    rows = TEXT_ROWS if convert == "unpair" else labelled(("p", " a", True), ("p", " b", False))
    options = UNPAIR if convert == "unpair" else PAIRING
    path = write(tmp_path / "rows.jsonl", rows)
    watched = Untouchable(
        tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map
    )

    def run() -> list[Any]:
        loaded = load_rows(path, "train")
        return tokenize_dataset(loaded, watched, max_length=64, **options)[0].to_list()

    first = run()
    monkeypatch.setattr(Untouchable, "closed", True)
    assert run() == first
