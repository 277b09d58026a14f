"""Every engine of the head against the specification in fp64: every option, odd sizes, chunks,
repeats, ignored tokens, extreme logits.
"""

import itertools
import math

import pytest
import torch
from fastdpo_kernels import (
    LOSSES,
    library,
    linear_dpo_loss,
    linear_logprob,
    register_loss,
)
from fastdpo_kernels.backends import backend_name, choose_backend
from fastdpo_kernels.cuts import whole_units
from fastdpo_kernels.head import OUTPUTS
from fastdpo_kernels.losses import Loss
from fastdpo_kernels.problem import Problem
from head_problems import (
    HEADS,
    NAIVE,
    Case,
    assert_same,
    evaluate_logprob,
    evaluate_loss,
    make,
    packed,
    small_tiles,
)
from hypothesis import given, settings
from hypothesis import strategies as st

TRAIN = [(True, True), (True, False), (False, True)]


@pytest.fixture(autouse=True)
def poisoned_workspace():
    """Small tiles, so that everything is cut, and NaN in every tile before it is written."""
    with small_tiles(7):
        yield


def unpacked(tokens, **kwargs):
    """Tokens that belong to one response."""
    x, w, b, y = make(tokens, **kwargs)
    ids = torch.zeros(tokens, dtype=torch.int64)
    return Case(x, w, b, y, ids, torch.tensor([[0, 1]]), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("tokens", [1, 6, 63])
@pytest.mark.parametrize("train", [*TRAIN, (False, False)], ids=str)
def test_logprob_matches_the_naive_one(engine, options, tokens, train):
    options = dict(options)
    case = unpacked(tokens, bias=options.pop("bias", False), dtype=torch.float32)
    exact = evaluate_logprob(case, NAIVE, train, **options)
    assert_same(evaluate_logprob(case, engine, train, **options), exact, engine.tolerance)


OF_PAIRS = [n for n, loss in LOSSES.items() if loss.unit == "comparison" and not loss.prompt]


@pytest.mark.parametrize("loss_type", sorted(OF_PAIRS))
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_dpo_loss_and_gradients_match_the_naive_one(engine, loss_type, options):
    options = {k: v for k, v in options.items() if k != "temperature"}
    case = packed(bias=options.pop("bias", False), dtype=torch.float32)
    weights = torch.linspace(0.1, 1, len(case.comparisons), dtype=torch.float64)
    options |= {"loss_type": loss_type, "label_smoothing": 0.1, "comparison_weights": weights}
    exact = evaluate_loss(case, NAIVE, **options)
    options["comparison_weights"] = weights.to(engine.device)
    assert_same(evaluate_loss(case, engine, **options), exact, engine.tolerance)


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
@pytest.mark.parametrize("train", [*TRAIN, (False, False)], ids=str)
def test_comparisons_of_any_length_in_tiles_of_any_size(engine, train, rows):
    case = packed(bias=True, dtype=torch.float32, longest=30)
    exact = evaluate_loss(case, NAIVE, train, softcap=4.0)
    with small_tiles(rows):
        assert_same(evaluate_loss(case, engine, train, softcap=4.0), exact, engine.tolerance)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000), st.integers(1, 60))
def test_chunking_never_changes_the_result(engine, responses, seed, rows):
    case = packed(responses + 2, seed, dtype=torch.float32)
    order = torch.randperm(len(case.response_ids), generator=torch.Generator().manual_seed(seed))
    exact = evaluate_loss(case, NAIVE)
    tokens = [*OUTPUTS, "gradient of hidden"]
    with small_tiles(rows):
        assert_same(evaluate_loss(case, engine), exact, engine.tolerance)
        shuffled = case._replace(
            hidden=case.hidden[order],
            targets=case.targets[order],
            response_ids=case.response_ids[order],
        )
        expected = exact | {name: exact[name][order] for name in tokens}
        assert_same(evaluate_loss(shuffled, engine), expected, engine.tolerance)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(-3, 100))
def test_ignoring_a_token_is_leaving_it_out(engine, ignored, ignore_index):
    case = unpacked(len(ignored), dtype=torch.float32, ignore=0.0)
    left = torch.tensor([not flag for flag in ignored]) & (case.targets != ignore_index)
    case = case._replace(targets=case.targets.where(left, ignore_index))
    full = evaluate_logprob(case, engine, ignore_index=ignore_index)
    for name, value in full.items():
        if not name.startswith("gradient of weight"):
            assert not value[~left].any(), name
    x, w = (t.to(engine.device, engine.exact).requires_grad_() for t in case[:2])
    short = linear_logprob(
        x[left.to(x.device)], w, case.targets[left].to(x.device), backend=engine.backend
    )
    coefficients = torch.linspace(-1, 2, len(ignored))[left].to(short)
    (short * coefficients).sum().backward()
    tolerance = {"rtol": engine.tolerance, "atol": engine.tolerance}
    torch.testing.assert_close(full["logprob"][left], short.detach().double().cpu(), **tolerance)
    torch.testing.assert_close(full["gradient of hidden"], x.grad.double().cpu(), **tolerance)
    torch.testing.assert_close(full["gradient of weight"], w.grad.double().cpu(), **tolerance)


def test_pieces_hold_whole_units_and_cover_all_once():
    case = packed(25, 3)
    y, ids, pairs, ref = case[3:]
    problem = Problem(y, ids, pairs, ref, ref, ref, Loss(lambda pairs: pairs.margins))
    pieces = list(whole_units(problem, 20))
    assert len(pieces) > 3
    assert [p.start for p, _ in pieces[1:]] == [p.stop for p, _ in pieces[:-1]]
    assert (pieces[0][0].start, pieces[-1][0].stop) == (0, len(y))
    every = torch.arange(len(pairs))
    assert sorted(itertools.chain(*(every[c].tolist() for _, c in pieces))) == every.tolist()
    for piece, selected in pieces:
        inside = set(ids[piece].tolist())
        outside = set(ids.tolist()) - inside
        assert not inside & set(ids[: piece.start].tolist())
        assert not outside & set(pairs[selected].flatten().tolist())


def rounded_logprob(case, dtype):
    """The same in plain PyTorch in `dtype`, logits rounded to it: what the error is measured by."""
    x, w = (t.to(dtype).requires_grad_() for t in case[:2])
    valid = case.targets != -100
    logps = (x @ w.T).log_softmax(-1).gather(1, case.targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    logps = logps.where(valid, 0)
    (logps * torch.linspace(-1, 2, len(x)).to(dtype)).sum().backward()
    return {
        "logprob": logps.detach().double(),
        "gradient of hidden": x.grad.double(),
        "gradient of weight": w.grad.double(),
    }


@pytest.mark.parametrize("offset", [0.0, 16.0], ids=["centred", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 63, 300])
@pytest.mark.parametrize("train", TRAIN[:2], ids=str)
def test_errors_are_bounded_by_those_of_the_same_dtype(engine, train, tokens, dtype, offset):
    case = unpacked(tokens, hidden=64, vocab=509, dtype=torch.bfloat16, seed=2)
    case.hidden[:, 0], case.weight[:, 0] = 4.0, offset / 4
    exact = evaluate_logprob(case, NAIVE, train, outputs=())
    rounded = rounded_logprob(case, dtype)
    ours = evaluate_logprob(case, engine, train, dtype=dtype, outputs=())
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        error, bound = ((t - exact[name]).norm() for t in (value, rounded[name]))
        eps = torch.finfo(torch.float32).eps * (1 + exact[name].norm())
        assert error <= 2 * bound + 4 * eps, name
    if dtype != torch.float32:  # logits are not rounded to it
        assert (ours["logprob"] - exact["logprob"]).abs().max() < 1e-5


def peaked(logits, dtype=torch.float32):
    """A head whose row t has the logits (logits[t], −logits[t], 0, 0, ...)."""
    x = torch.zeros(len(logits), 16, dtype=dtype)
    x[:, 0] = torch.tensor(logits)
    w = torch.zeros(101, 16, dtype=dtype)
    w[3, 0], w[4, 0] = 1.0, -1.0
    return x, w


def test_extreme_logits_stay_finite_and_exact(engine):
    x, w = peaked([1e4, 40.0, 9.0, -1e4])
    y = torch.tensor([3, 4, 3, 3])
    exact = linear_logprob(x.double(), w.double(), y, backend="naive")
    leaf = x.to(engine.device).requires_grad_()
    ours = linear_logprob(leaf, w.to(engine.device), y.to(engine.device), backend=engine.backend)
    torch.testing.assert_close(ours.double().cpu(), exact, rtol=1e-6, atol=1e-6)
    ours.sum().backward()
    assert leaf.grad.isfinite().all()
    assert exact[1] < -79


def test_a_log_probability_near_zero_keeps_its_digits(engine):
    """−log p is a sum of small terms as p → 1: 1 − p must not come out of a subtraction."""
    x, w = peaked([12.0, 16.0, 20.0, 30.0])
    y = torch.full((4,), 3)
    wide = [t.double().requires_grad_() for t in (x, w)]
    z = wide[0] @ wide[1].T
    rest = (z - z[:, 3:4]).index_fill(1, torch.tensor([3]), -torch.inf)
    exact = -rest.logsumexp(1).exp().log1p()
    exact.sum().backward()
    ours = [t.to(engine.device).requires_grad_() for t in (x, w)]
    logprob = linear_logprob(*ours, y.to(engine.device), backend=engine.backend)
    logprob.sum().backward()
    torch.testing.assert_close(logprob.double().cpu(), exact, rtol=1e-5, atol=0)
    for leaf, other in zip(ours, wide, strict=True):
        torch.testing.assert_close(leaf.grad.double().cpu(), other.grad, rtol=1e-5, atol=1e-30)


def test_first_loss_is_log_two(engine):
    x, w, _, y, ids, pairs, _ = (
        None if t is None else t.to(engine.device) for t in packed(dtype=torch.float32)
    )
    zeros = torch.zeros(7, device=x.device)
    _, logps = linear_dpo_loss(x, w, y, ids, pairs, zeros, backend=engine.backend)
    loss, _ = linear_dpo_loss(x, w, y, ids, pairs, logps, backend=engine.backend)
    assert abs(loss.item() - math.log(2)) < 1e-6


@pytest.mark.parametrize("train", TRAIN, ids=str)
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_score(engine, tokens, train):
    case = unpacked(tokens, ignore=1.1, dtype=torch.float32)
    assert (case.targets == -100).all()
    for evaluate in (evaluate_logprob, evaluate_loss):
        results = evaluate(case, engine, train)
        loss = results.pop("loss", None)
        assert loss is None or abs(loss.item() - math.log(2)) < 1e-7
        ways = 2 if evaluate is evaluate_logprob else 1  # without and with lse
        assert sum("gradient" in name for name in results) == ways * sum(train)
        assert not any(value.any() for value in results.values())


def test_a_loss_is_added_by_writing_a_function():
    try:
        register_loss("squared")(lambda pairs, *, beta, label_smoothing: (pairs.margins - 1) ** 2)
        x, w, _, y, ids, pairs, ref = packed()
        expected = linear_dpo_loss(x, w, y, ids, pairs, ref, loss_type="squared")
        direct = linear_dpo_loss(
            x, w, y, ids, pairs, ref, loss_function=lambda pairs: (pairs.margins - 1) ** 2
        )
        assert torch.equal(expected[0], direct[0])
        with pytest.raises(ValueError, match="registered already"):
            register_loss("squared")(lambda pairs: pairs.margins)
    finally:
        LOSSES.pop("squared", None)


BACKENDS = ["torch", "triton", "naive"]
INTEGERS = {"dtype": torch.int32}


def refused(function, arguments: dict, message: str) -> None:
    """Every backend raises the same `ValueError`."""
    for backend in [arguments.pop("backend")] if "backend" in arguments else BACKENDS:
        with pytest.raises(ValueError, match=message):
            function(**arguments, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(4, **INTEGERS)}, r"targets: expected shape \(5,\), got \(4,\)"),
        ({"targets": torch.full((5,), 101)}, "targets: 101 is outside the vocabulary of 101"),
        ({"targets": torch.full((5,), -1, **INTEGERS)}, "targets: -1 is outside the vocabulary"),
        ({"targets": torch.zeros(5)}, "targets: expected integers, got torch.float32"),
        ({"targets": torch.zeros(5, dtype=torch.bool)}, "targets: expected integers"),
        ({"targets": torch.zeros(5, device="meta", **INTEGERS)}, "targets: expected on cpu as hid"),
        ({"hidden": torch.zeros(5, 24, **INTEGERS)}, "hidden: expected .* got torch.int32"),
        ({"hidden": torch.zeros(())}, r"expected \(..., H\) and \(V, H\) .* got \(\) and"),
        ({"hidden": torch.zeros(5, 0), "weight": torch.zeros(9, 0)}, "H and V above 0, got .5, 0."),
        ({"weight": torch.zeros(0, 24)}, r"H and V above 0, got \(5, 24\) and \(0, 24\)"),
        ({"weight": torch.zeros(9, 3)}, r"weight: expected \(V, 24\), got \(9, 3\) for hidden"),
        ({"weight": torch.zeros(9, 24, 1)}, r"weight: expected \(V, 24\), got \(9, 24, 1\)"),
        ({"weight": torch.zeros(9, 24, dtype=torch.int8)}, "weight: expected .* got torch.int8"),
        ({"weight": torch.zeros(9, 24).to_sparse()}, "weight: expected a dense .*sparse_coo"),
        ({"weight": torch.zeros(9, 24, device="meta")}, "weight: expected on cpu .* got meta"),
        ({"bias": torch.zeros(3)}, r"bias: expected shape \(101,\), got \(3,\)"),
        ({"bias": torch.zeros(101, 1)}, r"bias: expected shape \(101,\), got \(101, 1\)"),
        ({"bias": torch.zeros(101, dtype=torch.complex64)}, "bias: expected .* torch.complex64"),
        ({"softcap": 0.0}, "softcap: expected a number above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature: expected a number above 0, got nan"),
        ({"outputs": ("entropie",)}, "unknown outputs"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(change, message):
    x, w, _, y = make(5, dtype=torch.float32, ignore=0)
    refused(linear_logprob, {"hidden": x, "weight": w, "targets": y, **change}, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(1, 5, 24), "targets": torch.zeros(1, 5, **INTEGERS)},
            "hidden: exp",
        ),
        ({"response_ids": torch.zeros(4, **INTEGERS)}, r"response_ids: expected shape \(5,\)"),
        ({"response_ids": torch.full((5,), 2)}, "response_ids: 2 is outside the 2 responses"),
        ({"response_ids": torch.full((5,), -1, **INTEGERS)}, "response_ids: -1 is outside the 2"),
        ({"response_ids": torch.zeros(5)}, "response_ids: expected integers, got torch.float32"),
        (
            {"comparisons": torch.zeros(2, **INTEGERS)},
            r"comparisons: expected \(C, 2\), got \(2,\)",
        ),
        ({"comparisons": torch.zeros(2, 3, **INTEGERS)}, r"comparisons: expected \(C, 2\)"),
        ({"comparisons": torch.tensor([[0, -1]])}, "comparisons: -1 is outside the 2 responses"),
        ({"comparisons": torch.tensor([[2, 1]])}, "comparisons: 2 is outside the 2 responses"),
        ({"comparisons": torch.zeros(1, 2)}, "comparisons: expected integers"),
        ({"ref_logps": torch.zeros(2, 1)}, r"ref_logps: expected \(R,\), got \(2, 1\)"),
        ({"ref_logps": torch.zeros(0)}, "is outside the 0 responses of ref_logps"),
        ({"comparison_weights": torch.ones(())}, r"comparison_weights: expected shape \(1,\)"),
        ({"comparison_weights": torch.ones(2)}, r"comparison_weights: expected shape \(1,\)"),
        ({"response_lengths": torch.ones(1)}, r"response_lengths: expected shape \(2,\)"),
        (
            {"loss_function": lambda pairs: pairs.margins.mean()},
            r"loss_function: .* returns \(1,\).* got \(\)",
        ),
        (
            {"loss_function": lambda pairs: pairs.margins[:, None]},
            r"loss_function: .* got \(1, 1\)",
        ),
        ({"loss_type": abs}, "loss_type: expected the name of a loss, .*; .* loss_function"),
        ({"softcap": -1.0}, "softcap: expected a number above 0, got -1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_of_the_loss_are_named(change, message):
    x, w, _, y = make(5, dtype=torch.float32, ignore=0)
    arguments = {
        "hidden": x,
        "weight": w,
        "targets": y,
        "response_ids": torch.tensor([0, 0, 0, 1, 1]),
        "comparisons": torch.tensor([[0, 1]]),
        "ref_logps": torch.zeros(2),
    }
    refused(linear_dpo_loss, arguments | change, message)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_a_byte_are_not_ignored_because_they_look_like_it(backend):
    x, w, _, y = make(3, vocab=200, dtype=torch.float32, ignore=0)
    y[1] = 156  # as many bits as -100
    found, expected = (linear_logprob(x, w, t, backend=backend) for t in (y.byte(), y))
    assert torch.equal(found, expected) and found[1] < 0


def test_operators_refuse_what_the_functions_refuse():
    x, w, _, y = make(6, dtype=torch.float32, ignore=0)
    options = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0, "ignore_index": -100}
    options |= {"dtype": torch.float32, "backend": "torch", "workspace_mib": 1, "outputs": ""}
    for wrong, message in [
        ((x.view(2, 3, 24), w, None, y.view(2, 3)), r"hidden: expected \(T, H\), got \(2, 3, 24\)"),
        ((x, w, w[:, 0][:50], y), r"bias: expected shape \(101,\)"),
        ((x, w, None, y + 101), "outside the vocabulary"),
    ]:
        with pytest.raises(ValueError, match=message):
            library.linear_logprob(*wrong, **options, keep_gradient=False)
    pairs = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "needs": [False] * 3}
    with pytest.raises(ValueError, match=r"ref_logps: expected \(R,\)"):
        library.linear_dpo_loss(
            x,
            w,
            None,
            y,
            y * 0,
            torch.zeros(1, 2).long(),
            torch.zeros(1, 1),
            None,
            None,
            **options,
            **pairs,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_alone_are_enough_on_the_meta_device(backend):
    x, w, b, y, ids, pairs, ref = (t.to("meta") for t in packed(bias=True, dtype=torch.float32))
    assert linear_logprob(x, w, y, b, backend=backend).shape == y.shape
    loss, logps = linear_dpo_loss(x, w, y, ids, pairs, ref, b, backend=backend)
    assert loss.is_meta and (loss.shape, logps.shape) == ((), (7,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_spoils_its_token_and_the_weight_alone(backend, value):
    x, w, _, y = make(5, dtype=torch.float32, ignore=0)
    x[3, 2] = value
    bad = torch.arange(5) == 3
    for trained in (False, True):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_(trained)
        logprob = linear_logprob(*leaves, y, backend=backend)
        logprob.sum().backward()
        assert torch.equal(logprob.isnan(), bad)
        assert torch.equal(leaves[0].grad.isnan().any(1), bad)
        assert leaves[1].grad is None or leaves[1].grad.isnan().all()
    ids, pairs = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([[0, 1]])
    loss, logps = linear_dpo_loss(*leaves, y, ids, pairs, torch.zeros(3), backend=backend)
    assert loss.isnan() and logps.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_takes_entries_out_of_the_vocabulary(backend):
    x, w, b, y = make(9, dtype=torch.float32, bias=True, ignore=0)
    y %= 50
    b[50:] = -math.inf
    names = ("entropy", "log_sum_sq_prob", "lse")
    found, expected = (
        linear_logprob(*tensors, outputs=names, backend=kind)._asdict()
        for kind, tensors in (
            (backend, (x, w, y, b)),
            ("naive", (x.double(), w[:50].double(), y, b[:50].double())),
        )
    )
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    linear_logprob(x, w, y, b, backend=backend).sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)
    assert not w.grad[50:].any() and not b.grad[50:].any()


def test_unknown_loss_is_named():
    x, w, _, y, ids, pairs, ref = packed()
    with pytest.raises(ValueError, match=r"'sigmoidal'; known: .*hinge.*sigmoid"):
        linear_dpo_loss(x, w, y, ids, pairs, ref, loss_type="sigmoidal")


def test_reference_is_another_spelling_of_naive():
    x, w, _, y = make(5, dtype=torch.float32)
    assert backend_name("reference") == choose_backend("reference", x.device) == "naive"
    found, expected = (linear_logprob(x, w, y, backend=name) for name in ("reference", "naive"))
    assert torch.equal(found, expected)
