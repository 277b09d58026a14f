"""States on the host: torchao's own optimizer on a device that only claims to be a GPU.

Weights and host copies both lie in this machine's memory, transfers are plain copies and streams
do nothing: what is tested is which gradient is scaled, stepped, freed and saved when.
"""

import types
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from training import assert_resumes, metrics, run, weights

from fastdpo.config import TrainConfig
from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.training import setup, update
from fastdpo.training.optimizer import optimizer_path

cpu_offload = pytest.importorskip("torchao.optim.cpu_offload")

OFFLOAD = {"optimizer_offload": True, "weight_decay": 0.1, "warmup_steps": 2}


class Stream:
    """A stream, and an event of it, on which everything is already done."""

    def record_event(self):
        return self

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class FakeTorch(types.ModuleType):
    """torch with a GPU: nothing is pinned, and `Tensor.record_stream` is not asked for."""

    def __init__(self):
        super().__init__("torch")
        stream = Stream()
        self.cuda = types.SimpleNamespace(
            Stream=Stream, current_stream=lambda: stream, stream=lambda used: nullcontext()
        )

    def empty_like(self, value, pin_memory=False, **keywords):
        return torch.empty_like(value, **keywords)

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def go(tied_model, pairs_file, monkeypatch):
    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(cpu_offload, "torch", FakeTorch())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(setup, "optimizer_path", lambda config, device: "on the host")
    return partial(run, tied_model, pairs_file)


def assert_same(ours, theirs):
    a, b = weights(ours), weights(theirs)
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-7)
    for x, y in zip(metrics(ours), metrics(theirs), strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert x[name] == pytest.approx(y[name], rel=1e-5), name


@pytest.mark.parametrize("limit", [0, 1e-3], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_it_changes_no_number(go, tmp_path, limit, in_backward):
    common = {**OFFLOAD, "max_grad_norm": limit, "max_tokens_per_batch": 1 << 20}
    go(tmp_path / "plain", **{**common, "optimizer_offload": False})
    go(tmp_path / "ours", **common, optimizer_in_backward=in_backward)
    assert metrics(tmp_path / "plain")[-1]["grad_norm"] > 1e-3
    assert_same(tmp_path / "ours", tmp_path / "plain")


def test_accumulated_rows_are_one_step(go, tmp_path):
    common = {**OFFLOAD, "max_tokens_per_batch": 90}
    go(tmp_path / "plain", **{**common, "optimizer_offload": False})
    go(tmp_path / "ours", **common)
    assert_same(tmp_path / "ours", tmp_path / "plain")


def test_gradients_of_large_weights_are_freed_in_the_backward(go, tmp_path, monkeypatch):
    left, norm = [], update.Offloaded.norm

    def watched(self):
        left.append({p.numel() for p in self.parameters if p.grad is not None})
        return norm(self)

    monkeypatch.setattr(update.Offloaded, "norm", watched)
    keys = {**OFFLOAD, "max_tokens_per_batch": 1 << 20, "max_steps": 1}
    go(tmp_path / "kept", **keys)
    go(tmp_path / "freed", **keys, optimizer_in_backward=True)
    kept, freed = left
    assert max(kept) >= 4096 > max(freed)


def test_a_resumed_run_equals_an_uninterrupted_one(go, tmp_path):
    keys = {**OFFLOAD, "max_steps": 5}
    start = assert_resumes(go, tmp_path, 3, **keys)
    keys["optimizer_offload"] = False
    with pytest.raises(FastDPOError, match="another optimizer"):
        go(tmp_path / "other", **keys, resume_from_checkpoint=str(start))


def test_it_needs_a_gpu():
    config = TrainConfig(optimizer_offload=True)
    with pytest.raises(ConfigError, match="optimizer_offload: needs a GPU, the device is cpu"):
        optimizer_path(config, torch.device("cpu"))
