"""What a tile promises to the regimes, what a regime costs in tiles, and products of any dtype."""

from unittest import mock

import pytest
import torch
from fastdpo_kernels import arguments, naive, products, regimes
from fastdpo_kernels.backends import choose_backend, make_tiles
from fastdpo_kernels.gradients import Dtypes, Gradients, Needs
from fastdpo_kernels.head import OUTPUTS, Head
from fastdpo_kernels.losses import Loss
from fastdpo_kernels.problem import Problem
from fastdpo_kernels.tiles import TorchTiles
from head_problems import HEADS, make, packed, poison

ALL = Needs(True, True, True)


def exact_tile(head, x, y):
    """∂logp_t/∂(x_t·Wᵀ + b)_v in fp64 by autograd, 0 where ignored."""
    pre = torch.zeros(len(x), head.weight.shape[0], dtype=torch.float64, requires_grad=True)
    eye = torch.eye(head.weight.shape[0], dtype=torch.float64)
    shifted = naive.logits_of(
        pre + x @ head.weight.T,
        eye,
        head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        temperature=head.temperature,
    )
    naive.token_stats(shifted, y, -1)["logprob"].sum().backward()
    return pre.grad


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("ignored", ["some", "none", "all"])
def test_tiles_keep_their_promise(engine, options, ignored):
    options = dict(options)
    x, w, b, y = make(9, bias=options.pop("bias", False), ignore=0.4, dtype=torch.float32)
    y = {"some": y, "none": y.clamp(min=0), "all": y.fill_(-1) if ignored == "all" else y}[ignored]
    y = y.clamp(min=-1)
    x, w, b = (None if t is None else t.double() for t in (x, w, b))
    exact = exact_tile(Head(w, b, **options), x, y)
    logits = naive.logits_of(x, w, b, **options)
    stats = naive.token_stats(logits, y, -1)

    def placed(tensor):
        return None if tensor is None else tensor.to(engine.device, engine.exact)

    tiles = poison(make_tiles(engine.backend, Head(placed(w), placed(b), **options), 1))
    x, y = placed(x), y.to(engine.device)
    tolerance = {"rtol": engine.tolerance, "atol": engine.tolerance}
    scored = tiles.score(x, y, OUTPUTS)
    tile, row_scale, kept = tiles.exponentials(x, y, OUTPUTS)
    first = -tiles.head.gradient_scale * row_scale[:, None] * tile
    assert tile.isfinite().all() and not row_scale[y < 0].any()
    torch.testing.assert_close(first.double().cpu(), exact, **tolerance)
    tile, row_scale = tiles.probabilities(x, y, tiles.score(x, y, ()))
    second = -tiles.head.gradient_scale * row_scale[:, None] * tile
    assert tile.isfinite().all() and not row_scale[y < 0].any()
    torch.testing.assert_close(second.double().cpu(), exact, **tolerance)
    for found in (scored, kept):
        assert found.keys() == {"logprob", *OUTPUTS}
        for name, value in found.items():
            torch.testing.assert_close(value.double().cpu(), stats[name].double(), **tolerance)


def test_a_target_outside_the_vocabulary_gives_nan():
    x, w, _, _ = make(3, dtype=torch.float32)
    y, tiles = torch.tensor([3, 101, -1]), TorchTiles(Head(w), 1)
    stats = tiles.score(x, y, ())
    _, row_scale, kept = tiles.exponentials(x, y, ())
    _, again = tiles.probabilities(x, y, stats)
    for values in (stats["logprob"], kept["logprob"], row_scale, again):
        assert values.isnan().tolist() == [0, 1, 0] and values[2] == 0


def test_indices_that_nobody_may_look_at():
    """Negative ones, which would count from the end, become the first that does not exist."""
    values = torch.tensor([0, -1, 5, -100], dtype=torch.int32)
    on_the_gpu = mock.patch.object(arguments, "on_the_host", lambda _: False)
    with on_the_gpu:
        assert arguments.indices("ids", values, 5, "").tolist() == [0, 5, 5, 5]
        assert arguments.scored_targets(values, 5, -100).tolist() == [0, 5, 5, -1]


class Counted(TorchTiles):
    """Counts the tokens that every method is asked for."""

    def __init__(self, head, rows):
        super().__init__(head, 1)
        self.rows, self.seen = rows, {"score": 0, "exponentials": 0, "probabilities": 0}

    def score(self, hidden, *rest):
        self.seen["score"] += len(hidden)
        return super().score(hidden, *rest)

    def exponentials(self, hidden, *rest):
        assert len(hidden) <= self.rows
        self.seen["exponentials"] += len(hidden)
        return super().exponentials(hidden, *rest)

    def probabilities(self, hidden, *rest):
        assert len(hidden) <= self.rows
        self.seen["probabilities"] += len(hidden)
        return super().probabilities(hidden, *rest)


def passes(rows, needs, responses=9, longest=8):
    """Share of the tokens that each method projects in `preference_loss`."""
    case = packed(responses, longest=longest)
    x, w, _, y, ids, pairs, ref = case
    pairs = torch.tensor([[a, a + 1] for a in range(0, responses - 1, 2)])
    weights = torch.ones(len(pairs), dtype=torch.float64)
    loss = Loss.named("sigmoid", beta=0.1, label_smoothing=0.0)
    problem = Problem.build(y.clamp(min=-1), ids, pairs, ref, weights, None, loss)
    tiles = Counted(Head(w), rows)
    dtypes = Dtypes(x.dtype, w.dtype, w.dtype)
    regimes.preference_loss(tiles, x, problem, (), needs, dtypes)
    return {name: count / len(x) for name, count in tiles.seen.items()}


@pytest.mark.parametrize("needs", [(1, 1, 0), (1, 0, 0), (0, 1, 0)], ids=str)
def test_a_loss_that_fits_one_tile_is_projected_once_and_needs_no_plan(needs, monkeypatch):
    def refuse(*_):
        raise AssertionError("a plan was made")

    monkeypatch.setattr(regimes, "whole_units", refuse)
    assert passes(10_000, Needs(*map(bool, needs))) == {
        "score": 0,
        "exponentials": 1,
        "probabilities": 0,
    }


def test_whole_units_are_projected_once():
    assert passes(16, ALL._replace(bias=False))["exponentials"] == 1


def test_of_a_long_comparison_all_but_the_last_tile_is_projected_twice():
    """The last tile is a full one, whatever is left over."""
    for rows in (16, 15, 9):
        share = passes(rows, ALL._replace(bias=False), responses=2, longest=60)
        assert share["exponentials"] == rows / 45
        assert share["score"] == share["probabilities"] == pytest.approx(1 - rows / 45)


def test_a_frozen_head_is_projected_once_whatever_the_length():
    share = passes(5, Needs(True, False, False), responses=2, longest=60)
    assert share == {"score": 0, "exponentials": 1, "probabilities": 0}


def test_without_gradients_nothing_is_planned_or_kept():
    share = passes(5, Needs(False, False, False), responses=2, longest=60)
    assert share == {"score": 1, "exponentials": 0, "probabilities": 0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_of_low_precision_keep_small_coefficients(dtype):
    """Coefficients far below fp16's smallest number, and growing from tile to tile."""
    g = torch.Generator().manual_seed(0)
    x, w, e = (torch.randn(n, m, generator=g) for n, m in ((12, 8), (50, 8), (12, 50)))
    x, w, e = x.to(dtype), w.to(dtype), e.to(dtype)
    coefficients = torch.logspace(-14, -9, 12)
    tiles = TorchTiles(Head(w.float(), torch.zeros(50)), 1)
    grads = Gradients(tiles, x, ALL, Dtypes(*(torch.float32,) * 3))
    for start in range(0, 12, 4):
        rows = slice(start, start + 4)
        grads.add(rows, e[rows], coefficients[rows])
    scaled = -coefficients.double()[:, None] * e.double()
    exact = scaled @ w.double(), scaled.T @ x.double(), scaled.sum(0)
    for found, expected in zip(grads.result(), exact, strict=True):
        assert (found - expected).norm() <= torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("weight", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_come_in_the_dtypes_that_are_asked_for(weight, count):
    x, w, b, _ = make(6, bias=True, dtype=torch.float32)
    grads = Gradients(TorchTiles(Head(w, b), 1), x, ALL, Dtypes(torch.bfloat16, weight, weight))
    tile, scale = torch.randn(6, len(w)), torch.rand(6)
    for start in range(0, 6, 6 // count):
        rows = slice(start, start + 6 // count)
        grads.add(rows, tile[rows], scale[rows])
    scaled = -scale[:, None] * tile
    for found, exact in zip(grads.result(), (scaled @ w, scaled.T @ x, scaled.sum(0)), strict=True):
        assert found.dtype == (torch.bfloat16 if exact.shape == x.shape else weight)
        eps = max(torch.finfo(found.dtype).eps, 1e-6)
        assert (found - exact).norm() <= eps * exact.norm()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("result", DTYPES)
def test_products_are_rounded_once(stored, result):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(7, 300, generator=g).to(stored)
    b = torch.randn(300, 5, generator=g).to(stored)
    exact = a.double() @ b.double()
    total = torch.promote_types(stored, torch.float32)
    product = products.mm(a, b, result, operands=stored)
    accumulated = products.addmm_(torch.ones(7, 5, dtype=total), a, b, operands=stored)
    assert product.dtype == result and accumulated.dtype == total
    summed = torch.finfo(total).eps * (a.double().abs() @ b.double().abs())
    for found, expected in ((product, exact), (accumulated, exact + 1)):
        rounded = torch.finfo(found.dtype).eps / 2 * expected.abs()
        assert ((found - expected).abs() <= 1.01 * rounded + 2 * summed).all()


def test_the_hosts_matrix_units_are_used_where_they_are_faster(monkeypatch):
    """Same products of bf16 values; the setting is put back, also after an error."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    a, b = (torch.randn(64, 64).bfloat16().float() for _ in range(2))
    exact = a.double() @ b.double()
    seen = []
    mm = torch.mm

    def spy(*args, **kwargs):
        seen.append(backend.fp32_precision)
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", spy)
    for faster in (True, False):
        monkeypatch.setattr(products, "bf16_is_faster", lambda faster=faster: faster)
        for operands in (torch.bfloat16, torch.float32):
            product = products.mm(a, b, torch.float32, operands=operands)
            assert (product - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert seen == ["bf16", before, before, before]
    with pytest.raises(RuntimeError):
        products.mm(a, b[:3], torch.float32, operands=torch.bfloat16)
    assert backend.fp32_precision == before


def test_the_probe_leaves_the_setting_alone():
    before = torch.backends.mkldnn.matmul.fp32_precision
    products.bf16_is_faster.cache_clear()
    assert isinstance(products.bf16_is_faster(), bool)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_which_backend_auto_is():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu) == "torch"
    assert choose_backend("triton", cpu) == "triton"
    assert choose_backend("torch", cuda) == "torch"
    assert choose_backend("auto", cuda, torch.float64) == "torch"
    assert choose_backend("auto", cuda, torch.bfloat16, width=8) == "torch"


def test_the_target_logit_is_exact_but_for_its_last_rounding():
    """Its error is the log-probability's own; those of the other entries average out.

    Far below the only other logit, which is 0, a log-probability is the target's logit.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8192, generator=generator)
    w = torch.randn(2, 8192, generator=generator)
    w[1] = 0
    x = x[(x @ w[0]) < -30]
    found = make_tiles("torch", Head(w), 512).score(x, x.new_zeros(len(x)).long(), ())["logprob"]
    exact = (x.double() @ w[0].double()).float()
    assert len(x) > 60 and torch.equal(found, exact) and not torch.equal(x @ w[0], exact)
