"""TRL's trainers and TRL's head function with `patch_trl` and without it, side by side."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import build
from fastdpo_kernels import patch_trl
from fastdpo_kernels.integrations.trl import LinearLogProb
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
THEIRS = utils._ChunkedLogProbFunction
OURS = LinearLogProb(THEIRS)


@pytest.fixture(autouse=True)
def restored():
    yield
    patch_trl(undo=True)
    assert utils._ChunkedLogProbFunction is THEIRS


@pytest.fixture(scope="module")
def rows(pairs_file):
    lines = pairs_file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][:12]


class Recorder(TrainerCallback):
    """The metrics and the gradients of every step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if "loss" in logs:
            self.metrics.append({k: v for k, v in logs.items() if "runtime" not in k})


def recorded(monkeypatch, patched: bool, train) -> Recorder:
    """What `train(callbacks)` does with the patch or without it; the former through our head."""
    calls = []
    apply = LinearLogProb.apply
    monkeypatch.setattr(LinearLogProb, "apply", lambda *a: calls.append(1) or apply(*a))
    patch_trl(undo=not patched)
    recorder = Recorder()
    train([recorder])
    assert bool(calls) == patched
    return recorder


def assert_same_runs(ours: Recorder, theirs: Recorder, steps: int) -> None:
    """fp32 rounding apart: 1e-5 of a gradient's largest entry, and of metrics what it makes."""
    assert len(ours.metrics) == len(theirs.metrics) == steps
    assert len({m["loss"] for m in theirs.metrics}) == steps
    for a, b in zip(ours.metrics, theirs.metrics, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name
    for mine, reference in zip(ours.gradients, theirs.gradients, strict=True):
        assert mine.keys() == reference.keys() and mine
        peak = max(float(g.abs().max()) for g in reference.values())
        assert peak > 1e-3
        for name, gradient in reference.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-5 * peak)


COMMON = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    # Adam would turn the sign of a gradient that is all rounding into a full step.
    "optim": "sgd",
    "max_grad_norm": 1e9,
    "learning_rate": 1e-2,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen2", {}),
    "bias": ("phi", {}),
    "soft cap": ("gemma2", {}),
    "logit scale": ("cohere", {}),
    "frozen head": ("llama", {"lora": True}),
    "Σp² and checkpointing": ("llama", {"use_weighting": True, "gradient_checkpointing": True}),
    "reference in advance": ("llama", {"precompute_ref_log_probs": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_trls_dpo_trainer_is_the_same(case, rows, tokenizer, tmp_path, monkeypatch):
    name, options = CASES[case]
    options = dict(options)
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if options.pop("lora", 0) else None

    def model(seed: int):
        return build(name, torch.float32, seed, vocab_size=len(tokenizer))

    def train(callbacks):
        DPOTrainer(
            model=model(0),
            ref_model=None if peft else model(1),
            args=DPOConfig(output_dir=str(tmp_path), **{**COMMON, **options}),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft,
            callbacks=callbacks,
        ).train()

    theirs = recorded(monkeypatch, False, train)
    ours = recorded(monkeypatch, True, train)
    assert {"entropy", "mean_token_accuracy", "logits/chosen", "logps/rejected"} <= set(
        theirs.metrics[0]
    )
    assert_same_runs(ours, theirs, steps=3)


def test_trls_sft_trainer_is_the_same(rows, tokenizer, tmp_path, monkeypatch):
    def train(callbacks):
        SFTTrainer(
            model=build("llama", torch.float32, vocab_size=len(tokenizer)),
            args=SFTConfig(output_dir=str(tmp_path), **COMMON),
            train_dataset=Dataset.from_list([{"text": r["prompt"] + r["chosen"]} for r in rows]),
            processing_class=tokenizer,
            callbacks=callbacks,
        ).train()

    theirs = recorded(monkeypatch, False, train)
    assert_same_runs(recorded(monkeypatch, True, train), theirs, steps=3)


def head(tokens: int, dtype=torch.float32, vocab: int = 101, width: int = 24, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*s, generator=g) for s in [(tokens, width), (vocab, width), (vocab,)])
    return [x.to(dtype), (0.4 * w).to(dtype), b.to(dtype)], torch.randint(
        vocab, (tokens,), generator=g
    )


def called(function, tensors, targets, loss_of, *options, outputs=OUTPUTS, frozen=False):
    """The five results and the gradients of `loss_of(log_probs, entropy)`."""
    leaves = [t.clone().requires_grad_(not frozen or i == 0) for i, t in enumerate(tensors)]
    x, w, *b = leaves
    results = function.apply(x, w, b[0] if b else None, targets, *options, outputs)
    loss_of(results[0], results[1]).backward()
    return [*results, *(leaf.grad for leaf in leaves)]


def both(log_probs: Tensor, entropy: Tensor) -> Tensor:
    upstream = torch.linspace(-1, 2, log_probs.numel())
    return (log_probs * upstream + entropy * upstream.flip(0)).sum()


LOSSES = {
    "log-probabilities": lambda log_probs, entropy: (log_probs * log_probs.detach()).sum(),
    "entropy": lambda log_probs, entropy: entropy.square().sum(),
    "both": both,
}
OPTIONS = {
    "plain": (1.0, 32, None, 1.0),
    "temperature": (0.7, 32, None, 1.0),
    "soft cap": (1.0, 32, 5.0, 1.0),
    "scale": (1.0, 1 << 20, None, 0.25),
    "everything": (1.3, 32, 4.0, 1.7),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_the_function_is_trls(options, bias, frozen, loss_of):
    tensors, targets = head(57)
    tensors = tensors[: 2 + bias]
    ours = called(OURS, tensors, targets, loss_of, *options, frozen=frozen)
    theirs = called(THEIRS, tensors, targets, loss_of, *options, frozen=frozen)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            scale = max(1.0, float(b.detach().float().abs().max()))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_and_the_kinds_of_results(tokens):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        tensors, targets = head(tokens, dtype)
        ours = called(OURS, tensors, targets, both, 1.0, 32, None, 1.0)
        theirs = called(THEIRS, tensors, targets, both, 1.0, 32, None, 1.0)
        assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in theirs]
        assert [t.requires_grad for t in ours] == [t.requires_grad for t in theirs]


def test_layouts_and_integers_that_trls_function_cannot_take():
    tensors, targets = head(9)
    theirs = called(THEIRS, tensors, targets, both, 1.0, 32, None, 1.0)
    laid = [torch.stack([t, t + 1], -1)[..., 0] for t in tensors]
    assert not any(t.is_contiguous() for t in laid)
    ours = called(OURS, laid, targets.int(), both, 1.0, 32, None, 1.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_unasked_outputs_are_none():
    tensors, targets = head(5)
    for outputs in [(), ("log_probs",), ("log_probs", "entropy"), ("is_top1", "mean_logits")]:
        ours, theirs = (
            f.apply(*tensors, targets, 1.0, 32, None, 1.0, outputs) for f in (OURS, THEIRS)
        )
        assert [a is None for a in ours] == [b is None for b in theirs]


def test_lower_precision_is_as_exact_as_trls():
    """Under autocast and in bf16, measured against fp64 on the same inputs."""
    for dtype, autocast in [(torch.bfloat16, False), (torch.float32, True)]:
        tensors, targets = head(200, dtype, vocab=503)
        rounded = [t.bfloat16().double() for t in tensors]
        exact = called(OURS, rounded, targets, both, 1.0, 32, None, 1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = [
                called(f, tensors, targets, both, 1.0, 32, None, 1.0) for f in (OURS, THEIRS)
            ]
        for ours, theirs, truth in zip(*results, exact, strict=True):
            assert ours.dtype == theirs.dtype
            if truth.dtype != torch.bool:
                mine, other = ((t.double() - truth).norm() for t in (ours, theirs))
                assert mine <= 1.5 * other + 1e-6 * truth.norm()


def test_a_soft_cap_of_zero_caps_at_one_as_in_trl():
    tensors, targets = head(9)
    tensors[0] *= 0.1
    ours, theirs = (called(f, tensors, targets, both, 1.0, 32, 0.0, 1.0)[0] for f in (OURS, THEIRS))
    torch.testing.assert_close(ours, theirs)


def test_the_entropy_is_computed_again_only_for_its_gradient():
    calls = []
    spy = SimpleNamespace(apply=lambda *a: calls.append(1) or THEIRS.apply(*a))
    tensors, targets = head(5)
    called(LinearLogProb(spy), tensors, targets, LOSSES["log-probabilities"], 1.0, 32, None, 1.0)
    assert not calls
    called(LinearLogProb(spy), tensors, targets, LOSSES["entropy"], 1.0, 32, None, 1.0)
    assert calls == [1]


def test_zero3_keeps_trls_function(monkeypatch):
    from transformers.integrations import deepspeed

    calls = []
    spy = SimpleNamespace(apply=lambda *a: calls.append(a) or "theirs")
    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    tensors, targets = head(5)
    arguments = (*tensors, targets, 0.5, 32, 3.0, 1.0, ("entropy",))
    assert LinearLogProb(spy).apply(*arguments) == "theirs"
    assert calls == [arguments]


def test_patching_twice_and_undoing():
    patch_trl()
    first = utils._ChunkedLogProbFunction
    patch_trl()
    assert utils._ChunkedLogProbFunction is first and first.original is THEIRS
    patch_trl(undo=True)
    patch_trl(undo=True)
    assert utils._ChunkedLogProbFunction is THEIRS


def test_other_versions_are_named(monkeypatch):
    import trl

    for version in ("1.14.2", "0.28.0"):
        monkeypatch.setattr(trl, "__version__", version)
        with pytest.raises(ImportError, match=rf"trl >= 1\.15, found {version}; .*LinearDPOLoss"):
            patch_trl()
    monkeypatch.setattr(trl, "__version__", "1.17.0.dev0")
    patch_trl()
    patch_trl(undo=True)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    with pytest.raises(ImportError, match=r"trl 1.17.0.dev0 has no trl.trainer.utils._Chunked"):
        patch_trl()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs trl >= 1\.15, and trl cannot be imported"):
        patch_trl()
    monkeypatch.undo()
