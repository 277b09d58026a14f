"""Loading rows: every kind of file that is read, and what every kind of broken file gets."""

import csv
import errno
import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fastdpo.data.load import Reader, load_rows
from fastdpo.errors import DataError

pytestmark = pytest.mark.usefixtures("datasets_cache")

PAIRS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(4)]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": f"p{i}"}],
        "chosen": [{"role": "assistant", "content": f"c{i}"}],
        "rejected": [{"role": "assistant", "content": f"r{i}"}],
    }
    for i in range(3)
]
GOOD = json.dumps(PAIRS[0])


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_lines(path: Path, *lines: str | bytes) -> Path:
    raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


WRITERS: dict[str, Callable[[Path, list[Any]], Path]] = {"jsonl": write_jsonl, "csv": write_csv}


def load_error(path: Path | str, split: str = "train", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(str(path), split, **options)
    return str(caught.value)


@pytest.mark.parametrize("rows", [PAIRS, MESSAGES], ids=["text", "messages"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet", "arrow", "bom", "indent"])
def test_reads_every_kind_of_file(tmp_path: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / f"data.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "jsonl":
        path.write_text(lines, encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "bom":
        path = tmp_path / "data.jsonl"
        path.write_text(lines, encoding="utf-8-sig")
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "indent":
        path = tmp_path / "data.json"
        path.write_text("\n  " + json.dumps(rows, indent=2), encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    loaded = load_rows(str(path), "train").to_list()
    assert [{name: row[name] for name in rows[0]} for row in loaded] == rows


def test_csv_keeps_every_text_as_written(tmp_path: Path) -> None:
    texts = ["None", "NA", "42", "", "1e3", "true", 'two\nlines, "quoted"', "[1, 2]", "[]"]
    rows = [{"prompt": text, "chosen": text + "+", "rejected": text} for text in texts]
    loaded = load_rows(str(write_csv(tmp_path / "data.csv", rows)), "train")
    assert [{name: row[name] for name in rows[0]} for row in loaded] == rows


def test_csv_holds_lists_as_json(tmp_path: Path) -> None:
    group = {"prompt": "p", "responses": '["a", "b"]', "scores": "[1, 0.5]"}
    loaded = load_rows(str(write_csv(tmp_path / "groups.csv", [group])), "train")
    assert loaded[0]["responses"] == ["a", "b"]
    assert loaded[0]["scores"] == [1, 0.5]

    labelled = [
        {"prompt": "p", "completion": "c", "label": text} for text in ("True", "false", "1")
    ]
    loaded = load_rows(str(write_csv(tmp_path / "labels.csv", labelled)), "train")
    assert loaded["label"][:] == [True, False, 1]


def test_reads_directories(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(PAIRS)
    saved.save_to_disk(tmp_path / "saved")
    assert load_rows(str(tmp_path / "saved"), "train").to_list() == PAIRS
    assert "one of train" in load_error(tmp_path / "saved", "test")

    both = datasets.DatasetDict(train=saved, test=saved.select([0]))
    both.save_to_disk(tmp_path / "both")
    assert load_rows(str(tmp_path / "both"), "test").to_list() == PAIRS[:1]
    assert load_rows(str(tmp_path / "both"), "train[1:3]").to_list() == PAIRS[1:3]
    assert "no split 'dev'; expected one of train, test" in load_error(tmp_path / "both", "dev")

    files = tmp_path / "files"
    files.mkdir()
    write_jsonl(files / "train.jsonl", PAIRS)
    write_jsonl(files / "test.jsonl", PAIRS[2:])
    assert load_rows(str(files), "train").to_list() == PAIRS
    assert load_rows(str(files), "test[:1]").to_list() == PAIRS[2:3]
    assert load_rows(str(files), "train[:1]+test").to_list() == [PAIRS[0], *PAIRS[2:]]
    assert "no split 'dev'; expected one of train, test" in load_error(files, "dev")

    write_lines(files / "test.jsonl", GOOD, "{")
    assert str(files / "test.jsonl") + ", line 2: invalid JSON" in load_error(files, "test")
    (tmp_path / "nothing").mkdir()
    assert str(tmp_path / "nothing") in load_error(tmp_path / "nothing")


def test_files_of_another_kind_in_a_directory_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", PAIRS)
    (folder / "b.json").write_text(json.dumps(PAIRS))
    (folder / "notes.txt").write_text("not data")
    load_rows(str(folder), "train")
    assert not caplog.records
    write_csv(folder / "c.csv", PAIRS)
    assert len(load_rows(str(folder), "train")) == 8
    assert "only its json files are read, not 1 of other kinds, such as c.csv" in caplog.text


def test_a_file_has_only_a_train_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", PAIRS)
    assert load_rows(str(path), "train[:50%]").to_list() == PAIRS[:2]
    assert load_error(path, "test") == f"{path}: no split 'test'; expected one of train"


def test_a_file_that_is_not_there_names_its_neighbours(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train_pairs.jsonl", PAIRS)
    message = load_error(tmp_path / "train_pair.jsonl")
    assert message.startswith(f"{tmp_path / 'train_pair.jsonl'}: not found")
    assert "train_pairs.jsonl" in message
    assert f"the directory {tmp_path / 'no'}" in load_error(tmp_path / "no" / "data.jsonl")


def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = load_error("someone/some-pairs")
    assert "someone/some-pairs" in message
    assert "hub" in message


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "data.xlsx"
    path.write_text("x")
    assert load_error(path).startswith(f"{path}: unknown kind of file; expected one of .jsonl")


BROKEN = [
    ([GOOD, '{"prompt": "a" "b"}'], "line 2: invalid JSON at column 16"),
    ([GOOD, "", '["a", "b"]'], "line 3: expected a JSON object, found a list of 2"),
    ([GOOD, '{"prompt": "a\\ud83d", "chosen": "b", "rejected": "c"}'], "line 2: a text with half"),
    ([GOOD, b'{"prompt": "a\xff", "chosen": "b", "rejected": "c"}'], "line 2: invalid UTF-8: byte"),
    ([GOOD, b'{"prompt": "cut off \xf0\x9f\x98'], "line 2: invalid UTF-8: byte 0xf0"),
]


@pytest.mark.parametrize(("lines", "reason"), BROKEN)
def test_a_broken_line_is_named(
    tmp_path: Path, lines: list[str | bytes], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "data.jsonl", *lines, GOOD)
    assert load_error(path).startswith(f"{path}, {reason}")

    with caplog.at_level(logging.WARNING):
        rows = load_rows(str(path), "train", skip_bad_rows=True)
    assert [row["prompt"] for row in rows] == ["p0", None, "p0"]
    where, _, problem = reason.partition(": ")
    assert rows["fastdpo_problem"][1].startswith(problem)
    assert f"line {rows['fastdpo_line'][1]}" == where
    assert f"{path}: 1 rows cannot be read" in caplog.text


def test_a_file_of_broken_lines_only(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", "{", "}")
    assert load_error(path, skip_bad_rows=True).startswith(f"{path}, line 1: invalid JSON")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", ": is empty"),
        ("a.jsonl", b"\n  \n", ": has no rows"),
        ("a.json", b"[]", ": has no rows"),
        ("a.json", b'[{"prompt": 1},\n {"prompt": ]', ", line 2: invalid JSON at column 13"),
        ("a.json", b'[{"prompt":\n "\xff"}]', ", line 2: invalid UTF-8: byte 0xff"),
        ("a.json", GOOD.encode("utf-16"), ", line 1: the text is UTF-16; expected UTF-8"),
        ("a.json.gz", gzip.compress(b"[]", mtime=0)[:-1], ": damaged gzip file: "),
        ("a.csv.gz", b"prompt,chosen,rejected\n", ": damaged gzip file: "),
        ("a.parquet", b"not parquet at all", ": cannot be read: "),
        ("a.csv", b"", ": is empty"),
        ("a.csv", b"prompt,chosen,rejected\n", ": has no rows"),
        ("a.csv", b"prompt,chosen,rejected\na,b,c\nd,e\n", ", line 3: found 2 fields; expected 3"),
        ("a.csv", b"prompt,chosen,rejected\na,b,\xff\n", ", line 2: rejected: invalid UTF-8"),
        ("a.csv", b'prompt,chosen,rejected\n"a"b,c,d\n', ", line 2: invalid CSV: "),
        (
            "a.csv",
            b"prompt,chosen,rejected,chosen\na,b,c,d\n",
            ", line 1: column 'chosen' is there tw",
        ),
        ("a.csv", b"prompt,responses,scores\na,b,c\n", ", line 2: responses: expected JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert load_error(path).startswith(str(path) + reason)


def test_nesting_that_overruns_the_stack_is_named(tmp_path: Path) -> None:
    """The library's reader ends the process at some 20,000 lists within each other."""
    for start, end in (("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")):
        value = start * 50_000 + "1" + end * 50_000
        path = write_lines(tmp_path / "a.jsonl", GOOD, f'{{"prompt": {value}}}')
        assert load_error(path).startswith(f"{path}, line 2: JSON that is too large")
        assert load_rows(str(path), "train", skip_bad_rows=True)["prompt"][:] == ["p0", None]
    number = '{"prompt": ' + "1" * 5000 + ', "chosen": [1], "rejected": 1}'
    path = write_lines(tmp_path / "a.jsonl", GOOD, number, '{"prompt": "\\ud800"}')
    assert load_error(path).startswith(f"{path}, line 2: JSON that is too large")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_missing_columns_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    rows = [{"question": "a", "chosen": "b"}]
    WRITERS[kind](path, rows)
    message = load_error(path)
    assert message.startswith(f"{path}: missing columns: found chosen, question; expected prompt, ")


@pytest.mark.parametrize("name", ["images", "videos", "audios", "video"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_column_of_what_is_no_text_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = WRITERS[kind](tmp_path / f"data.{kind}", [PAIRS[0] | {name: "a.png"}])
    assert f"has a column of {name}; only text can be trained on" in load_error(path)
    load_rows(str(WRITERS[kind](path, [PAIRS[0] | {"audios": ""}])), "train")


def test_text_survives_rows_of_other_types(tmp_path: Path) -> None:
    """The library's reader makes the number 42 of the text "42" where another row holds a list."""
    rows = [PAIRS[0] | {"chosen": "42"}, MESSAGES[0], PAIRS[1] | {"rejected": "null"}]
    loaded = load_rows(str(write_jsonl(tmp_path / "data.jsonl", rows)), "train")
    assert [{name: row[name] for name in PAIRS[0]} for row in loaded] == rows

    grouped = [{"prompt": "p", "responses": ["7", text], "scores": [0, 1]} for text in ("a", "b")]
    grouped.append({"prompt": "p", "responses": "no list", "scores": [0, 1]})
    loaded = load_rows(str(write_jsonl(tmp_path / "groups.jsonl", grouped)), "train")
    assert loaded["responses"][:] == [row["responses"] for row in grouped]


@pytest.mark.parametrize("other", ["2020-01-02", "2021-01-03T00:00:00", "not a date"])
def test_text_that_looks_like_a_time_is_text(tmp_path: Path, other: str) -> None:
    """The library's reader makes times of a column that holds nothing else."""
    rows = [{"prompt": "2020-01-01", "chosen": "2020-01-02", "rejected": other}]
    loaded = load_rows(str(write_jsonl(tmp_path / "data.jsonl", rows)), "train")
    assert [{name: row[name] for name in rows[0]} for row in loaded] == rows
    assert "fastdpo_line" not in loaded.column_names, "the library's reader failed"


DAY, TIME = "2020-01-02", "2021-01-03T00:00:00Z"


def deep(text: str, when: str) -> dict[str, Any]:
    """A row in which dates stand wherever text may."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"days": [when]}}}
    default = {"day": {"type": "string", "default": DAY}}
    return {
        "prompt": [{"role": "user", "content": TIME}],
        "chosen": [{"role": "assistant", "content": text, "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": DAY}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": default}}],
        "asked": {"at": [{"day": when}]},
    }


@pytest.mark.parametrize(
    "read",
    [
        lambda path: load_rows(path, "train"),
        lambda path: Reader("train", all_columns=True).read(path),
        lambda path: Reader("train").hub("json", data_files=path),
    ],
    ids=["train", "score", "hub"],
)
def test_dates_within_messages_tools_and_any_column_are_text(
    tmp_path: Path, read: Callable[[str], datasets.Dataset]
) -> None:
    rows = [deep(DAY, TIME), deep(TIME, DAY)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    for stored in (False, True):  # by the library itself, in its cache
        if stored:
            datasets.load_dataset("json", data_files=str(path))
        assert read(str(path)).to_list() == rows
    grouped = [{"prompt": "p", "responses": [DAY, TIME], "scores": [0, 1]}]
    loaded = read(str(write_jsonl(tmp_path / "groups.jsonl", grouped)))
    assert loaded["responses"][:] == [[DAY, TIME]]


def test_dates_after_other_texts_are_text(tmp_path: Path) -> None:
    """The library reads 10 MB at a time, and may find nothing but dates in the second."""
    rows = [PAIRS[0] | {"chosen": "x" * (1 << 20)} for _ in range(10)]
    rows += [{"prompt": "p", "chosen": DAY, "rejected": TIME} for _ in range(2)]
    loaded = load_rows(str(write_jsonl(tmp_path / "data.jsonl", rows)), "train")
    assert loaded[-1] == rows[-1]


def test_text_in_an_argument_of_several_types_is_text(tmp_path: Path) -> None:
    """The library's reader makes the number 42 of it, at any depth."""
    rows = [deep("", DAY), deep("", DAY)]
    for row, value in zip(rows, ("42", [1]), strict=True):
        row["chosen"][0]["tool_calls"][0]["function"]["arguments"] = {"a": value}
    loaded = load_rows(str(write_jsonl(tmp_path / "data.jsonl", rows)), "train")
    assert loaded["chosen"][:] == [row["chosen"] for row in rows]


def test_other_columns_may_hold_anything(tmp_path: Path) -> None:
    """Types that change beyond the library's first chunk (10 MB) stop its reader, not ours."""
    filler = "x" * (1 << 20)
    rows: list[Any] = [PAIRS[0] | {"filler": filler, "meta": {"a": 1}} for _ in range(11)]
    rows.append(PAIRS[1] | {"filler": filler, "meta": ["a", {"b": 2}]})
    loaded = load_rows(str(write_jsonl(tmp_path / "data.jsonl", rows)), "train")
    assert loaded["prompt"][:] == ["p0"] * 11 + ["p1"]
    assert "fastdpo_line" in loaded.column_names, "the library's own reader managed"


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for kind in ("jsonl", "csv"):
        path = tmp_path / f"data.{kind}"
        for rows in (PAIRS, PAIRS[::-1]):
            WRITERS[kind](path, rows)
            assert load_rows(str(path), "train")["prompt"][:] == [row["prompt"] for row in rows]


def test_a_cache_on_a_full_disk_is_one_line(tmp_path, datasets_cache, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", full)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"No space left on device.*HF_DATASETS_CACHE"):
        load_rows(str(path), "train")
