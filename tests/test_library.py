"""The operators under torch's own machinery: opcheck, compilers, autocast, gradcheck, graphs used
twice.
"""

import gc
import weakref

import pytest
import torch
from fastdpo_kernels import library, linear_dpo_loss, linear_logprob
from fastdpo_kernels.head import OUTPUTS
from fastdpo_kernels.problem import Problem
from fastdpo_kernels.tiles import TorchTiles
from head_problems import make, packed, small_tiles
from torch.testing._internal.optests import aot_autograd_check
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.losses import make_loss

NEEDS = [
    (True, True, True),
    (True, False, False),
    (False, True, False),
    (False, False, True),
    (False, False, False),
]
HEAD = {
    "softcap": None,
    "logit_scale": 1.0,
    "temperature": 1.0,
    "ignore_index": -100,
    "dtype": torch.float32,
    "backend": "torch",
    "workspace_mib": 1,
}
WITHOUT_GRADIENTS = ("test_schema", "test_autograd_registration", "test_faketensor")
CAPPED = {"softcap": 4.0, "logit_scale": 1.3, "temperature": 0.7}


@pytest.fixture(autouse=True)
def several_tiles():
    with small_tiles(7, block_rows=7):
        yield


def leaves(tensors, needs=(True, True, True)):
    return [
        None if t is None else t.clone().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]


def logprob_problem(dtype=torch.float32, tokens=20):
    x, w, b, y = make(tokens, bias=True, dtype=dtype)
    return (x, w, b), y


def dpo_problem(dtype=torch.float32, **kwargs):
    x, w, b, y, ids, pairs, ref = packed(bias=True, dtype=dtype, **kwargs)
    return (x, w, b), (y, ids, pairs, ref.double())


def gradients(loss, tensors, **kwargs):
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return torch.autograd.grad(loss, wanted, **kwargs)


def check_operator(operator, arguments, options, differentiable):
    """`opcheck`, compiled with those results alone that have a gradient."""
    torch.library.opcheck(operator, arguments, options, test_utils=WITHOUT_GRADIENTS)

    def function(*arguments, **options):
        results = operator(*arguments, **options)
        return [r if i in differentiable else r.detach() for i, r in enumerate(results)]

    for dynamic in (False, True):
        aot_autograd_check(function, arguments, options, dynamic, check_gradients="auto")


ASKED = {
    "none": ("", {}),
    "lse": ("lse", CAPPED),
    "some": ("entropy,is_top1", {}),
    "all": (",".join(OUTPUTS), CAPPED),
}


@pytest.mark.parametrize(
    ("needs", "outputs", "head"),
    [
        pytest.param(needs, *ASKED[asked], id=f"{needs}, {asked}")
        for needs in NEEDS
        for asked in (ASKED if needs[0] else ("lse", "some"))
    ],
)
def test_opcheck_of_logprob(needs, outputs, head):
    inputs, y = logprob_problem()
    frozen = needs == (True, False, False)
    options = HEAD | head | {"outputs": outputs, "keep_gradient": frozen}
    differentiable = {0, 1 + OUTPUTS.index("lse")}
    check_operator(library.linear_logprob, (*leaves(inputs, needs), y), options, differentiable)


@pytest.mark.parametrize("upstream", range(3), ids=["logprob", "lse", "both"])
@pytest.mark.parametrize("needs", NEEDS[:-1], ids=str)
def test_opcheck_of_logprob_backward(needs, upstream):
    """Each dtype with each of the upstream gradients and with each of what needs one."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    dtype = dtypes[(upstream + NEEDS.index(needs)) % 3]
    inputs, y = logprob_problem(dtype)
    logprob, lse = linear_logprob(inputs[0], inputs[1], y, inputs[2], outputs=("lse",))
    ones = torch.ones_like(logprob)
    options = HEAD | {"dtype": dtype, "needs": needs}
    given = [(ones, None), (None, ones), (ones, 2 * ones)][upstream]
    arguments = (*given, *inputs, y, logprob, lse)
    torch.library.opcheck(library.linear_logprob_backward, arguments, options)


def test_opcheck_of_a_transposed_weight():
    """Its gradient has its layout, and a compiler knows that."""
    (x, w, b), (y, *rest) = dpo_problem()
    w = w.T.contiguous().T
    logprob, lse = linear_logprob(x, w, y, b, outputs=("lse",))
    options = HEAD | {"needs": NEEDS[0]}
    arguments = (torch.ones_like(logprob), None, x, w, b, y, logprob, lse)
    torch.library.opcheck(library.linear_logprob_backward, arguments, options)
    assert library.linear_logprob_backward(*arguments, **options)[1].stride() == w.stride()
    options |= {"outputs": "", "loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1}
    arguments = (*leaves((x, w, b)), y, *rest, None, None)
    check_operator(library.linear_dpo_loss, arguments, options, {0})
    assert library.linear_dpo_loss(*arguments, **options)[-2].stride() == w.stride()


@pytest.mark.parametrize(
    ("needs", "dtype", "extras"),
    [
        pytest.param(needs, dtype, dtype == torch.bfloat16, id=f"{needs}, {dtype}")
        for place, needs in enumerate(NEEDS)
        for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
        if all(needs) or number != place % 3
    ],
)
def test_opcheck_of_dpo_loss(needs, extras, dtype):
    inputs, rest = dpo_problem(dtype)
    extra = (torch.rand(len(rest[2])), torch.ones(len(rest[3]))) if extras else (None, None)
    options = HEAD | {"dtype": dtype, "outputs": "entropy" if extras else "", "needs": needs}
    options |= {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1}
    arguments = (*leaves(inputs, needs), *rest, *extra)
    check_operator(library.linear_dpo_loss, arguments, options, {0})


def logprob_and_loss(x, w, b, y, ids, pairs, ref):
    """Both public functions, every output of theirs used."""
    tokens = linear_logprob(x, w, y, b, softcap=5.0, outputs=("entropy", "is_top1", "lse"))
    loss, logps, stats = linear_dpo_loss(x, w, y, ids, pairs, ref, b, outputs=("lse",))
    total = (tokens.logprob * tokens.entropy.detach().sin()).sum() + 3 * loss
    return total + (tokens.lse**2).sum(), logps, stats.lse, tokens.is_top1


# "lite" leaves operations other than ours as they are, and needs no C++ compiler for them.
@pytest.mark.parametrize(
    "options", [{"backend": "aot_eager"}, {"mode": "lite"}], ids=["aot_eager", "inductor"]
)
def test_compiled_without_a_graph_break(options):
    inputs, rest = dpo_problem()
    results = []
    for function in (
        logprob_and_loss,
        torch.compile(logprob_and_loss, fullgraph=True, **options),
    ):
        tensors = leaves(inputs)
        loss, *others = function(*tensors, *rest)
        results.append([loss, *others, *gradients(loss, tensors)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_compiled_for_other_lengths_and_for_no_gradient():
    compiled = torch.compile(logprob_and_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed in range(3):
        inputs, rest = dpo_problem(responses=7 + seed, seed=seed)
        tensors = leaves(inputs)
        expected, actual = (f(*tensors, *rest) for f in (logprob_and_loss, compiled))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            gradients(actual[0], tensors), gradients(expected[0], tensors), rtol=1e-5, atol=1e-6
        )
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors, *rest), expected)


def test_a_function_as_loss_goes_past_the_compiler():
    inputs, rest = dpo_problem()

    def margins(pairs):
        return -pairs.margins

    def loss_of(x, w, b, *rest):
        return linear_dpo_loss(x, w, *rest, b, loss_function=margins)[0] * 2

    tensors = leaves(inputs)
    compiled = torch.compile(loss_of, backend="aot_eager")(*tensors, *rest)
    expected = loss_of(*tensors, *rest)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradients(compiled, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_autocast_rounds_its_inputs(backend):
    inputs, rest = dpo_problem()
    tensors = leaves(inputs)
    rounded = [t.bfloat16() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_dpo_loss(*tensors[:2], *rest, tensors[2], backend=backend)
        logprob = linear_logprob(*tensors[:2], rest[0], tensors[2], backend=backend)
    expected = linear_dpo_loss(*rounded[:2], *rest, rounded[2], backend=backend)
    expected_logprob = linear_logprob(*rounded[:2], rest[0], rounded[2], backend=backend)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert torch.equal(logprob, expected_logprob) and logprob.dtype == torch.float32
    for loss, other in ((ours[0], expected[0]), (logprob.sum(), expected_logprob.sum())):
        for gradient, coarse in zip(
            gradients(loss, tensors), gradients(other, tensors), strict=True
        ):
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, coarse, rtol=2**-8, atol=1e-6)
        assert not torch.equal(gradient, coarse), "gradients are not rounded in between"


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wider_weight_is_rounded_to_what_the_states_are(dtype, backend):
    (x, w, b), rest = dpo_problem()
    tensors = leaves((x.to(dtype), w, b))
    loss, logps = linear_dpo_loss(*tensors[:2], *rest, tensors[2], backend=backend)
    rounded = leaves([t.to(dtype) for t in (x, w, b)])
    expected = linear_dpo_loss(*rounded[:2], *rest, rounded[2], backend=backend)
    assert torch.equal(loss, expected[0]) and torch.equal(logps, expected[1])
    assert logps.dtype == torch.float32
    found = gradients(loss, tensors)
    assert [g.dtype for g in found] == [dtype, torch.float32, torch.float32]
    exact = leaves([t.to(dtype).double() for t in (x, w, b)])
    value, _ = linear_dpo_loss(*exact[:2], *rest, exact[2], backend="naive")
    for gradient, other in zip(found, gradients(value, exact), strict=True):
        eps = max(torch.finfo(gradient.dtype).eps, 1e-5)
        assert (gradient - other).norm() <= eps * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("needs", NEEDS[:-1], ids=str)
def test_a_graph_that_is_kept_gives_the_same_gradients_twice(needs, dtype):
    inputs, rest = dpo_problem(dtype)
    tensors = leaves(inputs, needs)
    weights = torch.linspace(-1, 2, len(rest[0]))
    for value in (
        5 * linear_dpo_loss(*tensors[:2], *rest, tensors[2])[0],
        (weights * linear_logprob(*tensors[:2], rest[0], tensors[2])).sum(),
    ):
        first = gradients(value, tensors, retain_graph=True)
        second = gradients(value, tensors, retain_graph=True)
        first[0].add_(1)  # what was handed out is the caller's
        third = gradients(value, tensors)
        for a, b, c in zip(first[1:], second[1:], third[1:], strict=True):
            assert torch.equal(a, b) and torch.equal(b, c)
        assert torch.equal(second[0], third[0])
        with pytest.raises(RuntimeError, match="second time"):
            gradients(value, tensors)


def test_the_scale_of_a_loss_keeps_fp16_from_underflowing():
    inputs, rest = dpo_problem(torch.float16)
    tensors = leaves(inputs)
    tiny = torch.full((len(rest[2]),), 1e-6)
    loss, _ = linear_dpo_loss(*tensors[:2], *rest, tensors[2], comparison_weights=tiny)
    scaled = gradients(loss * 2**16, tensors)
    exact = leaves([t.double() for t in inputs])
    value, _ = linear_dpo_loss(
        *exact[:2], *rest, exact[2], comparison_weights=tiny, backend="naive"
    )
    for gradient, other in zip(scaled, gradients(value * 2**16, exact), strict=True):
        assert (gradient - other).norm() <= torch.finfo(torch.float16).eps * other.norm()


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_gradients_of_some_inputs_only(needs):
    inputs, rest = dpo_problem(torch.float64)
    weights = torch.linspace(-1, 2, len(rest[0]), dtype=torch.float64)
    for name in ("loss", "logprob"):
        results = []
        for backend in ("torch", "naive"):
            x, w, b = tensors = leaves(inputs, needs)
            if name == "loss":
                value = linear_dpo_loss(x, w, *rest, b, backend=backend)[0]
            else:
                value = (linear_logprob(x, w, rest[0], b, backend=backend) * weights).sum()
            assert value.requires_grad == any(needs)
            results.append(gradients(value, tensors) if any(needs) else ())
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


class Allocations(TorchDispatchMode):
    """Counts the tensors of one shape that operators return; not those inside our own."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.names = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        fresh = isinstance(result, torch.Tensor) and not any(
            isinstance(a, torch.Tensor) and a.data_ptr() == result.data_ptr() for a in args
        )
        if fresh and result.shape == self.shape:
            self.names.append(str(func))
        return result


def test_the_backward_of_the_loss_copies_no_gradient():
    inputs, rest = dpo_problem()
    x, w, b = leaves(inputs)
    loss = 2 * linear_dpo_loss(x, w, *rest, b)[0]
    with Allocations(w.shape) as seen:
        loss.backward()
    assert w.grad is not None and not seen.names


def test_the_backward_of_an_unused_logprob_makes_no_zeros():
    inputs, y = logprob_problem()
    x, w, b = leaves(inputs)
    tokens = linear_logprob(x, w, y, b, outputs=("entropy",))
    with Allocations(w.shape) as seen:
        (tokens.logprob.sum() * 0 + x.sum()).backward()
    assert len(seen.names) == 0 or all("empty" not in name for name in seen.names)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_formed(mode, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tile was kept")

    monkeypatch.setattr(TorchTiles, "exponentials", refuse)
    inputs, rest = dpo_problem()
    x, w, b = leaves(inputs)
    with mode():
        loss, logps = linear_dpo_loss(x, w, *rest, b)
        logprob = linear_logprob(x, w, rest[0], b)
    assert not (loss.requires_grad or logps.requires_grad or logprob.requires_grad)
    expected = linear_dpo_loss(x, w, *rest, b, backend="naive")
    torch.testing.assert_close((loss, logps), (expected[0].detach(), expected[1]))


@pytest.mark.parametrize("needs", NEEDS[:-1], ids=str)
def test_second_derivatives_are_refused(needs):
    inputs, rest = dpo_problem()
    tensors = leaves(inputs, needs)
    for value in (
        linear_dpo_loss(*tensors[:2], *rest, tensors[2])[0],
        linear_logprob(*tensors[:2], rest[0], tensors[2]).sum(),
    ):
        first = gradients(value, tensors, create_graph=True)
        with pytest.raises(RuntimeError, match="once, not twice"):
            (value + sum(g.square().sum() for g in first)).backward()


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.7}], ids=str)
@pytest.mark.parametrize("needs", NEEDS[:-1], ids=str)
def test_gradcheck(needs, options):
    (x, w, b), (y, ids, pairs, ref) = dpo_problem(torch.float64, responses=3)
    x, w, b = leaves((x[:, :3], w[:7, :3], b[:7]), needs)
    y = y.remainder(7).where(y >= 0, -100)
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_logprob(x, w, y, b, temperature=0.8, **options), (x, w, b)
    )
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_dpo_loss(x, w, y, ids, pairs % 3, ref, b, **options)[0], (x, w, b)
    )
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_logprob(x, w, y, b, outputs=("lse",), **options), (x, w, b)
    )


def lse_gradients(tensors, y, c, d, **options):
    x, w, b = tensors
    found = linear_logprob(x, w, y, b, outputs=("lse",), **options)
    return gradients((c * found.logprob + d * found.lse).sum(), tensors)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", NEEDS[:-1], ids=str)
def test_the_gradient_of_lse(needs, dtype, columns):
    """Any coefficients, those included whose sum is 0, where softmax − onehot has none."""
    inputs, y = logprob_problem(dtype)
    if columns:
        inputs = (inputs[0], inputs[1].T.contiguous().T, inputs[2])
    c = torch.linspace(-1, 2, len(y), dtype=torch.float64)
    d = torch.linspace(2, -1, len(y), dtype=torch.float64)
    d[::3] = c[::3]
    c[1], d[4], d[7] = 0, 0, -1e-30
    exact = leaves([t.double() for t in inputs], needs)
    tensors = leaves(inputs, needs)
    for head in ({}, CAPPED):
        expected = lse_gradients(exact, y, c, d, backend="naive", **head)
        found = lse_gradients(tensors, y, c, d, **head)
        eps = torch.finfo(dtype).eps
        for gradient, other in zip(found, expected, strict=True):
            assert (gradient - other).norm() <= 4 * eps * other.norm()
    if columns and needs[1]:
        assert found[int(needs[0])].stride() == inputs[1].stride()


@pytest.mark.parametrize("needs", NEEDS[:-1], ids=str)
def test_lse_alone_or_next_to_nothing_beside_a_large_sum(needs):
    """The row of a target gets p and not p − 1 + 1, which fp16 would round off."""
    x, w, b, y = make(20, vocab=4001, bias=True, ignore=0.0, dtype=torch.float16)
    exact = leaves([t.double() for t in (x, w / 9, b)], needs)
    tensors = leaves((x, w / 9, b), needs)
    for c, d in ((0.0, 1e-5), (-1e-5, 1e-5)):
        expected = lse_gradients(exact, y, c * 2**20, d * 2**20, backend="naive")
        found = lse_gradients(tensors, y, c * 2**20, d * 2**20)
        for gradient, other in zip(found, expected, strict=True):
            assert (gradient - other).norm() <= 2e-3 * other.norm()


def test_a_frozen_head_that_no_one_asks_for_lse_is_projected_once(monkeypatch):
    inputs, y = logprob_problem()
    tensors = leaves(inputs, (True, False, False))
    found = linear_logprob(*tensors[:2], y, tensors[2], outputs=("lse",))
    expected = linear_logprob(*tensors[:2], y, tensors[2]).sum()

    def refuse(*_):
        raise AssertionError("projected again")

    monkeypatch.setattr(TorchTiles, "probabilities", refuse)
    assert torch.equal(*(gradients(v, tensors)[0] for v in (found.logprob.sum(), expected)))


REFUSED = [name for name in OUTPUTS if name not in ("lse", "is_top1")]


@pytest.mark.parametrize("needs", NEEDS[:-1], ids=str)
def test_a_gradient_of_what_has_none_is_an_error(needs):
    inputs, rest = dpo_problem()
    tensors = leaves(inputs, needs)
    found = linear_logprob(*tensors[:2], rest[0], tensors[2], outputs=OUTPUTS)
    loss, logps, stats = linear_dpo_loss(*tensors[:2], *rest, tensors[2], outputs=OUTPUTS)
    refused = {f"token {name}": getattr(found, name) for name in REFUSED}
    refused |= {name: getattr(stats, name) for name in (*REFUSED, "lse")}
    refused["response_logps"] = logps
    for name, value in refused.items():
        for total in (value.sum(), value.sum() + found.logprob.sum() + loss):
            with pytest.raises(RuntimeError, match=f"^{name.split()[-1]} has no gradient: use "):
                gradients(total, tensors, retain_graph=True)
    assert not (found.is_top1.requires_grad or stats.is_top1.requires_grad)
    gradients(loss + found.logprob.sum(), tensors)


def test_a_compiled_gradient_of_what_has_none_is_nan():
    inputs, rest = dpo_problem()
    tensors = leaves(inputs)
    compiled = torch.compile(logprob_and_loss, fullgraph=True, backend="aot_eager")
    total, logps, lse, _ = compiled(*tensors, *rest)
    found = gradients(total + logps[0] * lse[0], tensors)
    assert all(gradient.isnan().all() for gradient in found)


def test_hooks_on_saved_tensors_are_honoured():
    """What offloads activations: every saved tensor goes through the hooks, and comes back."""
    inputs, rest = dpo_problem()
    results = []
    for copy in (lambda t: t, lambda t: t.clone()):
        tensors = leaves(inputs)
        with torch.autograd.graph.saved_tensors_hooks(copy, copy):
            loss = 2 * linear_dpo_loss(*tensors[:2], *rest, tensors[2])[0]
        results.append([loss, *gradients(loss, tensors)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_checkpointed_head():
    inputs, rest = dpo_problem()
    x, w, b = tensors = leaves(inputs)
    expected = linear_dpo_loss(x, w, *rest, b)[0]
    loss = torch.utils.checkpoint.checkpoint(
        lambda x: linear_dpo_loss(x, w, *rest, b)[0], x, use_reentrant=False
    )
    torch.testing.assert_close(
        gradients(loss, tensors), gradients(expected, tensors), rtol=0, atol=0
    )


def test_a_registered_loss_is_known_by_its_name(monkeypatch):
    """What a mix of one loss is for the trainer; engines look for names."""
    inputs, rest = dpo_problem()
    seen = []
    original = Problem.loss_and_coefficients

    def spy(problem, *arguments):
        seen.append(problem.loss)
        return original(problem, *arguments)

    monkeypatch.setattr(Problem, "loss_and_coefficients", spy)
    expected = linear_dpo_loss(*inputs[:2], *rest, loss_type="ipo", beta=0.3, label_smoothing=0.2)
    loss = make_loss(["ipo"], beta=0.3, label_smoothing=0.2).loss
    torch.testing.assert_close(linear_dpo_loss(*inputs[:2], *rest, loss_function=loss), expected)
    half = make_loss(["ipo"], beta=0.3, loss_weights=[0.5]).loss
    torch.testing.assert_close(
        linear_dpo_loss(*inputs[:2], *rest, loss_function=half)[0], expected[0] / 2
    )
    assert [(s.name, s.beta, s.label_smoothing) for s in seen[:2]] == [("ipo", 0.3, 0.2)] * 2
    assert seen[2].name is None


def test_a_function_as_loss_is_forgotten_after_an_error():
    inputs, rest = dpo_problem()

    def fails(pairs):
        raise ZeroDivisionError

    try:
        linear_dpo_loss(*inputs[:2], *rest, loss_function=fails)
    except ZeroDivisionError:
        pass
    else:
        pytest.fail("the loss is not called")
    function = weakref.ref(fails)
    del fails
    gc.collect()
    assert function() is None


def test_nothing_is_kept_after_the_backward():
    inputs, rest = dpo_problem()
    tensors = leaves(inputs)
    linear_dpo_loss(*tensors[:2], *rest, tensors[2])[0].backward()
    for t in tensors:
        t.grad = None
    gc.collect()
    shape = inputs[1].shape
    held = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == shape]
    assert len(held) <= 3, "the weight, its leaf and nothing else"
