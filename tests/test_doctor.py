"""The doctor: what it reports, and that nothing missing makes it fail; the choice of precision."""

from importlib import metadata
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo import doctor
from fastdpo.cli import main
from fastdpo.config import TrainConfig
from fastdpo.errors import ConfigError
from fastdpo.model import precision


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A saved llama of two layers."""
    path = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def rows(text: str) -> dict[str, str]:
    found = [line.strip().split(None, 1) for line in text.splitlines() if line.startswith("  ")]
    return dict(found)


def test_doctor_prints_its_report(capsys):
    assert main(["doctor", "--use_cpu"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == [
        "Versions",
        "Machine",
        "Choices",
    ]
    assert f"transformers  {metadata.version('transformers')}" in text
    assert rows(text)["head"].startswith("torch: in pieces of at most 512 MiB")
    assert rows(text)["attention"].startswith("sdpa: segment by segment")
    assert "not known" not in text


def test_doctor_says_what_is_not_installed(monkeypatch):
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    found = rows(doctor.report(TrainConfig(use_cpu=True)))
    assert [found[name] for name in doctor.PACKAGES] == ["not installed"] * len(doctor.PACKAGES)


def test_doctor_with_a_model_tells_its_layout(tiny_model):
    found = rows(doctor.report(TrainConfig(model_name_or_path=tiny_model, use_cpu=True)))
    assert found["model"] == tiny_model
    assert found["size"].startswith("0 M parameters, 0.0 GiB of weights")
    assert found["layout"].startswith("shared: ")


def test_doctor_honours_attn_implementation(tiny_model):
    config = TrainConfig(model_name_or_path=tiny_model, attn_implementation="sdpa", use_cpu=True)
    found = rows(doctor.report(config))
    assert found["layout"].startswith("padded: ")
    assert found["attention"] == "sdpa: attn_implementation asks for it"


def test_doctor_does_not_load_what_does_not_fit(tiny_model, monkeypatch):
    monkeypatch.setattr(doctor, "free_host_memory", lambda: 1)
    found = rows(doctor.report(TrainConfig(model_name_or_path=tiny_model, use_cpu=True)))
    assert found["layout"].startswith("not checked: the check runs the model")


def test_doctor_survives_whatever_fails(tmp_path, monkeypatch):
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no\nsuch thing")

    monkeypatch.setattr(doctor, "free_host_memory", broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(precision, "cpu_bf16_is_faster", broken)
    monkeypatch.setattr("fastdpo.model.backends.choose_backend", broken)
    found = rows(doctor.report(TrainConfig(model_name_or_path=str(tmp_path), use_cpu=True)))
    failed = {name for name, text in found.items() if text == "not known: no such thing"}
    assert failed >= {"device", "memory", "precision", "cpu_bf16", "attention"}
    assert found["layout"].startswith(f"not known: {tmp_path}: no model could be loaded")


# Precision


@pytest.fixture
def speeds(monkeypatch):
    """Replaces the measurement by given seconds for each type."""
    precision.cpu_bf16_is_faster.cache_clear()
    given: dict[torch.dtype, float] = {}
    monkeypatch.setattr(precision, "_seconds", lambda matrix: given[matrix.dtype])
    monkeypatch.setattr(precision, "BUDGET_SECONDS", 0.0)
    yield given
    precision.cpu_bf16_is_faster.cache_clear()


@pytest.mark.parametrize(("half", "faster"), [(1.0, True), (3.0, False), (5.0, False)])
def test_bf16_on_a_cpu_has_to_be_worth_it(half, faster, speeds):
    speeds.update({torch.float32: 3.3, torch.bfloat16: half})
    decided, reason = precision.cpu_bf16_is_faster()
    assert decided is faster
    assert f"at {3.3 / half:.2f} times the speed of fp32" in reason


def test_the_measurement_leaves_the_threads_alone_and_is_made_once():
    precision.cpu_bf16_is_faster.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    first = precision.cpu_bf16_is_faster()
    left = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert left == 2
    assert precision.cpu_bf16_is_faster() is first
    ratio = float(first[1].split(" times")[0].split()[-1])
    assert first[0] is (ratio >= precision.WORTH_IT)


@pytest.mark.parametrize(
    ("asked", "device", "capability", "expected"),
    [
        (True, "cpu", None, torch.bfloat16),
        (False, "cpu", None, None),
        (True, "cuda", (8, 0), torch.bfloat16),
        (False, "cuda", (9, 0), None),
        (None, "cuda", (9, 0), torch.bfloat16),
        (None, "cuda", (7, 5), None),
    ],
)
def test_precision(asked, device, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype, reason = precision.choose_precision(asked, torch.device(device))
    assert dtype is expected
    assert reason


def test_precision_on_a_cpu_is_what_the_measurement_says(speeds):
    speeds.update({torch.float32: 2.0, torch.bfloat16: 1.0})
    assert precision.choose_precision(None, torch.device("cpu"))[0] is torch.bfloat16


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(ConfigError, match="bf16: expected false or unset, since Old GPU has no"):
        precision.choose_precision(True, torch.device("cuda"))
