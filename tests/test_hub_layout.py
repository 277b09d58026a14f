"""The head as Hugging Face's `kernels` library loads a universal kernel from a local folder."""

import runpy
import sys
from pathlib import Path

import fastdpo_kernels
import pytest
import torch
from head_problems import make

ROOT = Path(__file__).parents[1] / "kernels"
hub = pytest.importorskip("kernels")
if not hasattr(hub, "get_local_kernel"):  # our own folder of that name, where there is no other
    pytest.skip("Hugging Face's kernels is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    runpy.run_path(str(ROOT / "hub.py"))["lay_out"](folder)
    return hub.get_local_kernel(folder)


def test_the_library_is_not_hidden_by_our_folder_of_the_same_name():
    assert hasattr(hub, "get_kernel") and not (ROOT / "__init__.py").exists()


def test_all_of_the_package_is_there_under_a_name_of_its_own(loaded):
    assert loaded.__all__ == fastdpo_kernels.__all__
    assert loaded.linear_logprob is not fastdpo_kernels.linear_logprob
    own = {name for name in sys.modules if name.startswith(f"{loaded.__name__}.")}
    assert f"{loaded.__name__}.library" in own, "its parts are its own, not those of the package"


def test_both_compute_the_same_beside_each_other(loaded):
    x, w, b, y = make(20, bias=True, dtype=torch.float32)
    results = []
    for package in (fastdpo_kernels, loaded):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        logp = package.linear_logprob(*leaves[:2], y, leaves[2])
        results.append((logp, *torch.autograd.grad(logp.sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    namespace = loaded.__name__
    assert hasattr(getattr(torch.ops, namespace), "linear_logprob")


def test_a_second_layout_replaces_the_first(tmp_path):
    lay_out = runpy.run_path(str(ROOT / "hub.py"))["lay_out"]
    (lay_out(tmp_path) / "stale.py").touch()
    assert not (lay_out(tmp_path) / "stale.py").exists()
