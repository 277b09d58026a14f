"""The fused kernels against the specification in fp64: in Triton's interpreter, or on the GPU where
there is one.
"""

import math

import pytest
import torch
from fastdpo_kernels import LOSSES, linear_dpo_loss, linear_logprob, naive
from fastdpo_kernels.head import OUTPUTS, Head
from fastdpo_kernels.losses import Comparisons, get_loss
from fastdpo_kernels.tiles import TorchTiles
from head_problems import HEADS, make, packed
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from fastdpo_kernels.triton import again, coefficients, exponential, score
from fastdpo_kernels.triton.tiles import TritonTiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter cuts fp32 off to bf16 where a GPU rounds: twice the error.
ROUNDINGS = {torch.float32: 2, torch.float16: 2, torch.bfloat16: 4 if DEVICE == "cpu" else 2}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """NaN in every tile before it is written, and tiles of at most 23 tokens."""
    original = TritonTiles.empty_tile

    def tile(self, tokens):
        return original(self, tokens).fill_(math.nan)

    def small(self, *arguments, make=TritonTiles.__init__):
        make(self, *arguments)
        self.rows = 23

    monkeypatch.setattr(TritonTiles, "empty_tile", tile)
    monkeypatch.setattr(TritonTiles, "__init__", small)


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def softmax_minus_onehot(x, head, targets):
    """∂(−logp_t)/∂(x_t·Wᵀ + b) over `gradient_scale`, in the dtype of `x`; 0 where ignored."""
    b = None if head.bias is None else head.bias.to(x)
    w = head.weight.to(x)
    options = {"logit_scale": head.logit_scale, "temperature": head.temperature}
    z = naive.logits_of(x, w, b, softcap=head.softcap, **options)
    p = z.softmax(-1)
    index = targets.clamp(min=0).unsqueeze(1)
    p = p.scatter_add(1, index, torch.full_like(index, -1, dtype=p.dtype))
    if head.softcap is not None:
        p = p * (1 - (z * head.temperature / head.softcap) ** 2)
    return p.masked_fill((targets < 0).unsqueeze(1), 0), z


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 24), (23, 17)])
def test_statistics_and_tile(options, dtype, tokens, width):
    options = dict(options)
    x, w, b, y = make(tokens, width, 37, bias=options.pop("bias", False), dtype=dtype, seed=3)
    y = y.masked_fill(y == -100, -1)
    x, w, b, y = on_device(x, w, b, y)
    head = Head(w, b, **options)
    exact, z = softmax_minus_onehot(x.double(), head, y)
    rounded, low = softmax_minus_onehot(x, head, y)
    expected = naive.token_stats(z, y, -1)
    coarse = naive.token_stats(low.float(), y, -1)
    tiles = TritonTiles(head, 1)
    for outputs in ((), OUTPUTS):
        scored = tiles.score(x, y, outputs)
        tile, row_scale, stats = tiles.exponentials(x, y, outputs)
        for found in (scored, stats):
            for name, value in found.items():
                if name == "is_top1":
                    assert torch.equal(value, expected[name])
                    continue
                error = (value.double() - expected[name]).abs().max()
                allowed = 2 * (coarse[name].double() - expected[name]).abs().max()
                assert error <= min(allowed, 1e-4) + 4e-6, name
        again = tiles.score(x, y, ())
        for made in ((tile.clone(), row_scale), tiles.probabilities(x, y, again)):
            gradient = made[0].double() * made[1].double().unsqueeze(1)
            allowed = ROUNDINGS[dtype] * (rounded.double() - exact).norm()
            assert (gradient - exact).norm() <= allowed + 2e-6 * (1 + exact.norm())


def compare(results, expected, dtypes):
    """Every result within a few roundings of its dtype of what fp64 gives."""
    for ours, exact, dtype in zip(results, expected, dtypes, strict=True):
        tolerance = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
        assert (ours.double() - exact.double()).norm() <= tolerance * (exact.norm() + 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("options", [HEADS["plain"], HEADS["everything"]], ids=["plain", "all"])
def test_logprob_and_any_gradient(options, train, dtype):
    options = dict(options)
    x, w, b, y = on_device(*make(30, vocab=70, bias=options.pop("bias", False), dtype=dtype))
    coefficients = torch.linspace(-1, 2, 30, device=DEVICE)
    results = {}
    for backend in ("naive", "triton"):
        cast = torch.float64 if backend == "naive" else dtype
        leaves = [None if t is None else t.to(cast) for t in (x, w, b)]
        for leaf, wanted in zip(leaves, (*train, train[1]), strict=True):
            if leaf is not None:
                leaf.requires_grad_(wanted)
        logp = linear_logprob(leaves[0], leaves[1], y, leaves[2], backend=backend, **options)
        (logp * coefficients).sum().backward()
        grads = [t.grad for t in leaves if t is not None and t.requires_grad]
        results[backend] = [logp.detach(), *grads]
    dtypes = [torch.float32, *[dtype] * 3][: len(results["triton"])]
    compare(results["triton"], results["naive"], dtypes)


@pytest.mark.parametrize(
    ("loss_type", "dtype"),
    [
        *(("sigmoid", dtype) for dtype in DTYPES),
        *((name, torch.float32) for name in ("ipo", "hinge", "robust", "apo_zero")),
        ("function", torch.bfloat16),
        ("function", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("shuffled", [False, True], ids=["packed", "shuffled"])
def test_dpo_loss_and_gradients(loss_type, dtype, shuffled):
    """Tiles of 23 tokens: some hold several comparisons, and shuffled tokens need many tiles."""
    x, w, _, y, ids, pairs, ref = packed(12, dtype=torch.float64)
    if shuffled:
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        x, y, ids = x[order], y[order], ids[order]
    x, w, y, pairs, ref = on_device(x.to(dtype), w.to(dtype), y, pairs, ref)
    options = {"loss_type": loss_type, "label_smoothing": 0.1}
    if loss_type == "function":
        options = {"loss_function": lambda pairs: (0.1 * pairs.margins - 1) ** 2}
    results = {}
    for backend in ("naive", "triton"):
        cast = torch.float64 if backend == "naive" else dtype
        a, c = x.to(cast, copy=True).requires_grad_(), w.to(cast, copy=True).requires_grad_()
        loss, logps = linear_dpo_loss(a, c, y, ids, pairs, ref, backend=backend, **options)
        (2 * loss).backward()
        results[backend] = [loss.detach(), logps, a.grad, c.grad]
    compare(results["triton"], results["naive"], [torch.float32, torch.float32, dtype, dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_over_the_clamp_are_computed_again(dtype):
    x, w, _, y = make(20, dtype=torch.float64, ignore=0.1)
    x[::3] *= 60  # logits of hundreds of nats: some targets lie more than 75 below the maximum
    x, w, y = on_device(x.to(dtype), w.to(dtype), y.masked_fill(y == -100, -1))
    head = Head(w)
    exact, z = softmax_minus_onehot(x.double(), head, y)
    stats = naive.token_stats(z, y, -1)
    assert stats["logprob"].min() < -80 and stats["logprob"].max() <= 0
    for outputs in ((), OUTPUTS):
        tile, row_scale, found = TritonTiles(head, 1).exponentials(x, y, outputs)
        ours = tile.double() * row_scale.double().unsqueeze(1)
        assert (ours - exact).norm() <= (2e-5 if dtype == torch.float32 else 1e-2) * exact.norm()
        for name in found:
            torch.testing.assert_close(
                found[name].double(), stats[name].double(), rtol=2e-6, atol=2e-4
            )


@pytest.mark.parametrize("times", [1, 60])
def test_gradients_of_logits_far_apart_are_no_further_off_than_plain_pytorchs(times):
    """Of the lowest and the highest logits, in the first pass and in the second."""
    x, w, _, y = make(40, vocab=75, seed=3, dtype=torch.float32, ignore=0)
    x *= times
    logits = x @ w.T
    y[:10], y[10:30] = logits[:10].argmin(1), logits[10:30].argmax(1)
    x, w, y = on_device(x, w, y)
    head = Head(w)
    exact, _ = softmax_minus_onehot(x.double(), Head(w.double()), y)

    def off(tiles):
        stats = tiles.score(x, y, ())
        for second in (False, True):
            tile, row_scale, *_ = (
                tiles.probabilities(x, y, stats) if second else tiles.exponentials(x, y, ())
            )
            error = tile.double() * row_scale.double().unsqueeze(1) - exact
            for rows in (slice(10), slice(10, 30), slice(30, 40)):
                yield (error[rows].norm() / exact[rows].norm()).item()

    plain, kernels = list(off(TorchTiles(head, 8))), list(off(TritonTiles(head, 8)))
    for ours, theirs in zip(kernels, plain, strict=True):
        assert ours <= 2 * theirs + 2e-7, (kernels, plain)


def assert_exact(x, w, y, outputs=(), **options):
    """Statistics of both kernels and the tile, in fp32, beside fp64."""
    x, w, y = on_device(x, w, y.masked_fill(y == -100, -1))
    head = Head(w, **options)
    exact, z = softmax_minus_onehot(x.double(), head, y)
    expected = naive.token_stats(z, y, -1)
    tiles = TritonTiles(head, 64)
    tile, row_scale, found = tiles.exponentials(x, y, outputs)
    off = (tile.double() * row_scale.double().unsqueeze(1) - exact).norm()
    assert off <= 2e-5 * (1 + exact.norm())
    for stats in (found, tiles.score(x, y, outputs)):
        for name, value in stats.items():
            torch.testing.assert_close(
                value.double(), expected[name].double(), rtol=2e-5, atol=2e-4
            )


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("softcap", [None, 60.0])
def test_tokens_over_the_clamp_under_a_soft_cap_and_by_several_programs(
    programs, softcap, monkeypatch
):
    for module in (again, exponential, score):
        monkeypatch.setattr(module, "multiprocessors", lambda _: programs)
    x, w, _, y = make(18, dtype=torch.float32, ignore=0.1)
    x[::3] *= 60
    assert_exact(x, w, y, softcap=softcap)


def test_more_partial_sums_than_are_merged_at_once(monkeypatch):
    """71 blocks of the vocabulary, 36 segments of two: 32 are read, then the others."""
    monkeypatch.setattr(score, "PROGRAMS_A_CORE", 10**6)
    x, w, _, y = make(2, hidden=16, vocab=32 * 70 + 7, dtype=torch.float32, ignore=0)
    w[-3] = x[0] * (100 / x[0].square().sum())  # the highest logit stands in a late segment
    if DEVICE == "cpu":
        assert score.partial_sums(Head(w), x, y, OUTPUTS).shape[1] == 36
    assert_exact(x, w, y, OUTPUTS)


def test_a_segment_of_several_blocks_keeps_its_sums(monkeypatch):
    """Under a maximum that grows on the way."""
    monkeypatch.setattr(score, "PROGRAMS_A_CORE", 1)
    x, w, _, y = make(5, vocab=229, dtype=torch.float32, ignore=0)
    assert_exact(x, w, y, OUTPUTS)


def test_more_rows_than_a_group_of_programs_and_than_a_launch(monkeypatch):
    for module in (exponential, score):
        monkeypatch.setattr(module, "GROUP", 2)
    x, w, _, y = make(16 * 3 + 3, vocab=70, dtype=torch.float32, ignore=0)
    assert_exact(x, w, y)
    monkeypatch.setattr(score, "TOKENS_A_LAUNCH", 16)
    assert_exact(x, w, y)


def far_apart(matrix):
    """Rows so far from each other that the third begins beyond 2³¹ elements; only they exist."""
    pitch = 2**30 + 64
    memory = torch.empty(2 * pitch + matrix.shape[1], dtype=matrix.dtype, device=DEVICE)
    return memory.as_strided(matrix.shape, (pitch, 1)).copy_(matrix)


@pytest.mark.parametrize("where", ["states", "weight", "tile"])
def test_rows_beyond_32_bits(where, monkeypatch):
    x, w, _, _ = on_device(*make(3, vocab=3, dtype=torch.float16, ignore=0))
    y = torch.tensor([2, 0, 2], device=DEVICE)
    if where == "tile":
        monkeypatch.setattr(TritonTiles, "empty_tile", lambda self, n: far_apart(w.new_zeros(n, 3)))
    head = Head(far_apart(w) if where == "weight" else w)
    exact, z = softmax_minus_onehot(x.double(), head, y)
    tiles = TritonTiles(head, 1)
    states = far_apart(x) if where == "states" else x
    tile, row_scale, stats = tiles.exponentials(states, y, ())
    assert (tile.double() * row_scale.double().unsqueeze(1) - exact).abs().max() <= 2e-3
    exact = naive.token_stats(z, y)["logprob"]
    rounding = 4 * torch.finfo(torch.float32).eps * z.abs().max().item()
    torch.testing.assert_close(stats["logprob"].double(), exact, rtol=0, atol=rounding)


def test_log_probabilities_near_zero_stay_exact():
    """p → 1: log1p of the other entries, which 1 + s would round off."""
    x, w, y = torch.zeros(3, 16), torch.zeros(101, 16), torch.tensor([5, 5, 5])
    w[5, 0] = 1.0
    x[:, 0] = torch.tensor([10.0, 16.0, 20.0])
    x, w, y = on_device(x, w, y)
    exact = linear_logprob(x.double(), w.double(), y, backend="naive")
    _, _, stats = TritonTiles(Head(w), 1).exponentials(x, y, ())
    torch.testing.assert_close(stats["logprob"].double(), exact, rtol=1e-5, atol=0)


def test_ignored_tokens_and_targets_outside():
    x, w, _, y = on_device(*make(40, dtype=torch.float32))
    nothing = torch.full_like(y, -100)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    linear_logprob(*leaves, nothing, backend="triton").sum().backward()
    assert not leaves[0].grad.any() and not leaves[1].grad.any()
    tiles = TritonTiles(Head(w.detach()), 1)
    outside = torch.tensor([3, 101, -1], device=DEVICE)
    states = x.detach()[:3]
    stats = tiles.score(states, outside, ())
    tile, row_scale, kept = tiles.exponentials(states, outside, ())
    slopes = [(tile * row_scale.unsqueeze(1)).sum(1)]
    tile, row_scale = tiles.probabilities(states, outside, stats)
    slopes.append((tile * row_scale.unsqueeze(1)).sum(1))
    for values in (stats["logprob"], kept["logprob"], *slopes):
        assert values.isnan().tolist() == [0, 1, 0] and values[2] == 0


def test_indices_of_no_response_give_nan():
    """On a GPU nobody looks at them; a number that leaves a token or a comparison out is worse."""
    doubles = {"dtype": torch.float64, "device": DEVICE}
    for wrong in (-1, 2):
        logps = torch.zeros(2, **doubles)
        ids = torch.tensor([0, wrong, 1], device=DEVICE)
        coefficients.add_response_sums(logps, torch.ones(3, device=DEVICE), ids)
        assert logps.isnan().all()
        for pair in ([0, wrong], [wrong, 1]):
            zeros, pairs = torch.zeros(2, **doubles), torch.tensor([[0, 1], pair], device=DEVICE)
            loss, slope = coefficients.loss_and_coefficients(
                zeros, zeros, zeros, pairs, zeros, loss_type="sigmoid", beta=0.1, label_smoothing=0
            )
            assert loss.isnan() and slope.isnan().all()


def test_a_wide_head_through_descriptors_and_persistent_programs():
    x, w, _, y = make(70, hidden=1504, vocab=70, dtype=torch.float64, ignore=0)
    x = x / 20
    x, w, y = on_device(x.bfloat16(), w.bfloat16(), y)
    head = Head(w)
    exact, z = softmax_minus_onehot(x.double(), head, y)
    tile, row_scale, stats = TritonTiles(head, 1).exponentials(x, y, ())
    logp = naive.token_stats(z, y)["logprob"]
    torch.testing.assert_close(stats["logprob"].double(), logp, rtol=1e-5, atol=1e-5)
    ours = tile.double() * row_scale.double().unsqueeze(1)
    assert (ours - exact).norm() <= 8e-3 * exact.norm()


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 4), st.integers(0, 1000), st.integers(2, 20), st.booleans())
def test_cutting_never_changes_the_result(responses, seed, rows, bias):
    case = packed(responses + 2, seed, torch.float32, bias, longest=5)
    x, w, b, y, ids, pairs, ref = on_device(*case)
    results = []
    for limit in (rows, 10_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                TritonTiles, "rows", property(lambda _, n=limit: n, lambda *_: None), False
            )
            leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
            loss, logps = linear_dpo_loss(*leaves, y, ids, pairs, ref, b, backend="triton")
            loss.backward()
            results.append([loss.detach(), logps, *(leaf.grad for leaf in leaves)])
    for cut, whole in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", coefficients.DERIVATIVES)
def test_the_kernel_gives_autograds_coefficients(name):
    g = torch.Generator().manual_seed(0)
    responses, count, tokens = 9, 300, 700
    ids = torch.randint(0, responses, (tokens,), generator=g).to(DEVICE)
    logprob = -torch.rand(tokens, generator=g).to(DEVICE)
    logps = torch.zeros(responses, dtype=torch.float64, device=DEVICE)
    coefficients.add_response_sums(logps, logprob, ids)
    onehot = (ids.unsqueeze(0) == torch.arange(responses, device=DEVICE).unsqueeze(1)).double()
    torch.testing.assert_close(logps, onehot @ logprob.double(), rtol=1e-13, atol=1e-13)
    ref = logps + 9 * torch.randn(responses, generator=g, dtype=torch.float64).to(DEVICE)
    pairs = torch.randint(0, responses, (2, count), generator=g).to(DEVICE).T  # not contiguous
    weights = torch.rand(count, generator=g, dtype=torch.float64).to(DEVICE)
    lengths, (win, lose) = onehot.sum(1), pairs.unbind(1)
    options = {"beta": 0.3, "label_smoothing": 0.1}
    leaf = logps.clone().requires_grad_()
    fields = [leaf[win], leaf[lose], ref[win], ref[lose], lengths[win], lengths[lose]]
    expected = (weights * get_loss(name)(Comparisons(*fields), **options)).sum()
    expected.backward()
    options = {"loss_type": name, "beta": 0.3, "label_smoothing": 0.1}
    loss, slope = coefficients.loss_and_coefficients(logps, ref, lengths, pairs, weights, **options)
    torch.testing.assert_close(
        (loss, slope), (expected.detach(), leaf.grad), rtol=1e-12, atol=1e-12
    )


def test_every_derivative_belongs_to_a_registered_loss():
    assert set(coefficients.DERIVATIVES) <= set(LOSSES)


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_two_runs_give_the_same_bits(frozen, monkeypatch):
    monkeypatch.undo()
    x, w, _, y = make(3000, 256, 5000, dtype=torch.bfloat16)
    ids = torch.arange(3000) // 100
    pairs, ref = torch.arange(30).view(15, 2), torch.zeros(30)
    x, w, y, ids, pairs, ref = on_device(x, w, y, ids, pairs, ref)
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_(not frozen)]
        loss, logps = linear_dpo_loss(*leaves, y, ids, pairs, ref, workspace_mib=8)
        loss.backward()
        runs.append([loss, logps, *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_workspace_and_addresses_beyond_32_bits(monkeypatch):
    """T·V > 2³¹ within 512 MiB beside inputs and gradients; the last tokens are right."""
    monkeypatch.undo()
    tokens, vocab, width = 20_000, 151_936, 256
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16) / 8
    y = torch.randint(0, vocab, (tokens,), device="cuda")
    ids, pairs = torch.arange(tokens) // 500, torch.arange(40).view(20, 2)
    ref = torch.zeros(40, device="cuda")
    x.requires_grad_()
    w.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, logps = linear_dpo_loss(x, w, y, ids, pairs, ref)
    loss.backward()
    gradients = 2 * tokens * width + 6 * vocab * width  # dX; dW in fp32 while summed, then in bf16
    assert torch.cuda.max_memory_allocated() - before <= gradients + (512 << 20)
    tail = linear_logprob(x[-500:].double(), w.double(), y[-500:], backend="naive")
    assert abs(logps[-1].item() - tail.sum().item()) < 1e-2
    assert x.grad[-1].abs().sum() > 0
