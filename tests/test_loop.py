"""What keeps the host out of the device's way: rows made ahead, metrics left on the device, and a
trace that shows whether that worked.
"""

import json
import math
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from fastdpo_kernels import LOSSES
from training import metrics, run, weights

from fastdpo.data.ahead import ahead
from fastdpo.data.batch import make_batch
from fastdpo.data.groups import Group
from fastdpo.data.packing import Part
from fastdpo.devices import peak_memory_mib
from fastdpo.errors import FastDPOError
from fastdpo.training.pending import Pending


@pytest.fixture
def go(tiny_model, pairs_file):
    return partial(run, tiny_model, pairs_file)


@pytest.fixture
def deferred(monkeypatch):
    """Runs read metrics as on a GPU: when they are logged, not before."""
    make = Pending.__init__

    def unhurried(self, optimizer, device):
        make(self, optimizer, device)
        assert self.waits and optimizer.defaults["fused"]
        self.waits = False

    monkeypatch.setattr(Pending, "__init__", unhurried)


def running():
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_ahead_keeps_order_and_distance():
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    found = []
    for item in ahead(items(), depth=2):
        found.append(item)
        # Taken, waiting in the queue, and one in the maker's hands.
        assert len(made) <= len(found) + 3
    assert found == list(range(20)) and not running()


def test_an_exception_comes_at_its_place():
    def items():
        yield 1
        raise ValueError("two")

    iterator = ahead(items())
    assert next(iterator) == 1
    with pytest.raises(ValueError, match="two"):
        next(iterator)
    assert not running()


def test_closing_ends_the_thread():
    iterator = ahead(iter(range(1000)))
    next(iterator)
    assert running()
    iterator.close()
    assert not running()


def test_metrics_left_on_the_device_are_the_same(go, tmp_path, request):
    keys = {"max_steps": 5, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    go(tmp_path / "at once", **keys)
    request.getfixturevalue("deferred")
    go(tmp_path / "deferred", **keys)
    rates = {"tokens_per_second", "pairs_per_second", "peak_memory_mib"}
    for ours, theirs in zip(
        metrics(tmp_path / "deferred"), metrics(tmp_path / "at once"), strict=True
    ):
        assert {k: v for k, v in ours.items() if k not in rates} == {
            k: v for k, v in theirs.items() if k not in rates
        }
        assert ours["pairs_per_second"] > 0
    same = weights(tmp_path / "at once")
    assert all(torch.equal(v, same[k]) for k, v in weights(tmp_path / "deferred").items())


def test_no_step_spoils_the_weights_before_it_is_seen(go, tmp_path, monkeypatch, deferred):
    go(tmp_path / "before", max_steps=6, save_strategy="steps", save_steps=2)
    calls, sigmoid = [], LOSSES["sigmoid"]

    def breaks(pairs, *, beta, label_smoothing):
        calls.append(1)
        # The second call is the one that tells what the first loss is expected to be.
        factor = math.nan if len(calls) == 4 else 1.0
        return factor * sigmoid(pairs, beta=beta, label_smoothing=label_smoothing)

    monkeypatch.setitem(LOSSES, "breaks", breaks)
    kept = []
    read = Pending.read

    def watched(self, rates):
        kept[:] = [p for g in self.optimizer.param_groups for p in g["params"]]
        return read(self, rates)

    monkeypatch.setattr(Pending, "read", watched)
    keys = {"max_steps": 6, "logging_steps": 6, "max_tokens_per_batch": 1 << 20}
    with pytest.raises(
        FastDPOError, match="step 3: loss is nan; stopped with the weights of step 2"
    ):
        go(tmp_path / "out", loss_type=["breaks"], **keys)
    assert len(calls) == 7, "later steps ran before the log was due"
    found = sorted(p.double().sum().item() for p in kept)
    right = weights(tmp_path / "before" / "checkpoint-2").values()
    assert found == pytest.approx(sorted(p.double().sum().item() for p in right), rel=1e-6)


def test_a_trace_for_the_browser(go, tmp_path):
    go(tmp_path / "out", max_steps=5, profile_steps=2)
    trace = json.loads((tmp_path / "out" / "trace.json").read_text(encoding="utf-8"))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert sum("ProfilerStep#" in str(name) for name in names) >= 2
    assert any("aten::" in str(name) for name in names)
    go(tmp_path / "plain", max_steps=1)
    assert not (tmp_path / "plain" / "trace.json").exists()


def test_indices_of_the_head_stay_on_the_host():
    tokens = [np.arange(1, n, dtype=np.int64) for n in (4, 3, 5)]
    group = Group(tokens[0], [tokens[1], tokens[2]], [(0, 1, 1.0)])
    batch = make_batch([group], (Part(0, (0, 1), (0,)),), "shared")
    moved = batch.to("meta")
    assert moved.targets.is_meta and moved.host is batch
    assert moved.to("meta").host is batch


def test_peak_memory_is_that_of_this_process_alone():
    """Not of whoever started it."""
    held = np.ones(1 << 30, np.int8)
    code = "import torch; from fastdpo.devices import peak_memory_mib as peak"
    code += "; print(peak(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert peak_memory_mib(torch.device("cpu")) > held.nbytes / 2**20 > float(child.stdout) > 50
