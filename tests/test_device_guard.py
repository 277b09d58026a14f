"""Triton starts a kernel on the current device: every start is under the guard of its tensors."""

from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from fastdpo_kernels import linear_dpo_loss, linear_logprob
from head_problems import make, packed

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction

MODULES = ["anchor", "coefficients", "exponential", "finish", "score"]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts interpreted kernels")


@pytest.fixture
def starts(monkeypatch):
    """(kernel, device guarded) of every start."""
    current, found = [None], []

    @contextmanager
    def device_of(tensor):
        before, current[0] = current[0], tensor.device
        yield
        current[0] = before

    original = InterpretedFunction.__getitem__

    def start(self, grid):
        found.append((self.fn.__name__, current[0]))
        return original(self, grid)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(InterpretedFunction, "__getitem__", start)
    return found


def kernels() -> set[str]:
    modules = [import_module(f"fastdpo_kernels.triton.{name}") for name in MODULES]
    return {
        value.fn.__name__
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, InterpretedFunction) and name.endswith("_kernel")
    }


def leaves(trained, *tensors):
    pairs = zip(tensors, trained, strict=True)
    return [t.detach().float().requires_grad_(need) for t, need in pairs]


def run_everything():
    x, w, _, y = make(30, dtype=torch.float32)
    for trained in ((True, True), (True, False), (False, True), (False, False)):
        a, b = leaves(trained, x, w)
        logp = linear_logprob(a, b, y, backend="triton")
        if any(trained):
            logp.sum().backward()
    x, w, _, y, ids, pairs, ref = packed(4)
    for trained in ((True, True), (True, False)):
        a, b = leaves(trained, x, w)
        result = linear_dpo_loss(a, b, y, ids, pairs, ref, backend="triton")
        result[0].backward()


def test_every_kernel_is_started_on_its_tensors_device(starts):
    run_everything()
    assert {kernel for kernel, _ in starts} >= kernels()
    assert {kernel for kernel, device in starts if device is None} == set()
