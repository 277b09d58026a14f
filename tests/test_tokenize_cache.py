"""The cache of tokenised rows: what hits it and what must not, in one process and in several."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_samples import (
    CHATML,
    CHATS,
    PAIR,
    TEXT_ROWS,
    THINKING,
    make_tokenizer,
    tokenize_rows,
)
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastdpo.data.load import load_rows
from fastdpo.data.tokenize import TokenizeReport, tokenize_dataset, tokenizer_content
from fastdpo.errors import DataError

pytestmark = pytest.mark.usefixtures("datasets_cache")


class Untouchable(PreTrainedTokenizerFast):
    """A tokenizer that must not be used once its class says so."""

    closed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert not self.closed, "tokenised again instead of reading the cache"
        return super().__call__(*args, **kwargs)


def test_the_second_call_reads_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*TEXT_ROWS, PAIR | {"chosen": 1}]))
    watched = Untouchable(
        tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map
    )

    def run(**options: Any) -> tuple[list[Any], TokenizeReport]:
        arguments: dict[str, Any] = {"max_length": 64, "skip_bad_rows": True, "source": str(path)}
        rows = load_rows(str(path), "train")
        made, report = tokenize_dataset(rows, watched, **arguments | options)
        return made.to_list(), report

    first = run()
    monkeypatch.setattr(Untouchable, "closed", True)
    watched.backend_tokenizer.enable_padding()
    watched.backend_tokenizer.enable_truncation(4)
    assert run() == first
    assert run(num_proc=2, seed=7) == first
    with pytest.raises(DataError, match=r"line 15: chosen: expected text"):
        run(skip_bad_rows=False)
    for change in ({"max_length": 63}, {"max_comparisons_per_group": 1}, {"vocab_size": 1000}):
        with pytest.raises(AssertionError, match="tokenised again"):
            run(**change)
    watched.eos_token = "<|im_end|>"
    with pytest.raises(AssertionError, match="tokenised again"):
        run()


CHILD = """
import sys
import transformers
from fastdpo.data.load import load_rows
from fastdpo.data.tokenize import tokenize_dataset

def refuse(*args, **kwargs):
    raise AssertionError("tokenised again")

transformers.PreTrainedTokenizerBase.__call__ = refuse
rows = load_rows(sys.argv[1], "train")
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[2])
print(tokenize_dataset(rows, tokenizer, max_length=64)[0].to_list())
"""


def test_another_process_reads_the_cache(
    tmp_path: Path, datasets_cache: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in CHATS[:3]))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    expected = tokenize_rows(load_rows(str(path), "train"), tokenizer, 64)
    root = Path(__file__).resolve().parents[1]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(tmp_path / "tokenizer")],
        env=os.environ | {"HF_DATASETS_CACHE": str(datasets_cache), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout == f"{expected}\n"


def test_many_processes_change_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*TEXT_ROWS, PAIR | {"chosen": "b"}, *TEXT_ROWS]
    alone = tokenize_dataset(Dataset.from_list(rows), tokenizer, max_length=64, skip_bad_rows=True)
    spread = tokenize_dataset(
        Dataset.from_list(rows), tokenizer, max_length=64, skip_bad_rows=True, num_proc=2
    )
    assert alone[0].to_list() == spread[0].to_list()
    assert alone[1] == spread[1]
    with pytest.raises(DataError, match="row 15: chosen and rejected: are identical"):
        tokenize_rows(rows, tokenizer, num_proc=2)


def test_a_tokenizers_content_does_not_depend_on_its_use(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    before = tokenizer_content(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    assert tokenizer_content(tokenizer) == before
    assert tokenizer_content(make_tokenizer(CHATML)) == before
    assert tokenizer_content(make_tokenizer(THINKING)) != before
    assert tokenizer_content(make_tokenizer(CHATML, bos=True)) != before
