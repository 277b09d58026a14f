"""What lies in examples runs, on tiny models and without a hub."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from training import metrics
from transformers import AutoModelForCausalLM

from fastdpo.cli import main

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No example fills the user's cache or the repository."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_configuration(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    flags = {"model_name_or_path": tiny_model, "output_dir": tmp_path / "out", "max_steps": 2}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    assert main(["train", "examples/dpo.yaml", *words]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert metrics(tmp_path / "out")[-1]["step"] == 2


def test_the_script(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(EXAMPLES / "train.py"))
    script["main"](str(tiny_model), str(tmp_path / "out"), rows=8)
    printed = capsys.readouterr().out
    assert "step 2: reward accuracy" in printed and "held-out reward accuracy" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 32


def test_the_head_in_a_loop() -> None:
    example = runpy.run_path(str(EXAMPLES / "head.py"))
    losses = example["main"](steps=12)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.3
    model, batch = example["make_model"](), example["encode"](example["PAIRS"])
    ids, mask, labels = batch
    with torch.no_grad():
        dense = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        expected = dense.gather(-1, ids[:, 1:, None])[..., 0] * (labels[:, 1:] != -100)
        found = example["response_logps"](model, batch)
    torch.testing.assert_close(found, expected.sum(1), rtol=1e-5, atol=1e-4)
