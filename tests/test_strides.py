"""Arguments of any layout, dtype and shape, to every public function and operator on every backend,
beside plain PyTorch in fp64.

What a layout leaves out in memory is NaN, or an index of nothing, so that a number that is read
from the wrong place shows. An entry of a gradient may be off by some roundings of the dtype that
the head computes in, of the sum of the absolute values of what it is a sum of.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from fastdpo_kernels import LinearDPOLoss, call, library, linear_dpo_loss, linear_logprob, naive
from fastdpo_kernels.head import OUTPUTS
from fastdpo_kernels.integrations.trl import LinearLogProb
from head_problems import make, small_tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

ENGINES = ["torch", "triton"]
VOCAB = 37
NOTHING = 99  # an index of no token, response or vocabulary entry here
IGNORED = -100
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # the first is tried first
INDICES = [torch.int64, torch.int32, torch.int16, torch.int8]


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else NOTHING, dtype=dtype)


def pitched(t: Tensor) -> Tensor:
    """Rows longer than they are read."""
    wide = empty((*t.shape[:-1], t.shape[-1] + 3), t.dtype)
    return wide[..., : t.shape[-1]].copy_(t)


def stepped(t: Tensor) -> Tensor:
    """Every other number."""
    return empty((*t.shape[:-1], 2 * t.shape[-1]), t.dtype)[..., ::2].copy_(t)


def shifted(t: Tensor) -> Tensor:
    """At an address that is a multiple of nothing."""
    return empty((t.numel() + 1,), t.dtype)[1:].view(t.shape).copy_(t)


def turned(t: Tensor) -> Tensor:
    """The last dimension is the slowest."""
    order = [t.ndim - 1, *range(t.ndim - 1)]
    return t.permute(order).contiguous().permute([*range(1, t.ndim), 0])


def repeated(t: Tensor) -> Tensor:
    """One number a row, of stride 0."""
    return t[..., :1].expand(t.shape)


def copied(t: Tensor) -> Tensor:
    """One row for all, of stride 0; one number if there is but one dimension."""
    return t[:1].expand(t.shape)


Layout = Callable[[Tensor], Tensor]
LAYOUTS: list[Layout] = [torch.clone, pitched, stepped, shifted, turned, repeated, copied]
BOTH = st.sampled_from([True, False])
POLICY = ("hidden", "weight", "bias")
REFERENCE = ("ref_input", "ref_weight", "ref_bias")


class Arguments(NamedTuple):
    """Tensors as a function gets them, by name, which gradients are wanted, and the soft cap."""

    tensors: dict[str, Tensor]
    needs: tuple[bool, bool, bool]
    options: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """What the head computes in: what the hidden states are, unless something is fp64."""
        return head_dtype(self.tensors["hidden"], self.tensors["weight"], self.tensors.get("bias"))

    def leaves(self) -> dict[str, Tensor]:
        """Hidden states, weight and bias in the layouts that they have."""
        return {
            name: self.tensors[name].detach().requires_grad_(need)
            for name, need in zip(POLICY, self.needs, strict=True)
            if name in self.tensors
        }

    def rest(self, *names: str) -> dict[str, Tensor]:
        """The tensors of these names that there are."""
        return {name: self.tensors[name] for name in names if name in self.tensors}


def head_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide or tensors[0] is None else tensors[0].dtype


class Drawing:
    """Draws tensors of some shape in any dtype, and in one layout or any."""

    def __init__(self, draw: Any, backend: str, layout: Layout | None) -> None:
        self.draw, self.floats = draw, FLOATS[1:] if backend == "triton" else FLOATS
        self.layouts = st.sampled_from(LAYOUTS) if layout is None else st.just(layout)
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def numbers(self, *shape: int, dtypes: list[torch.dtype] | None = None) -> Tensor:
        plain = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self.laid(plain, dtypes or self.floats)

    def integers(self, count: int, *shape: int, ignored: bool = False) -> Tensor:
        plain = torch.randint(count, shape, generator=self.generator)
        if ignored:
            plain[torch.rand(shape, generator=self.generator) < 0.3] = IGNORED
        return self.laid(plain, INDICES)

    def laid(self, plain: Tensor, dtypes: list[torch.dtype]) -> Tensor:
        layout = self.draw(self.layouts) if plain.ndim else torch.clone
        return layout(plain.to(self.draw(st.sampled_from(dtypes))))

    def head(self, *shape: int, names: tuple[str, ...] = POLICY) -> dict[str, Tensor]:
        """Hidden states (*shape, H), weight and, or not, bias."""
        hidden, weight, bias = names
        width = self.draw(st.sampled_from([20, 16, 3, 1]))
        tensors = {hidden: self.numbers(*shape, width), weight: self.numbers(VOCAB, width)}
        if self.draw(st.booleans()):
            tensors[bias] = self.numbers(VOCAB)
        return tensors

    def arguments(self, tensors: dict[str, Tensor], *, capped: bool = True) -> Arguments:
        options = {"softcap": 3.0, "logit_scale": 0.7} if capped and self.draw(BOTH) else {}
        return Arguments(tensors, self.draw(st.tuples(BOTH, BOTH, BOTH)), options)


@st.composite
def tokens(
    draw: Any, backend: str, layout: Layout | None, shapes: list[tuple[int, ...]]
) -> Arguments:
    """A head, targets, and a gradient of every log-probability."""
    some, shape = Drawing(draw, backend, layout), draw(st.sampled_from(shapes))
    tensors = some.head(*shape)
    tensors["targets"] = some.integers(VOCAB, *shape, ignored=True)
    tensors["upstream"] = some.numbers(*shape, dtypes=FLOATS)
    return some.arguments(tensors)


@st.composite
def responses(draw: Any, backend: str, layout: Layout | None) -> Arguments:
    """A head, packed responses, and comparisons of them."""
    some, count = Drawing(draw, backend, layout), draw(st.sampled_from([6, 5, 1, 0]))
    number, pairs = draw(st.sampled_from([4, 2, 1])), draw(st.sampled_from([3, 1, 0]))
    tensors = some.head(count)
    tensors["targets"] = some.integers(VOCAB, count, ignored=True)
    tensors["response_ids"] = some.integers(number, count)
    tensors["comparisons"] = some.integers(number, pairs, 2)
    tensors["ref_logps"] = some.numbers(number, dtypes=FLOATS)
    if draw(BOTH):
        tensors["comparison_weights"] = some.numbers(pairs, dtypes=FLOATS)
    if draw(BOTH):
        tensors["response_lengths"] = some.laid(torch.arange(1.0, number + 1), FLOATS)
    return some.arguments(tensors)


@st.composite
def batches(draw: Any, backend: str, layout: Layout | None) -> Arguments:
    """What Liger's loss is called with."""
    some = Drawing(draw, backend, layout)
    shape = (draw(st.sampled_from([4, 2])), draw(st.integers(1, 3)))
    tensors = some.head(*shape)
    tensors |= some.head(*shape, names=REFERENCE)
    tensors["targets"] = some.integers(VOCAB, *shape, ignored=True)
    return some.arguments(tensors, capped=False)


class Exact(NamedTuple):
    """Every result by name, the gradients, and what each entry of those is a sum of."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    sums: dict[str, Tensor]


def widened(tensors: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Contiguous fp64 and int64, `names` being those of a head, which rounds to its own dtype."""
    dtype = head_dtype(*(tensors.get(name) for name in names))
    rounded = {n: t.to(dtype) if n in names else t for n, t in tensors.items()}
    return {
        name: (t.double() if t.is_floating_point() else t.long()).contiguous()
        for name, t in rounded.items()
    }


def exact(drawn: Arguments, value_of: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Exact:
    """fp64 results and gradients of what `value_of(stats, tensors)` makes of the tokens."""
    wide = widened(drawn.tensors, POLICY)
    wide |= widened(drawn.rest(*REFERENCE), REFERENCE)
    x, w = wide["hidden"], wide["weight"]
    product = x @ w.T
    logits = (product + wide["bias"] if "bias" in wide else product).requires_grad_()
    stats = naive.token_stats(
        naive.logits_of(logits, torch.eye(VOCAB, dtype=torch.float64), **drawn.options),
        wide["targets"],
        IGNORED,
    )
    value, values = value_of(stats, wide)
    (slope,) = torch.autograd.grad(value, logits)
    flat, slope = x.reshape(-1, x.shape[-1]), slope.reshape(-1, VOCAB)

    def gradients(x: Tensor, w: Tensor, slope: Tensor) -> dict[str, Tensor]:
        hidden = (slope @ w).view(wide["hidden"].shape)
        return {"hidden": hidden, "weight": slope.T @ x, "bias": slope.sum(0)}

    return Exact(
        {name: value.detach() for name, value in values.items()},
        gradients(flat, w, slope),
        gradients(flat.abs(), w.abs(), slope.abs()),
    )


def assert_close(
    values: dict[str, Tensor], leaves: dict[str, Tensor], drawn: Arguments, truth: Exact
) -> None:
    """Results within roundings of fp32 (fp64 for fp64), gradients within some of their dtypes."""
    computed = [
        drawn.dtype,
        *(value.dtype for value in values.values() if value.is_floating_point()),
    ]
    if REFERENCE[0] in drawn.tensors:
        computed.append(head_dtype(*(drawn.tensors.get(name) for name in REFERENCE)))
    fine = 400 * max(torch.finfo(torch.promote_types(d, torch.float32)).eps for d in computed)
    for name, value in values.items():
        expected = truth.values[name].double()
        largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        assert value.shape == expected.shape, name
        off = (value.double() - expected).abs()
        assert (off <= fine * largest).all(), f"{name}: {value} for {expected}"
    for name, leaf in leaves.items():
        if not leaf.requires_grad:
            continue
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        formats = [torch.finfo(dtype) for dtype in (drawn.dtype, leaf.dtype)]
        rounding = max(f.eps for f in formats)
        smallest = max(f.smallest_normal * f.eps for f in formats)
        off = (leaf.grad.double() - truth.gradients[name]).abs()
        allowed = (4 * rounding + fine) * truth.sums[name] + fine + smallest
        assert (off <= allowed).all(), f"gradient of {name}: {leaf.grad}, {truth.gradients[name]}"


@pytest.fixture(scope="module", params=[*ENGINES, "naive"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def examples(count: int) -> Any:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


all_layouts = pytest.mark.parametrize(
    "layout", [*LAYOUTS, None], ids=lambda f: "mixed" if f is None else f.__name__
)


def scored(stats: dict[str, Tensor], wide: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return (stats["logprob"] * wide["upstream"]).sum(), stats


def without_ties(values: dict[str, Tensor], drawn: Arguments) -> dict[str, Tensor]:
    """Which of equal logits is the largest is a matter of rounding."""
    ties = drawn.tensors["weight"].stride(0) == 0
    return {name: t for name, t in values.items() if not (ties and name == "is_top1")}


def backward(value: Tensor, upstream: Tensor | None = None) -> None:
    if value.requires_grad:
        value.backward(None if upstream is None else upstream.to(value.dtype))


@all_layouts
@examples(4)
@given(st.data())
def test_linear_logprob(backend: str, layout: Layout | None, data: Any) -> None:
    drawn = data.draw(tokens(backend, layout, [(5,), (0,), (2, 3), (), (2, 1, 2)]))
    leaves = drawn.leaves()
    found = linear_logprob(
        **leaves, **drawn.rest("targets"), outputs=OUTPUTS, backend=backend, **drawn.options
    )
    backward(found.logprob, drawn.tensors["upstream"])
    values = without_ties(found._asdict(), drawn)
    assert_close(values, leaves, drawn, exact(drawn, scored))


@pytest.mark.parametrize("engine", ENGINES)
@examples(10)
@given(st.data())
def test_the_function_of_trl(engine: str, data: Any) -> None:
    drawn = data.draw(tokens(engine, None, [(5,), (1,)]))
    leaves, options = drawn.leaves(), drawn.options
    names = ("logprob", "entropy", "log_sum_sq_prob", "mean_logit", "is_top1")
    with mock.patch.object(call, "choose_backend", lambda *_: engine):
        found = LinearLogProb(torch.autograd.Function).apply(
            leaves["hidden"],
            leaves["weight"],
            leaves.get("bias"),
            drawn.tensors["targets"],
            1.0,
            8,
            options.get("softcap"),
            options.get("logit_scale", 1.0),
        )
    backward(found[0], drawn.tensors["upstream"])
    values = without_ties(dict(zip(names, found, strict=True)), drawn)
    assert_close(values, leaves, drawn, exact(drawn, scored))


def compared(beta: float) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """DPO's loss with plain indexing; with lengths, that of IPO."""

    def value_of(stats: dict[str, Tensor], wide: dict[str, Tensor]):
        ids, pairs, ref = wide["response_ids"], wide["comparisons"], wide["ref_logps"]
        logps = torch.zeros_like(ref).index_add(0, ids, stats["logprob"])
        weights, lengths = wide.get("comparison_weights"), wide.get("response_lengths")
        ratios = logps - ref if lengths is None else (logps - ref) / lengths
        margins = ratios[pairs[:, 0]] - ratios[pairs[:, 1]]
        if lengths is None:
            losses = -torch.nn.functional.logsigmoid(beta * margins)
        else:
            losses = (margins - 1 / (2 * beta)) ** 2
        loss = (losses / max(1, len(pairs)) if weights is None else losses * weights).sum()
        return loss, {"loss": loss, "logps": logps, "entropy": stats["entropy"]}

    return value_of


@all_layouts
@examples(4)
@given(st.data())
def test_linear_dpo_loss(backend: str, layout: Layout | None, data: Any) -> None:
    drawn = data.draw(responses(backend, layout))
    leaves = drawn.leaves()
    rest = {name: t for name, t in drawn.tensors.items() if name not in leaves}
    options = {"beta": 0.7, "loss_type": "ipo" if "response_lengths" in rest else "sigmoid"}
    loss, logps, stats = linear_dpo_loss(
        **leaves, **rest, **options, outputs=("entropy",), backend=backend, **drawn.options
    )
    backward(loss)
    values = {"loss": loss, "logps": logps, "entropy": stats.entropy}
    assert_close(values, leaves, drawn, exact(drawn, compared(0.7)))


def of_pairs(stats: dict[str, Tensor], wide: dict[str, Tensor]):
    """Liger's loss and most of its metrics, chosen responses in the first half of the rows."""
    other = [wide.get(name) for name in REFERENCE]
    logits = naive.logits_of(*other)
    ref = naive.token_stats(logits, wide["targets"], IGNORED)["logprob"].sum(1)
    logps = stats["logprob"].sum(1)
    (chosen, rejected), rewards = logps.chunk(2), 0.7 * (logps - ref)
    margins = rewards.chunk(2)[0] - rewards.chunk(2)[1]
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    rows = dict(zip(("chosen reward", "rejected reward"), rewards.chunk(2), strict=True))
    return loss, {"loss": loss, "chosen": chosen, "rejected": rejected, **rows}


@examples(5)
@given(st.data())
def test_the_loss_of_liger(backend: str, data: Any) -> None:
    drawn = data.draw(batches(backend, None))
    leaves = drawn.leaves()
    loss, metrics = LinearDPOLoss(beta=0.7, backend=backend)(
        leaves["weight"],
        leaves["hidden"],
        drawn.tensors["targets"],
        leaves.get("bias"),
        **drawn.rest(*REFERENCE),
    )
    backward(loss)
    names = ("chosen", "rejected", "chosen reward", "rejected reward")
    values = dict(zip(names, (*metrics[:2], *metrics[5:]), strict=True))
    assert_close(values | {"loss": loss}, leaves, drawn, exact(drawn, of_pairs))


@pytest.mark.parametrize("engine", ENGINES)
@examples(10)
@given(st.data())
def test_operators(engine: str, data: Any) -> None:
    """As a compiler calls them: the backward with statistics and a gradient of any layout."""
    drawn = data.draw(tokens(engine, None, [(5,), (1,)]))
    inputs = [drawn.tensors.get(name) for name in ("hidden", "weight", "bias", "targets")]
    options = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0, **drawn.options}
    options |= {"ignore_index": IGNORED, "dtype": drawn.dtype, "backend": engine}
    options["workspace_mib"] = 1
    found = library.linear_logprob(*inputs, **options, outputs="", keep_gradient=False)
    stats = dict(zip(("logprob", *OUTPUTS), found[:-1], strict=True))
    saved = [stepped(stats[name]) for name in ("logprob", "lse")]
    truth = exact(drawn, scored)
    leaves = {name: t.detach() for name, t in drawn.tensors.items() if name in truth.gradients}
    upstream = drawn.tensors["upstream"]
    gradients = library.linear_logprob_backward(
        upstream, None, *inputs, *saved, **options, needs=[True, True, len(leaves) == 3]
    )
    for leaf, gradient in zip(leaves.values(), gradients, strict=False):
        leaf.requires_grad_().grad = gradient
    assert_close({"logprob": stats["logprob"]}, leaves, drawn, truth)


KEPT = [torch.clone, pitched, shifted, turned, copied]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_is_copied_only_where_rows_and_columns_are_torn(
    engine: str, layout: Layout
) -> None:
    """Bytes of V·H beside the weight are not what a caller expects."""
    x, w, _, y = make(9, dtype=torch.float32, ignore=0)
    weight = layout(w).requires_grad_()
    with small_tiles(4) as made:
        logprob = linear_logprob(x, weight, y, backend=engine)
        (gradient,) = torch.autograd.grad(logprob.sum(), weight)
    assert len(made) == 2
    for tiles in made:
        assert (tiles.head.weight.data_ptr() == weight.data_ptr()) == (layout in KEPT)
    assert gradient.stride() == (w.T.contiguous().T if layout is turned else w).stride()


def test_tied_tensors_and_views_of_complex_numbers(backend: str) -> None:
    _, w, _, y = make(6, dtype=torch.float32, ignore=0)
    leaf, other = w.clone().requires_grad_(), w.double().requires_grad_()
    found = linear_logprob(leaf[3:9], leaf, y, backend=backend)
    (expected := linear_logprob(other[3:9], other, y, backend="naive")).sum().backward()
    found.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-5, atol=1e-5)
    lazy = torch.complex(w, -w).conj().imag  # negated where it is read, and of stride 2
    assert lazy.is_neg()
    found = linear_logprob(lazy[3:9], lazy, y, backend=backend)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
