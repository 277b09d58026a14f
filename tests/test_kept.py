"""The tile that `linear_logprob` keeps from its forward for any gradient of a trained head."""

import gc
import weakref

import pytest
import torch
from fastdpo_kernels import kept, linear_dpo_loss, linear_logprob
from fastdpo_kernels.tiles import TorchTiles, release_workspace
from head_problems import HEADS, NAIVE, Engine, assert_same, evaluate_logprob, make, packed
from head_problems import small_tiles as tiles_of
from torch.utils.checkpoint import checkpoint

TORCH = Engine("torch", torch.float64)


@pytest.fixture(autouse=True)
def nothing_kept():
    kept._on_device.clear()


@pytest.fixture
def projections(monkeypatch):
    """The names of the methods of tiles that project, as they are called."""
    seen = []
    for name in ("score", "exponentials", "probabilities"):
        original = getattr(TorchTiles, name)

        def counted(self, *arguments, name=name, original=original):
            seen.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(TorchTiles, name, counted)
    return seen


class Graph:
    """A forward with its coefficients, and gradients of its leaves as often as they are asked."""

    def __init__(self, tokens=11, seed=0, ignore=0.2):
        x, w, _, y = make(tokens, seed=seed, ignore=ignore)
        self.leaves = [x.requires_grad_(), w.requires_grad_()]
        self.logp = linear_logprob(x, w, y)
        self.loss = (self.logp * torch.linspace(-1, 2, tokens)).sum()

    def gradients(self, **options):
        return torch.autograd.grad(self.loss, self.leaves, **options)


def tile_of(graph):
    """The tile that a graph holds, None without one."""
    held = held_by(graph)
    return None if held is None else held.tile


def held_by(graph):
    node = graph.logp.grad_fn
    while not hasattr(node, "kept"):
        ((node, _), *_) = node.next_functions
    return node.kept


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("train", [(True, True), (False, True)], ids=str)
def test_gradients_are_those_of_the_specification(projections, options, train):
    case = packed(bias=options.get("bias", False))
    options = {name: value for name, value in options.items() if name != "bias"}
    found = evaluate_logprob(case, TORCH, train, outputs=("entropy", "is_top1"), **options)
    assert projections == ["exponentials"]
    exact = evaluate_logprob(case, NAIVE, train, outputs=("entropy", "is_top1"), **options)
    assert_same(found, exact, TORCH.tolerance)


def test_what_does_not_fit_one_tile_is_projected_again(projections):
    with tiles_of(10):
        Graph(11, ignore=0).gradients()
    assert projections == ["score", "probabilities", "probabilities"]
    projections.clear()
    with tiles_of(11):
        Graph(11, ignore=0).gradients()
    assert projections == ["exponentials"]


def test_without_a_gradient_of_the_head_nothing_is_kept(projections):
    x, w, _, y = make(11)
    linear_logprob(x, w, y)
    linear_logprob(x.requires_grad_(), w, y)
    with torch.no_grad():
        linear_logprob(x, w.requires_grad_(), y)
    assert projections == ["score", "exponentials", "score"] and not kept._on_device


def test_a_graph_that_is_kept_gives_the_same_gradients_twice(projections):
    graph = Graph()
    one, two = graph.gradients(retain_graph=True), graph.gradients(retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert projections == ["exponentials"] and tile_of(graph) is not None
    graph.gradients()
    assert tile_of(graph) is None


@pytest.mark.parametrize("later", ["a score", "a gradient", "a loss", "another size", "a release"])
def test_a_later_call_takes_the_workspace_and_no_gradient_is_wrong(projections, later):
    """Its tile lies where the kept one lay: the backward projects again."""
    exact = Graph().gradients()
    graph, (x, w, _, y) = Graph(), make(7 if later != "another size" else 40, seed=3)
    if later == "a release":
        release_workspace()
    elif later == "a loss":
        case = packed()
        w = case.weight.clone().requires_grad_()
        linear_dpo_loss(case.hidden, w, *case[3:])
    else:
        linear_logprob(x, w.requires_grad_(later == "a gradient"), y)
    assert tile_of(graph) is None
    projections.clear()
    found = graph.gradients()
    assert projections == ["probabilities"]
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_of_two_graphs_one_has_a_tile(projections):
    """The first one's backward needs the workspace, and takes it from the second."""
    first, second = Graph(seed=1), Graph(seed=2)
    assert tile_of(first) is None and tile_of(second) is not None
    exact = Graph(seed=1).gradients(), Graph(seed=2).gradients()
    first, second = Graph(seed=1), Graph(seed=2)
    projections.clear()
    found = first.gradients(), second.gradients()
    assert projections == ["probabilities", "probabilities"]
    for a, b in zip(sum(found, ()), sum(exact, ()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_tile_is_freed_with_the_graph():
    graph = Graph()
    held = weakref.ref(held_by(graph))
    assert held() is not None
    del graph
    gc.collect()
    assert held() is None
    graph = Graph()
    held = weakref.ref(held_by(graph))
    graph.gradients()
    assert held() is None


def test_a_gradient_of_lse_makes_a_tile_of_its_own(projections):
    """It is written into the tile, which a second backward would find changed."""
    case = packed()
    leaves = [t.clone().requires_grad_() for t in case[:2]]
    out = linear_logprob(*leaves, case.targets, outputs=("lse",))
    plain = torch.autograd.grad(out.logprob.sum(), leaves, retain_graph=True)
    torch.autograd.grad((out.logprob + out.lse.square()).sum(), leaves, retain_graph=True)
    assert projections == ["exponentials", "probabilities"]
    again = torch.autograd.grad(out.logprob.sum(), leaves)
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_autograd_saves_may_be_watched(projections):
    """Moved to the host or recomputed: a tile is kept in no graph that others look after."""
    with torch.autograd.graph.save_on_cpu():
        graph = Graph()
    assert tile_of(graph) is None
    exact = graph.gradients()
    x, w, _, y = make(11)
    x.requires_grad_(), w.requires_grad_()
    logp = checkpoint(lambda: linear_logprob(x, w, y), use_reentrant=False)
    found = torch.autograd.grad((logp * torch.linspace(-1, 2, 11)).sum(), (x, w))
    assert "exponentials" not in projections
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_a_compiled_call_keeps_nothing(projections):
    x, w, _, y = make(11)
    x.requires_grad_(), w.requires_grad_()
    compiled = torch.compile(lambda: linear_logprob(x, w, y).sum(), backend="aot_eager")
    torch.autograd.grad(compiled(), (x, w))
    assert projections == ["score", "probabilities"] and kept.taken() is None


def test_a_call_takes_no_more_memory_than_without(monkeypatch):
    """What is allocated from forward to backward, beside the tile that a CPU keeps anyway."""
    from counted import peak_bytes

    def bytes_of(keeping):
        monkeypatch.setattr(kept, "wanted", lambda: keeping)
        return peak_bytes(lambda: Graph(300).gradients())

    bytes_of(True)
    assert bytes_of(True) <= bytes_of(False)


def test_an_error_in_a_call_leaves_nothing_wanted():
    x, w, _, y = make(11)
    with pytest.raises(ValueError, match="targets"):
        linear_logprob(x, w.requires_grad_(), y + 1000)
    assert not kept.wanted() and kept.taken() is None


def test_the_fused_kernels_keep_a_tile_too(monkeypatch):
    pytest.importorskip("triton")
    from fastdpo_kernels.triton.tiles import TritonTiles

    seen = []
    for name in ("score", "probabilities"):
        monkeypatch.setattr(TritonTiles, name, lambda *_, name=name: seen.append(name))
    case = packed()
    engine = Engine("triton", torch.float32)
    found = evaluate_logprob(case, engine, outputs=("entropy",))
    exact = evaluate_logprob(case, NAIVE, outputs=("entropy",))
    assert not seen
    assert_same(found, exact, 2e-2)
    monkeypatch.undo()
    for dtype in (torch.float16, torch.bfloat16):  # a tile of fp16 is two projections anyway
        kept._on_device.clear()
        x, w = (t.to(dtype).requires_grad_() for t in case[:2])
        logp = linear_logprob(x, w, case.targets, backend="triton")
        assert bool(kept._on_device) == (dtype == torch.bfloat16) and logp.requires_grad
