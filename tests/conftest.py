"""Fixtures that several test files use."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as processes, not as many times as many
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # read when Triton is first imported, by transformers as a rule
    os.environ.setdefault("TRITON_INTERPRET", "1")

import datasets
from data_samples import CHATML, make_tokenizer
from head_problems import ENGINES, Engine
from interpreter import look_once
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from bench.data import dpo_en_demo as fetch_dpo_en_demo
from fastdpo.demo.model import demo_model_path
from fastdpo.tried import installed, release

look_once()

if find_spec("trl") is None:  # which needs Python 3.11
    BESIDE_TRL = re.compile(r"^from (trl|like_trl|beside_trl)\b", re.MULTILINE)
    collect_ignore = [
        file.name
        for file in Path(__file__).parent.glob("test_*.py")
        if BESIDE_TRL.search(file.read_text(encoding="utf-8"))
    ]


def broken_interpreter(triton: str | None, numpy: str) -> str | None:
    """What to type where Triton's interpreter cannot read a number of these releases' numpy."""
    if triton is None or release(triton) >= (3, 7) or release(numpy) < (2, 4):
        return None
    return f"the interpreter of Triton {triton} needs numpy below 2.4: pip install 'numpy<2.4'"


def pytest_configure(config: pytest.Config) -> None:
    """Say so once, in place of hundreds of failures."""
    triton, numpy = installed("triton"), installed("numpy")
    if not torch.cuda.is_available() and (line := broken_interpreter(triton, numpy or "")):
        raise pytest.UsageError(line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="session", params=ENGINES, ids=lambda engine: engine.backend)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Everything that computes the head, in turn."""
    return request.param


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


@pytest.fixture(scope="session")
def llama(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Saves a Llama of two layers with its tokenizer; weights so large that mistakes show."""

    def save(**fields: Any) -> Path:
        path = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        config = LlamaConfig(
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.1,
            eos_token_id=tokenizer.eos_token_id,
            **fields,
        )
        LlamaForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def tiny_model(tokenizer: PreTrainedTokenizerBase, llama: Callable[..., Path]) -> Path:
    """With dropout in its configuration, which is to be off while it is trained."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2}
    return llama(vocab_size=len(tokenizer), **sizes, attention_dropout=0.1)


@pytest.fixture(scope="session")
def still_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without attention dropout, which TRL's `disable_dropout` leaves on."""
    path = tmp_path_factory.mktemp("still") / "model"
    shutil.copytree(tiny_model, path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    return path


@pytest.fixture(scope="session")
def tied_model(tokenizer: PreTrainedTokenizerBase, llama: Callable[..., Path]) -> Path:
    """One whose embedding is its head too, with matrices of 4096 elements and more."""
    vocab_size = -(-len(tokenizer) // 8) * 8
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    return llama(vocab_size=vocab_size, **sizes, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that moves the tiny model, with its tokenizer."""
    torch.manual_seed(1)
    settings = LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short preference pairs over 8 prompts, neighbours sharing one."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "one",
        "small",
        "dog",
        "run",
        "far",
        "over",
        "old",
        "hills",
    ]
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    rows = []
    for number in range(8):
        prompt = f"question {number}: {text(3, 12)} "
        rows += [
            {"prompt": prompt, "chosen": text(2, 9) + " yes", "rejected": text(2, 9) + " no"}
            for _ in range(3)
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
