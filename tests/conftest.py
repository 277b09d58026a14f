"""Fixtures that several test files use."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from data_samples import CHATML, make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.data import dpo_en_demo as fetch_dpo_en_demo
from fastdpo.demo.model import demo_model_path


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of the `datasets` library, in place of the user's."""
    path = tmp_path / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    return path


@pytest.fixture(scope="session")
def dpo_en_demo() -> list[dict[str, Any]]:
    """300 pairs of prompt, chosen and rejected messages."""
    return fetch_dpo_en_demo()


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """A real tokenizer with a chat template, of 49152 tokens."""
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of some 400 tokens with a ChatML template."""
    return make_tokenizer(CHATML)
