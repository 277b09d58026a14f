"""Bad data files: what `fastdpo train` has to say of each, by file and line or row."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from bad_inputs import Case

PAIR = {"prompt": "question one two", "chosen": " a cat", "rejected": " a dog"}
GROUP = {"prompt": "question", "responses": [" a", " b", " c"], "scores": [1, 2, 3]}
LABEL = {"prompt": "question", "completion": " a cat", "label": True}
CHAT = {
    "prompt": [{"role": "user", "content": "question"}],
    "chosen": [{"role": "assistant", "content": "a cat"}],
    "rejected": [{"role": "assistant", "content": "a dog"}],
}


def lines(*rows: Any) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def file(name: str, content: bytes, expected: str, what: str = "", *flags: str) -> Case:
    """Data of these bytes under this name; `expected` follows the name."""
    arguments = ("train", "config.yaml", "--dataset_name", name, *flags)

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)

    return Case(f"{name} {what}", f"{name}{expected}", arguments, prepare)


def row(what: str, expected: str, base: dict[str, Any] = PAIR, *flags: str, **changes: Any) -> Case:
    """A second line that is `base` with `changes`; a value of ... leaves the field out."""
    bad = {name: value for name, value in (base | changes).items() if value is not ...}
    return file("rows.jsonl", lines(base, bad), f", line 2: {expected}", what, *flags)


def named(what: str, name: str, expected: str, *flags: str) -> Case:
    """A data set of this name, for which nothing is made."""
    return Case(what, expected, ("train", "config.yaml", "--dataset_name", name, *flags))


def table(name: str, columns: dict[str, list[Any]], expected: str) -> Case:
    """A Parquet file of these columns."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        pyarrow.parquet.write_table(pyarrow.table(columns), path / name)

    arguments = ("train", "config.yaml", "--dataset_name", name)
    return Case(f"{name} {columns}"[:90], expected, arguments, prepare)


def folder(what: str, make: Callable[[Path], object], expected: str, *flags: str) -> Case:
    """A directory `data` that `make` fills."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        (path / "data").mkdir()
        make(path / "data")

    arguments = ("train", "config.yaml", "--dataset_name", "data", *flags)
    return Case(what, expected, arguments, prepare)


def _parquet(rows: int = 3) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({name: [text] * rows for name, text in PAIR.items()})
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _message(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": "a cat"} | fields]


GOOD = lines(PAIR, PAIR | {"prompt": "other "})
PACKED = gzip.compress(GOOD)
HEADER = b"prompt,chosen,rejected\n"

NAMES = [
    named("no such file", "no.jsonl", "no.jsonl: not found"),
    named("a typo in the name", "pair.jsonl", "pair.jsonl: not found…pairs.jsonl"),
    named("no such directory", "no/where/pairs.jsonl", "no/where/pairs.jsonl: not found"),
    named("a file as a directory", "pairs.jsonl/pairs.jsonl", "pairs.jsonl/pairs.jsonl: not fou"),
    named("the model as data", "model", "…model/…json"),
    named(
        "no such split", "pairs.jsonl", "pairs.jsonl: no split 'dev'", "--dataset_train_split=dev"
    ),
    named(
        "a split that is no split",
        "pairs.jsonl",
        "pairs.jsonl: no split",
        "--dataset_train_split=[",
    ),
    named(
        "an empty slice",
        "pairs.jsonl",
        "pairs.jsonl: …train[5:5]",
        "--dataset_train_split=train[5:5]",
    ),
    named(
        "a slice past the end",
        "pairs.jsonl",
        "pairs.jsonl: …train[100:200]",
        "--dataset_train_split=train[100:200]",
    ),
    named(
        "a slice of words",
        "pairs.jsonl",
        "pairs.jsonl: no split",
        "--dataset_train_split=train[a:b]",
    ),
    named(
        "no such evaluation file",
        "pairs.jsonl",
        "no.jsonl: not found",
        "--eval_dataset_name=no.jsonl",
        "--do_eval",
    ),
]

KINDS = [
    file("rows.txt", GOOD, ": unknown kind of file; expected one of .jsonl"),
    file("rows", GOOD, ": unknown kind of file; expected one of .jsonl"),
    file("rows.jsonl.bz2", GOOD, ": unknown kind of file; expected one of .jsonl"),
    file("rows.jsonl", b"", ": is empty; expected at least one row", "empty"),
    file("rows.csv", b"", ": is empty; expected at least one row", "empty"),
    file("rows.parquet", b"", ": is empty; expected at least one row", "empty"),
    file("rows.jsonl", b"\n \n", ": has no rows", "blank lines"),
    file("rows.json", b"[]", ": has no rows", "empty list"),
    file("rows.json", b"[1, 2]", ": missing columns: found text", "numbers"),
    file("rows.json", b'"text"', "…expected a JSON object, found text", "text"),
    file("rows.json", GOOD[:-20], ", line 2: invalid JSON", "cut off"),
    file("rows.json", b"[" + lines(PAIR), ", line …: invalid JSON", "open list"),
    file(
        "rows.json",
        b'{"train": [' + lines(PAIR) + b"]}",
        ": train holds rows; expected a list of them",
        "split",
    ),
    file("rows.jsonl", GOOD + b'{"prompt": "x",\n', ", line 3: invalid JSON at column", "open row"),
    file("rows.jsonl", GOOD + b"{'prompt': 'x'}\n", ", line 3: invalid JSON at column", "quotes"),
    file("rows.jsonl", GOOD + b"[1]\n", ", line 3: expected a JSON object, found a list", "list"),
    file("rows.jsonl", GOOD + b"null\n", ", line 3: ", "null"),
    file("rows.jsonl", b" null\n" + GOOD, ", line 1: expected a JSON object, found null", "null 1"),
    file("rows.jsonl", GOOD + b"\x00\x00\n", ", line 3: invalid JSON at column 1", "NUL"),
    file(
        "rows.jsonl",
        GOOD + b'{"prompt": "caf\xe9"}\n',
        ", line 3: invalid UTF-8: byte 0xe9",
        "Latin-1",
    ),
    file("rows.jsonl", GOOD + b'{"prompt": "\\ud800"}\n', ", line 3: …surrogate", "surrogate"),
    file(
        "rows.jsonl",
        GOOD.decode().encode("utf-16"),
        ", line 1: the text is UTF-16; expected UT",
        "UTF-16",
    ),
    file("rows.jsonl", GOOD + b'{"a": NaN}\n', ", line 3: …", "NaN row"),
    file(
        "rows.jsonl", GOOD + b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}\n", ", line 3: …", "deep"
    ),
    file("rows.jsonl", GOOD + b'{"a": ' + b"9" * 5000 + b"}\n", ", line 3: …", "5000 digits"),
    file("rows.jsonl", bytes(range(256)) * 20, ", line 1: invalid ", "binary"),
    file("rows.jsonl", PACKED, ", line 1: invalid UTF-8", "gzip by another name"),
    file("rows.jsonl.gz", PACKED[:-20], ": damaged gzip file", "cut off"),
    file("rows.jsonl.gz", PACKED[:40] + b"xx" + PACKED[42:], ": damaged gzip file", "changed"),
    file("rows.jsonl.gz", GOOD, ": damaged gzip file", "no gzip"),
    file("rows.jsonl.gz", b"", ": is empty", "empty"),
    file("rows.parquet", _parquet()[:-30], ": cannot be read: ", "cut off"),
    file("rows.parquet", GOOD, ": cannot be read: ", "JSON"),
    file(
        "rows.parquet", _parquet()[:4] + b"x" * 99 + _parquet()[103:], ": cannot be read", "changed"
    ),
    file("rows.arrow", b"ARROW1" + bytes(range(200)), ": cannot be read: ", "garbage"),
    file("rows.arrow", _parquet(), ": cannot be read: ", "Parquet"),
    file("rows.csv", HEADER, ": has no rows", "header alone"),
    file("rows.csv", HEADER + b"a,b\n", ", line 2: found 2 fields; expected 3", "few"),
    file("rows.csv", HEADER + b"a,b,c\na,b,c,d\n", ", line 3: found 4 fields; expected 3", "many"),
    file("rows.csv", HEADER + b'a,"b,c\n', ", line 2: invalid CSV", "open quote"),
    file("rows.csv", HEADER + b"a,caf\xe9,c\n", ", line 2: chosen: invalid UTF-8", "Latin-1"),
    file(
        "rows.csv",
        b"prompt;chosen;rejected\na;b;c\n",
        ": the header has ';' in it; expected commas",
        "semicolons",
    ),
    file("rows.csv", b"a,b,c\n", ": has no rows", "no header"),
    file(
        "rows.csv",
        b'prompt,responses,scores\np,"[""a"", ""\\ud800""]","[1, 2]"\n',
        ", line 2: responses: a text with half a surrogate pair",
        "surrogate",
    ),
    row(
        "half a surrogate pair in written messages",
        "prompt: a text with half a surrogate pair",
        prompt='[{"role": "user", "content": "\\ud800"}]',
    ),
    row("half a surrogate pair in tools", "tools: a text with half a", CHAT, tools='["\\ud800"]'),
    file(
        "rows.csv",
        b"prompt,chosen,chosen,rejected\na,b,b,c\n",
        ", line 1: column 'chosen' is",
        "twice",
    ),
    file(
        "rows.csv", (HEADER + b"a,b,c\n").decode().encode("utf-16"), ", line 1: …UTF-16", "UTF-16"
    ),
    file(
        "rows.csv",
        b"prompt,completion,label\na,b,maybe\n",
        ", line 2: label: expected JSON",
        "label",
    ),
]

COLUMNS = [
    file(
        "rows.jsonl",
        lines({"text": "a"}),
        ": missing columns: found text; expected prompt, ch",
        "text",
    ),
    file(
        "rows.jsonl",
        lines({"prompt": "a", "chosen": "b"}),
        ": missing columns: found chosen, prompt",
        "one",
    ),
    file(
        "rows.jsonl",
        lines({"chosen": 1, "rejected": 2, "image": 3}),
        ": has a column of image;",
        "image",
    ),
    file(
        "rows.jsonl",
        lines({"prompt": "a", "responses": ["b"]}),
        ": missing columns: found prompt, r",
        "N",
    ),
    file(
        "rows.jsonl",
        lines({"messages": [{"role": "user"}]}),
        ": missing columns: found messages",
        "chat",
    ),
    file("rows.jsonl", lines({}), ": has no rows", "no columns"),
    file(
        "rows.jsonl",
        lines(LABEL),
        ": …needs rows of prompt, chosen, rejected…; found prompt, completion, label; convert: p",
        "KTO",
        "--loss_type=sigmoid",
    ),
    file(
        "rows.jsonl",
        lines({"prompt": "a", "responses": ["b"], "ranking": [1]}),
        ": missing columns: found prompt, ranking, responses (is 'ranking' for rankings?)",
        "ranking",
    ),
    file(
        "rows.jsonl",
        lines(GROUP | {"logp": [-1, -2, -3]}),
        ": column 'logp' is not read; expected 'logps'",
        "logp",
    ),
    table(
        "rows.parquet",
        {"prompt": ["a"], "chosen": [1], "rejected": [2]},
        "rows.parquet, row 1: chosen",
    ),
    table("rows.parquet", {"text": ["a"]}, "rows.parquet: missing columns: found text"),
    table(
        "rows.parquet",
        {"prompt": ["a", None], "chosen": ["b", "c"], "rejected": ["d", "e"]},
        "rows.parquet, row 2: prompt: expected text or a list of messages, found null",
    ),
]

ROWS = [
    row("null prompt", "prompt: expected text or a list of messages, found null", prompt=None),
    row("no chosen", "chosen: expected text or a list of messages, found null", chosen=...),
    row("empty chosen", "chosen: …", CHAT, chosen=[]),
    row("number", "chosen: expected text or a list of messages, found the number 4", chosen=4),
    row("object", "rejected: expected text or a list …, found an object", rejected={"role": "a"}),
    row("list of texts", "chosen[0]: expected a message with role and content", chosen=["a"]),
    row("identical", "chosen and rejected: are identical", rejected=" a cat"),
    row(
        "messages and text", "chosen: is a list of messages where prompt is text", chosen=_message()
    ),
    row(
        "unknown role", "chosen[0].role: unknown role 'robot'", CHAT, chosen=_message(role="robot")
    ),
    row("number as role", "chosen[0].role: unknown role 7", CHAT, chosen=_message(role=7)),
    row(
        "list as role",
        "chosen[0].role: unknown role ['user']",
        CHAT,
        chosen=_message(role=["user"]),
    ),
    row(
        "number as content",
        "chosen[0].content: expected text, found",
        CHAT,
        chosen=_message(content=7),
    ),
    row("null as content", "chosen[0].content: missing", CHAT, chosen=_message(content=None)),
    row(
        "ShareGPT",
        "chosen[0]: expected a message with role",
        CHAT,
        chosen=[{"from": "gpt", "value": "a"}],
    ),
    row("nested list", "chosen[0]: expected a message with role", CHAT, chosen=[_message()]),
    row(
        "image part",
        "chosen[0].content[0]: …image",
        CHAT,
        chosen=_message(content=[{"type": "image"}]),
    ),
    row("tools as text", "tools: expected JSON", CHAT, tools="weather"),
    row("tools as number", "tools: expected …", CHAT, tools=5),
    row(
        "template kwargs", "chat_template_kwargs: …", CHAT, chat_template_kwargs={"tokenize": False}
    ),
    row("few scores", "scores: expected a list of 3 numbers", GROUP, scores=[1, 2]),
    row(
        "words as scores",
        "scores[0]: expected a finite number, found text",
        GROUP,
        scores=["a", 1, 2],
    ),
    row(
        "null score", "scores[1]: expected a finite number, found null", GROUP, scores=[1, None, 2]
    ),
    row(
        "true as score",
        "scores[1]: expected a finite number, found true",
        GROUP,
        scores=[1, True, 2],
    ),
    row(
        "infinite score", "scores[1]: expected a finite number", GROUP, scores=[1, float("inf"), 2]
    ),
    row("no responses", "responses: expected a list of texts", GROUP, responses=[], scores=[]),
    row("text as responses", "responses: expected a list of texts", GROUP, responses="abc"),
    row("null response", "responses[1]: expected text", GROUP, responses=[" a", None, " b"]),
    row(
        "index too large",
        "comparisons[0]: expected indices of responses from 0 to 2",
        GROUP,
        comparisons=[[0, 3]],
    ),
    row(
        "negative index",
        "comparisons[0]: expected indices of responses from 0 to 2",
        GROUP,
        comparisons=[[0, -1]],
    ),
    row(
        "with itself",
        "comparisons[0]: compares response 1 with itself",
        GROUP,
        comparisons=[[1, 1]],
    ),
    row("three words", "comparisons[0]: expected …", GROUP, comparisons=["0 over 1"]),
    row(
        "negative weight",
        "comparisons[0]: expected a finite weight",
        GROUP,
        comparisons=[[0, 1, -1]],
    ),
    row("true as index", "comparisons[0]: expected indices", GROUP, comparisons=[[True, 0]]),
    row("ranks from 0", "rankings[0]: expected a whole number from 1", GROUP, rankings=[0, 1, 2]),
    row("half a rank", "rankings[1]: expected a whole number", GROUP, rankings=[1, 2.5, 2.5]),
    row("few ranks", "rankings: expected a list of 3 whole numbers", GROUP, rankings=[1, 2]),
    row("few logps", "logps: expected a list of 3 numbers", GROUP, logps=[-1]),
    row("odds as logps", "logps[0]: expected a finite log-prob", GROUP, logps=[2.5, -1, -1]),
]

LENGTHS = [
    file(
        "rows.jsonl",
        GOOD,
        ": 0 of 2 rows kept; 2 dropped, …max_length is 2",
        "long",
        "--max_length=2",
    ),
    file(
        "rows.jsonl",
        lines(GROUP | {"scores": [1, 1, 1]}),
        ": 0 of 1 rows kept; 1 dropped without",
        "equal",
    ),
    file(
        "rows.jsonl",
        lines(PAIR | {"rejected": " a cat"}),
        ": 0 of 1 rows kept",
        "skipped",
        "--skip_bad_rows",
    ),
    file("rows.jsonl", b"{\n" * 3, ", line 1: invalid JSON", "all skipped", "--skip_bad_rows"),
]


def _state(path: Path) -> None:
    (path / "state.json").write_text("{}")


def _broken_dict(path: Path) -> None:
    (path / "dataset_dict.json").write_text('{"splits": ["train"]}')


def _two_kinds(path: Path) -> None:
    (path / "train.jsonl").write_bytes(GOOD)
    (path / "train-2.jsonl").write_bytes(lines({"text": "a"}))


def _test_only(path: Path) -> None:
    (path / "test.jsonl").write_bytes(GOOD)


FOLDERS = [
    folder("an empty directory", lambda path: None, "data: …data files"),
    folder(
        "a directory of texts", lambda path: (path / "a.txt").write_text("a"), "data: …data files"
    ),
    folder("a directory saved in part", _state, "data: …dataset_info.json"),
    folder("a directory without its splits", _broken_dict, "data…"),
    folder("files of two layouts", _two_kinds, "data…"),
    folder(
        "a directory without the split", _test_only, "data: no split 'train'; expected one of test"
    ),
    folder(
        "a directory with a bad file",
        lambda path: (path / "train.jsonl").write_bytes(GOOD + b"{\n"),
        "…data/train.jsonl, line 3: invalid JSON",
    ),
]

CASES = [*NAMES, *KINDS, *COLUMNS, *ROWS, *LENGTHS, *FOLDERS]
