"""Several data sets read as one, packed and remote files, and streams."""

import gzip
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from data_samples import error_of, tokenize_rows
from datasets import Dataset, IterableDataset, load_dataset
from layout_samples import ASKED, BAD, CHAT, GOOD, TEXT, TWO, WHOLE, Row, gpt, human
from transformers import PreTrainedTokenizerBase
from trl import DatasetMixtureConfig, get_dataset

from fastdpo import train
from fastdpo.config import TrainConfig
from fastdpo.data.dataset import load_data
from fastdpo.data.load import load_rows, looks_local
from fastdpo.data.mixture import load_mixture
from fastdpo.errors import ConfigError, DataError
from fastdpo.hub import _needed as hub_is_needed

pytestmark = pytest.mark.usefixtures("datasets_cache")


def rows_of(name: str, count: int) -> list[Row]:
    return [{"prompt": f"{name}{i}", "chosen": " a", "rejected": " b"} for i in range(count)]


def write(path: Path, rows: list[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """Files of 6 and of 10 rows."""
    return write(tmp_path / "a.jsonl", rows_of("a", 6)), write(
        tmp_path / "b.jsonl", rows_of("b", 10)
    )


def prompts(entries: list[dict[str, Any]], seed: int = 0, **options: Any) -> list[str]:
    _, read = load_mixture(entries, seed=seed, **options)
    return list(read["prompt"])


@pytest.mark.parametrize("fractions", [(None, None), (0.5, 0.5), (1, 3), (3, 1), (0.2, 0.3)])
def test_a_mixture_is_trls(two: tuple[str, str], fractions: tuple[float | None, ...]) -> None:
    entries = [
        {"path": "json", "data_files": name, "columns": ["prompt", "chosen", "rejected"]}
        | ({} if fraction is None else {"fraction": fraction})
        for name, fraction in zip(two, fractions, strict=True)
    ]
    theirs = get_dataset(DatasetMixtureConfig(datasets=[dict(entry) for entry in entries]))
    assert prompts(entries) == list(theirs["train"]["prompt"])


def test_a_weight_is_how_often_rows_are_taken(two: tuple[str, str]) -> None:
    taken = prompts([{"path": two[0], "weight": 2}, {"path": two[1], "weight": 0.5}])
    first, second = taken[:12], taken[12:]
    assert first == [f"a{i}" for i in range(6)] * 2
    assert len(set(second)) == 5
    assert set(second) <= {f"b{i}" for i in range(10)}
    more = prompts([{"path": two[0], "weight": 1.5}, {"path": two[1]}])
    assert more[:6] == [f"a{i}" for i in range(6)]
    assert len(more) == 6 + 3 + 10


def test_the_seed_selects_the_rows(two: tuple[str, str]) -> None:
    entries = [{"path": two[1], "weight": 0.5}, {"path": two[0]}]
    assert prompts(entries, seed=3) == prompts(entries, seed=3)
    assert prompts(entries, seed=3) != prompts(entries, seed=4)


def test_each_data_set_has_its_own_layout(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    talk = {"conversations": [human(ASKED)], "chosen": gpt(GOOD), "rejected": gpt(BAD)}
    mapped = {"frage": ASKED, "gut": GOOD, "schlecht": BAD}
    entries: list[dict[str, Any]] = [
        {"path": write(tmp_path / "text.jsonl", [TEXT])},
        {"path": write(tmp_path / "talk.jsonl", [talk])},
        {"path": write(tmp_path / "whole.jsonl", [WHOLE])},
        {
            "path": write(tmp_path / "mapped.jsonl", [mapped]),
            "columns": {"instruction": "frage", "chosen": "gut", "rejected": "schlecht"},
        },
    ]
    name, read = load_mixture(entries, seed=0)
    made = tokenize_rows(read, tokenizer, source=name)
    assert made == [tokenize_rows([row], tokenizer)[0] for row in (TEXT, CHAT, CHAT, CHAT)]


@pytest.mark.parametrize("weight", [None, 0.5, 2])
def test_a_bad_row_of_a_mixture_is_named_by_its_file(
    tmp_path: Path, weight: float | None, two: tuple[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    bad = write(tmp_path / "bad.jsonl", [TEXT | {"chosen": 5}, TEXT | {"chosen": 5}])
    entry = {"path": bad} if weight is None else {"path": bad, "weight": weight}
    name, read = load_mixture([{"path": two[0]}, entry], seed=1)
    message = error_of(read, tokenizer, source=name)
    line = (1, 2) if weight == 0.5 else (1,)
    assert message in [
        f"{bad}, line {n}: chosen: expected text or a list of messages, found the number 5"
        for n in line
    ]


def test_rows_of_two_kinds_do_not_mix(tmp_path: Path, two: tuple[str, str]) -> None:
    other = write(tmp_path / "labels.jsonl", [{"prompt": "p", "completion": "c", "label": True}])
    with pytest.raises(DataError) as caught:
        load_mixture([{"path": two[0]}, {"path": other}], seed=0)
    assert str(caught.value) == (
        f"{other}: rows of prompt, completion, label cannot be joined with those of {two[0]}, of "
        "prompt, chosen, rejected; expected rows of one kind in all datasets"
    )


def test_columns_of_an_entry_that_are_not_there(two: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="columns: no column 'chosn'; expected some of prompt"):
        load_mixture([{"path": two[0], "columns": ["prompt", "chosn"]}], seed=0)


def test_files_of_an_entry(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(folder / "in" / "a.jsonl", rows_of("a", 2))
    write(folder / "in" / "b.jsonl", rows_of("b", 1))
    entry = {"path": str(folder), "data_dir": "in"}
    assert prompts([entry | {"data_files": ["b.jsonl", "a.jsonl"]}]) == ["b0", "a0", "a1"]
    assert prompts([entry | {"data_files": {"train": "a.jsonl"}}]) == ["a0", "a1"]
    assert prompts([entry]) == ["a0", "a1", "b0"]
    with pytest.raises(DataError, match="data_files: no files of the split 'train'"):
        prompts([entry | {"data_files": {"test": "a.jsonl"}}])


def test_the_key_is_read(
    two: tuple[str, str], tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    entries: list[dict[str, object]] = [{"path": two[0], "weight": 0.5}, {"path": two[1]}]
    with caplog.at_level(logging.INFO):
        data = load_data(TrainConfig(datasets=entries), tokenizer, None)
    assert len(data.train) == 3 + 10
    assert f"data: {two[0]} + {two[1]}: 13 of 13 rows kept" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"datasets": [{"name": "x"}]}, "datasets: entry 1: expected a path"),
        (
            {"datasets": [{"path": "a"}, {"path": "b", "splt": "train"}]},
            "datasets: entry 2: unknown key splt; expected some of path, name",
        ),
        ({"datasets": [{"path": "a", "weight": 0}]}, "entry 1: weight: expected a number greater"),
        ({"datasets": [{"path": "a", "split": 3}]}, "entry 1: split: expected a text"),
        ({"datasets": [{"path": "a", "columns": "x"}]}, "entry 1: columns: expected a list of"),
        ({"datasets": [{"path": "a", "columns": {"x": "y"}}]}, "entry 1: columns: expected the"),
        ({"datasets": [{"path": "a", "layout": "x"}]}, "entry 1: layout: expected one of trl"),
        (
            {"datasets": [{"path": "a", "fraction": 1}, {"path": "b"}]},
            "datasets: expected a fraction for every entry, or for none",
        ),
        (
            {"datasets": [{"path": "a", "fraction": 1, "weight": 1}]},
            "datasets: expected fraction, the share of the mixture, or weight",
        ),
        ({"datasets": [{"path": "a"}], "dataset_name": "b"}, "datasets: cannot go with dataset_n"),
        ({"layout": "hh", "columns": {"chosen": "a"}}, "columns: cannot go with layout"),
        ({"layout": "nothing"}, "layout: expected one of trl, openai_calls"),
        ({"columns": {"question": "a"}}, "columns: expected the columns of some of prompt"),
        ({"columns": {"prompt": 3}}, "columns: expected a mapping"),
        ({"columns": {}}, "columns: expected the columns of some of"),
    ],
)
def test_keys_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**keys)
    assert message in str(caught.value)


def test_keys_from_a_file_and_from_flags(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "datasets:\n"
        "  - {path: a.jsonl, columns: [prompt, chosen], fraction: 0.25, name: null}\n"
        "  - {path: b, data_files: {train: [x, y]}, fraction: 1}\n"
        "columns: {prompt: q, responses: [a, b], scores: s.*.n}\n"
        "streaming: true\n"
    )
    config = TrainConfig.parse([str(file)])
    assert config.datasets[0]["columns"] == ["prompt", "chosen"]
    assert config.datasets[1]["data_files"] == {"train": ["x", "y"]}
    assert config.columns == {"prompt": "q", "responses": ["a", "b"], "scores": "s.*.n"}
    assert config.dataset_streaming
    config.save(tmp_path / "saved.yaml")
    assert TrainConfig.parse([str(tmp_path / "saved.yaml")]) == config
    flags = ["--columns", '{"prompt": "q"}', "--datasets", '{"path": "a"}', '{"path": "b"}']
    config = TrainConfig.parse(flags)
    assert config.columns == {"prompt": "q"}
    assert config.datasets == [{"path": "a"}, {"path": "b"}]
    whole = TrainConfig.parse(["--datasets", ' [{"path": "a"}, {"path": "b"}]'])
    assert whole.datasets == config.datasets
    with pytest.raises(ConfigError, match="--datasets: expected a list"):
        TrainConfig.parse(["--datasets", '[{"path": "a"}, 3]'])


def test_a_run_with_datasets_needs_data_to_evaluate_on(
    two: tuple[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    config = TrainConfig(datasets=[{"path": two[0]}], do_eval=True)
    with pytest.raises(ConfigError, match="eval_dataset_name: expected the data to evaluate on"):
        load_data(config, tokenizer, None)


# files


def zstd(path: Path, content: bytes) -> Path:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(content)
    return path


def test_packed_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    content = "".join(json.dumps(row) + "\n" for row in (TEXT, TEXT)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    packed = zstd(tmp_path / "b.jsonl.zst", content)
    expected = tokenize_rows([TEXT, TEXT], tokenizer)
    for path in (tmp_path / "a.jsonl.gz", packed):
        assert tokenize_rows(load_rows(str(path), "train"), tokenizer) == expected
    table = zstd(tmp_path / "c.csv.zst", b"prompt,chosen,rejected\np,a,b\n")
    assert load_rows(str(table), "train")[0]["chosen"] == "a"


def test_a_folder_of_packed_files(tmp_path: Path) -> None:
    for name in ("x", "y"):
        row = json.dumps(TEXT | {"prompt": name}).encode()
        zstd(tmp_path / f"{name}.jsonl.zst", row)
    assert list(load_rows(str(tmp_path), "train")["prompt"]) == ["x", "y"]


def test_a_changed_packed_file_is_read_again(tmp_path: Path) -> None:
    path = zstd(tmp_path / "a.jsonl.zst", json.dumps(TEXT).encode())
    assert load_rows(str(path), "train")["prompt"][0] == ASKED
    zstd(path, json.dumps(TEXT | {"prompt": "another"}).encode())
    assert load_rows(str(path), "train")["prompt"][0] == "another"


def test_a_bad_line_of_a_packed_file_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = zstd(tmp_path / "a.jsonl.zst", json.dumps(TEXT).encode() + b"\n{")
    with pytest.raises(DataError) as caught:
        load_rows(str(path), "train")
    assert str(caught.value).startswith(f"{path}, line 2: invalid JSON at column 2")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError) as caught:
        load_rows(str(path), "train")
    assert str(caught.value).startswith(f"{path}: damaged zstd file: ")


def test_a_folder_of_parquet(tmp_path: Path) -> None:
    for name in ("x", "y"):
        Dataset.from_list([TEXT | {"prompt": name}]).to_parquet(tmp_path / f"{name}.parquet")
    assert list(load_rows(str(tmp_path), "train")["prompt"]) == ["x", "y"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """A file system in memory, in place of the hub's."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()

    def url_to_fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
        assert url.startswith("hf://")
        return memory, f"/{url.removeprefix('hf://')}"

    monkeypatch.setattr(fsspec, "url_to_fs", url_to_fs)
    yield memory
    memory.store.clear()


URL = "hf://datasets/owner/name/data"


def test_a_file_of_a_url(hub: fsspec.AbstractFileSystem) -> None:
    hub.pipe("/datasets/owner/name/data/a.jsonl", json.dumps(TEXT).encode())
    assert load_rows(f"{URL}/a.jsonl", "train")[0] == TEXT
    hub.pipe("/datasets/owner/name/data/a.jsonl", json.dumps(TEXT | {"prompt": "new"}).encode())
    assert load_rows(f"{URL}/a.jsonl", "train")[0]["prompt"] == "new"


def test_a_folder_of_a_url(hub: fsspec.AbstractFileSystem) -> None:
    for name in ("x", "y"):
        row = json.dumps(TEXT | {"prompt": name}).encode()
        hub.pipe(f"/datasets/owner/name/data/{name}.jsonl", row)
    assert list(load_rows(URL, "train")["prompt"]) == ["x", "y"]


def test_what_is_wrong_with_a_url_is_said_of_it(hub: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(DataError, match=rf"^{URL}/a\.jsonl: not found$"):
        load_rows(f"{URL}/a.jsonl", "train")
    hub.pipe("/datasets/owner/name/data/a.jsonl", b"{")
    with pytest.raises(DataError, match=rf"^{URL}/a\.jsonl, line 1: invalid JSON"):
        load_rows(f"{URL}/a.jsonl", "train")
    assert not looks_local(f"{URL}/a.jsonl")


def test_a_protocol_that_nobody_knows() -> None:
    with pytest.raises(DataError, match=r"^nowhere://a/b\.jsonl: cannot be read: "):
        load_rows("nowhere://a/b.jsonl", "train")


def test_a_url_of_a_whole_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: Any, **options: Any) -> Dataset:
        asked.append((*arguments, options["split"], options["revision"]))
        return Dataset.from_list([TEXT])

    monkeypatch.setattr("datasets.load_dataset", load)
    load_rows("hf://datasets/owner/name", "train")
    load_rows("hf://datasets/owner/name@v2", "test", config_name="c")
    assert asked == [("owner/name", None, "train", None), ("owner/name", "c", "test", "v2")]


# streams and rows in memory


def test_a_stream_is_read_to_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", [TEXT, TEXT | {"prompt": "Hi"}])
    stream = load_dataset("json", data_files=path, split="train", streaming=True)
    assert isinstance(stream, IterableDataset)
    with caplog.at_level(logging.INFO):
        data = load_data(TrainConfig(), tokenizer, None, rows=stream)
    assert len(data.train) == 2
    assert "the stream is read to the cache once, before the run" in caplog.text


def test_streaming_is_accepted(
    two: tuple[str, str], tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig(dataset_name=two[0], dataset_streaming=True)
    with caplog.at_level(logging.INFO):
        data = load_data(config, tokenizer, None)
    assert len(data.train) == 6
    assert caplog.text.count("dataset_streaming: the rows are read to the cache once") == 1


@pytest.mark.parametrize("as_dataset", [False, True])
def test_layouts_in_memory(as_dataset: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [TWO | {"winner": "model_b", "n": 3}]
    held = Dataset.from_list(rows) if as_dataset else rows
    (group,) = load_data(TrainConfig(), tokenizer, None, rows=held).train
    assert [(c[0], c[1]) for c in group.comparisons] == [(1, 0)]
    columns: dict[str, str | list[str]] = {"prompt": "q", "chosen": "a.0", "rejected": "a.1"}
    rows = [{"q": ASKED, "a": [GOOD, BAD]}]
    held = Dataset.from_list(rows) if as_dataset else rows
    (mapped,) = load_data(TrainConfig(columns=columns), tokenizer, None, rows=held).train
    (plain,) = load_data(TrainConfig(), tokenizer, None, rows=[TEXT]).train
    assert list(mapped.prompt) == list(plain.prompt)
    assert list(map(list, mapped.responses)) == list(map(list, plain.responses))


def test_scores_of_a_pair_are_read_by_a_loss_of_scores(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": ASKED, **WHOLE, "score_chosen": 8.5, "score_rejected": 3.0}]
    scored = load_data(TrainConfig(loss_type=["grpo"]), tokenizer, None, rows=rows)
    pair = load_data(TrainConfig(), tokenizer, None, rows=rows)
    both = [list(map(list, data.train[0].responses)) for data in (scored, pair)]
    assert both[0] == both[1]
    assert len(pair.train[0].comparisons) == 1


def test_a_run_on_several_data_sets(two: tuple[str, str], tiny_model: Path, tmp_path: Path) -> None:
    entries: list[dict[str, object]] = [{"path": two[0]}, {"path": two[1], "weight": 0.5}]
    keys: dict[str, Any] = {"eval_dataset_name": two[0], "do_eval": True, "max_steps": 1}
    out = tmp_path / "out"
    config = TrainConfig(
        model_name_or_path=str(tiny_model), datasets=entries, output_dir=str(out), **keys
    )
    train(config)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert " on `a.jsonl` and `b.jsonl` (11 comparisons), by fastdpo " in card


def test_a_data_set_on_the_hub_keeps_the_run_online(two: tuple[str, str]) -> None:
    local = TrainConfig(model_name_or_path=str(Path(two[0]).parent), datasets=[{"path": two[0]}])
    assert not hub_is_needed(local)
    for path in ("someone/pairs", "hf://datasets/someone/pairs/a.jsonl"):
        assert hub_is_needed(replace(local, datasets=[{"path": two[0]}, {"path": path}]))
    json_files: dict[str, object] = {"path": "json", "data_files": two[0]}
    assert not hub_is_needed(replace(local, datasets=[json_files]))
