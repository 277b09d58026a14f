"""Cross entropy from hidden states under the calls of CCE, Liger and PyTorch, in the cases of their
own suites, against full logits in fp64.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from fastdpo_kernels import (
    LinearCrossEntropyLoss,
    linear_cross_entropy,
    torch_linear_cross_entropy,
)
from fastdpo_kernels.tiles import TorchTiles
from head_problems import small_tiles

ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


@pytest.fixture(autouse=True)
def several_tiles():
    with small_tiles(7, block_rows=3):
        yield


def problem(dtype=torch.float32, ignored=False, bias=True, shape=(4, 9), vocab=61, width=24):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, width, generator=g)
    w = torch.randn(vocab, width, generator=g) / 3
    w[:20] = x.reshape(-1, width)[:20] / 3  # some targets are all but sure
    y = torch.randint(vocab, shape, generator=g)
    if ignored:
        y[torch.rand(shape, generator=g) < 0.3] = -100
    b = torch.randn(vocab, generator=g) if bias else None
    tensors = [None if t is None else t.to(dtype).requires_grad_() for t in (x, w, b)]
    return tensors, y


def exact(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def logits_of(tensors, softcap=None):
    x, w, b = tensors
    logits = x @ w.T if b is None else x @ w.T + b
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def full(logits, y, reduction="mean", z=0.0, ignore_index=-100, **options):
    """Cross entropy of full logits, each token's z-loss with it, and lse."""
    flat, targets = logits.flatten(0, -2), y.flatten()
    loss = F.cross_entropy(flat, targets, reduction=reduction, ignore_index=ignore_index, **options)
    counted = targets != ignore_index
    lse = flat.logsumexp(-1).where(counted, 0)
    extra = z * lse.square()
    if reduction == "none":
        return (loss + extra).view(y.shape), lse.view(y.shape)
    count = counted.sum() if reduction == "mean" else 1
    return loss + extra.sum() / count, lse.view(y.shape)


def check(ours, theirs, tensors, wide, dtype):
    """Values and gradients for uneven upstream gradients."""
    tolerance = ROUNDING[dtype]
    close = 1e-12 if dtype == torch.float64 else 3e-6  # logits are fp32 whatever the states are
    torch.testing.assert_close(ours.double(), theirs, rtol=close, atol=close)
    upstream = torch.linspace(0.5, 2, ours.numel(), dtype=torch.float64).view(ours.shape)
    leaves = [(t, d) for t, d in zip(tensors, wide, strict=True) if t is not None]
    found = torch.autograd.grad((ours * upstream).sum(), [t for t, _ in leaves])
    expected = torch.autograd.grad((theirs * upstream).sum(), [d for _, d in leaves])
    for (leaf, _), a, e in zip(leaves, found, expected, strict=True):
        assert a.dtype == leaf.dtype
        assert (a - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shift", [False, True, 3])
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "some ignored"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("z_loss", [False, True], ids=["", "z-loss"])
def test_the_cases_of_cce(dtype, softcap, bias, shift, ignored, reduction, z_loss):
    tensors, y = problem(dtype, ignored, bias)
    wide, s = exact(tensors), int(shift)
    options = {"softcap": softcap, "shift": shift, "reduction": reduction}
    ours = linear_cross_entropy(tensors[0], tensors[1], y, tensors[2], return_lse=z_loss, **options)
    later = y[..., s:]
    theirs, exact_lse = full(logits_of(wide, softcap)[:, : y.shape[1] - s], later, reduction)
    if z_loss:
        ours, lse = ours
        assert lse.shape == exact_lse.shape == later.shape
        ours = ours + (lse.square().sum() / (later != -100).sum())
        theirs = theirs + exact_lse.square().sum() / (later != -100).sum()
    check(ours, theirs, tensors, wide, dtype)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 1)], ids=str)
def test_gradients_of_some_inputs_only(needs):
    tensors, y = problem(bias=True)
    for place, tensor in enumerate(tensors):
        tensor.requires_grad_(place in needs)
    linear_cross_entropy(tensors[0], tensors[1], y, tensors[2]).backward()
    assert [t.grad is not None for t in tensors] == [place in needs for place in range(3)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_is_summed_projects_once(reduction, monkeypatch):
    """6TVH: three products a tile, whatever the tile's length."""
    (x, w, b), y = problem(ignored=True)

    def refuse(*_):
        raise AssertionError("projected again")

    monkeypatch.setattr(TorchTiles, "probabilities", refuse)
    linear_cross_entropy(x, w, y, b, reduction=reduction, class_weights=torch.rand(61)).backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_that_counts(reduction):
    """As PyTorch's: a mean over nothing is NaN, and its gradient 0."""
    (x, w, b), y = problem()
    loss = linear_cross_entropy(x, w, torch.full_like(y, -100), b, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    for gradient in torch.autograd.grad(loss.sum(), (x, w, b)):
        assert not gradient.any()


@pytest.mark.parametrize("backend", ["torch", "triton", "naive"])
def test_every_engine(backend):
    tensors, y = problem(ignored=True)
    wide = exact(tensors)
    options = {"lse_square_scale": 1e-2, "label_smoothing": 0.1, "backend": backend}
    for own in ({}, options):
        x, w, b = tensors
        ours = linear_cross_entropy(x, w, y, b, **{"backend": backend} | own)
        z, smoothing = own.get("lse_square_scale", 0.0), own.get("label_smoothing", 0.0)
        theirs, _ = full(logits_of(wide), y, z=z, label_smoothing=smoothing)
        check(ours, theirs, tensors, wide, torch.float32)


def test_another_scale_of_the_logits():
    tensors, y = problem()
    wide = exact(tensors)
    for smoothing in (0.0, 0.3):
        options = {"logit_scale": 0.25, "label_smoothing": smoothing}
        ours = linear_cross_entropy(*tensors[:2], y, tensors[2], **options)
        theirs, _ = full(0.25 * logits_of(wide), y, label_smoothing=smoothing)
        check(ours, theirs, tensors, wide, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", [False, True], ids=["", "class weights"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("ignore_index", [-100, 42])
def test_the_cases_of_liger(dtype, reduction, classes, smoothing, z, ignore_index):
    tensors, y = problem(dtype, shape=(30,))
    y[3:9] = ignore_index
    wide = exact(tensors)
    weights = torch.rand(61) if classes else None
    loss = LinearCrossEntropyLoss(
        weights, ignore_index, z, smoothing, reduction, None, True, torch.float32,
        return_token_accuracy=True,
    )  # fmt: skip
    found = loss(tensors[1], tensors[0], y, tensors[2])
    logits = logits_of(wide)
    options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": smoothing}
    options |= {"weight": None if weights is None else weights.double()}
    theirs, lse = full(logits, y, z=z, **options)
    z_loss = z * lse.square()
    if reduction != "none":
        z_loss = z_loss.sum() / ((y != ignore_index).sum() if reduction == "mean" else 1)
    torch.testing.assert_close(found.z_loss.double(), z_loss, rtol=1e-5, atol=1e-5)
    right = (logits.argmax(-1) == y) & (y != ignore_index)
    torch.testing.assert_close(
        found.token_accuracy.double(), right.sum() / (y != ignore_index).sum().double()
    )
    assert found.predicted_tokens is None
    check(found.loss, theirs, tensors, wide, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_scaling(reduction):
    """Liger's: each token's loss times its probability, which has no gradient."""
    tensors, y = problem(shape=(30,))
    wide = exact(tensors)
    loss = LinearCrossEntropyLoss(reduction=reduction, use_token_scaling=True)
    ours = loss(tensors[1], tensors[0], y, tensors[2])
    each = F.cross_entropy(logits_of(wide), y, reduction="none")
    each = each * (-each).exp().detach()
    theirs = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    check(ours, theirs, tensors, wide, torch.float32)


def test_what_is_returned_is_what_is_asked_for():
    (x, w, b), y = problem(shape=(30,))
    assert isinstance(LinearCrossEntropyLoss()(w, x, y, b), torch.Tensor)
    for z in (False, True):
        for accuracy in (False, True):
            loss = LinearCrossEntropyLoss(return_z_loss=z, return_token_accuracy=accuracy)
            found = loss(w, x, y, b)
            if z or accuracy:
                assert (found.z_loss is None, found.token_accuracy is None) == (not z, not accuracy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("classes", [False, True], ids=["", "class weights"])
@pytest.mark.parametrize("single", [False, True], ids=["batch", "one"])
def test_the_call_of_pytorch(dtype, reduction, smoothing, classes, single):
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is None:
        pytest.skip("this torch has no linear_cross_entropy")
    (x, w, b), y = problem(dtype, shape=(20,), ignored=not single)
    x, y = (x[0], y[0]) if single else (x, y)
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    wide = exact(leaves)
    weight = torch.rand(61).to(dtype) if classes else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours = torch_linear_cross_entropy(
        *leaves[:2], y, linear_bias=leaves[2], weight=weight, **options
    )
    assert ours.dtype == theirs(*leaves[:2], y, linear_bias=leaves[2], **options).dtype
    weight = None if weight is None else weight.double()
    expected = theirs(*wide[:2], y, linear_bias=wide[2], weight=weight, **options)
    assert ours.shape == expected.shape
    tolerance = 1e-5 if dtype != torch.bfloat16 else 2**-8
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(ours.sum(), leaves)
    for a, e in zip(found, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert (a - e).norm() <= ROUNDING[dtype] * e.norm()


def test_it_takes_the_place_of_pytorchs_in_its_module(monkeypatch):
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    (x, *_), y = problem(shape=(20,))
    module = torch.nn.LinearCrossEntropyLoss(24, 61, bias=True)
    expected = module(x, y)
    monkeypatch.setattr(F, "linear_cross_entropy", torch_linear_cross_entropy)
    torch.testing.assert_close(module(x, y), expected)


def test_compiled_and_in_fp16_whose_gradient_would_underflow():
    tensors, y = problem(torch.float16)
    wide = exact(tensors)
    scale = 2.0**16

    def loss(x, w, b):
        return linear_cross_entropy(x, w, y, b) * 1e-6

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        theirs, _ = full(logits_of(wide), y)
        check(function(*tensors) * scale, theirs * 1e-6 * scale, tensors, wide, torch.float16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "max"}, "reduction: expected one of mean, sum, none, got 'max'"),
        ({"shift": 9}, "shift: expected 0 to 8, got 9"),
        ({"shift": -1}, "shift: expected 0 to 8, got -1"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected 0 to 1, got 1.5"),
        ({"label_smoothing": 0.1, "softcap": 3.0}, "label_smoothing: the mean of capped logits"),
        ({"class_weights": torch.ones(3)}, r"class_weights: expected \(61,\), got \(3,\)"),
        ({"softcap": 0.0}, "softcap"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(options, words):
    (x, w, b), y = problem()
    with pytest.raises(ValueError, match=f"^{words}"):
        linear_cross_entropy(x, w, y, b, **options)


def test_what_the_other_calls_refuse():
    (x, w, _), _ = problem(shape=(20,))
    with pytest.raises(ValueError, match="return_predicted_tokens: "):
        LinearCrossEntropyLoss(return_predicted_tokens=True)
    with pytest.raises(ValueError, match="target: expected classes"):
        torch_linear_cross_entropy(x, w, torch.rand(20, 61))
    with pytest.raises(ValueError, match="linear_weight: expected"):
        torch_linear_cross_entropy(x, w.view(61, 4, 6), torch.zeros(20, 4).long())
    assert math.isnan(torch_linear_cross_entropy(x, w, torch.full((20,), -100)).item())
