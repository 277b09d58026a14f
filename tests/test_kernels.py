"""The portable head against the specification in fp64: every option, odd sizes, chunks, repeats,
ignored tokens.
"""

import itertools
import math

import pytest
import torch
from fastdpo_kernels import LOSSES, linear_dpo_loss, linear_logprob, register_loss, tiles
from fastdpo_kernels.head import OUTPUTS
from fastdpo_kernels.problem import Loss, Problem, whole_comparisons
from hypothesis import given, settings
from hypothesis import strategies as st

HEADS = {
    "plain": {},
    "scale": {"logit_scale": 0.37},
    "softcap": {"softcap": 3.0},
    "everything": {"softcap": 5.0, "logit_scale": 1.7, "temperature": 0.8, "bias": True},
}


def make(tokens, hidden=24, vocab=101, seed=0, bias=False, dtype=torch.float64, ignore=0.2):
    """Random hidden states, weight, targets (some ignored) and bias; logits with a spread of
    several nats.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=g, dtype=torch.float64) * 0.5
    y = torch.randint(0, vocab, (tokens,), generator=g)
    y[torch.rand(tokens, generator=g) < ignore] = -100
    b = torch.randn(vocab, generator=g, dtype=torch.float64) if bias else None
    return [None if t is None else t.to(dtype) for t in (x, w, b)] + [y]


@pytest.fixture(autouse=True)
def poisoned_workspace(monkeypatch):
    """Small tiles, so that everything is cut, and NaN in every tile before it is written."""
    monkeypatch.setattr(tiles, "_MAX_TILE_ROWS", 7)
    monkeypatch.setattr(tiles, "_CACHE_BLOCK_BYTES", 3 * 101 * 8)
    original = tiles.TorchTiles._workspace
    monkeypatch.setattr(
        tiles.TorchTiles, "_workspace", lambda self, size: original(self, size).fill_(math.nan)
    )


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("tokens", [1, 6, 63])
@pytest.mark.parametrize("train", [(True, True), (True, False), (False, True)], ids=str)
def test_logprob_matches_the_reference(options, tokens, train):
    options = dict(options)
    x, w, b, y = make(tokens, bias=options.pop("bias", False))
    results = {}
    for backend in ("reference", "torch"):
        leaves = [x.clone().requires_grad_(train[0]), w.clone().requires_grad_(train[1])]
        if b is not None:
            leaves.append(b.clone().requires_grad_(train[1]))
        out = linear_logprob(
            leaves[0],
            leaves[1],
            y,
            leaves[2] if b is not None else None,
            outputs=OUTPUTS,
            backend=backend,
            **options,
        )
        (out.logprob * torch.linspace(-1, 2, tokens, dtype=torch.float64)).sum().backward()
        results[backend] = [*out, *(leaf.grad for leaf in leaves if leaf.requires_grad)]
    for ours, reference in zip(results["torch"], results["reference"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def packed(responses=7, seed=0, dtype=torch.float64, bias=False):
    """A packed problem with uneven responses, one of them empty, several comparisons a response."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (responses,), generator=g)
    lengths[responses // 2] = 0
    ids = torch.repeat_interleave(torch.arange(responses), lengths)
    x, w, b, y = make(len(ids), seed=seed, dtype=dtype, bias=bias, ignore=0.1)
    pairs = torch.tensor([(a, a + 1) for a in range(0, responses - 1, 2)] + [(2, 0), (0, 1)])
    ref = -torch.rand(responses, generator=g, dtype=torch.float64) * 40
    return x, w, b, y, ids, pairs, ref.to(dtype)


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_dpo_loss_and_gradients_match_the_reference(loss_type, options):
    options = {k: v for k, v in options.items() if k != "temperature"}
    x, w, b, y, ids, pairs, ref = packed(bias=options.pop("bias", False))
    results = {}
    for backend in ("reference", "torch"):
        leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
        loss, logps, stats = linear_dpo_loss(
            leaves[0],
            leaves[1],
            y,
            ids,
            pairs,
            ref,
            leaves[2] if b is not None else None,
            loss_type=loss_type,
            label_smoothing=0.1,
            comparison_weights=torch.linspace(0.1, 1, len(pairs), dtype=torch.float64),
            outputs=OUTPUTS,
            backend=backend,
            **options,
        )
        (3 * loss).backward()
        assert not logps.requires_grad
        results[backend] = [loss, logps, *stats, *(leaf.grad for leaf in leaves)]
    for ours, reference in zip(results["torch"], results["reference"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000), st.integers(1, 60))
def test_chunking_never_changes_the_result(responses, seed, rows):
    x, w, _, y, ids, pairs, ref = packed(responses + 2, seed)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    expected = linear_dpo_loss(x, w, y, ids, pairs, ref, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_MAX_TILE_ROWS", rows)
        for perm in (slice(None), order):
            leaf = x[perm].clone().requires_grad_()
            loss, logps = linear_dpo_loss(leaf, w, y[perm], ids[perm], pairs, ref)
            loss.backward()
            torch.testing.assert_close((loss.detach(), logps), expected, rtol=1e-11, atol=1e-11)
            gradient = (
                leaf.grad
                if perm is not order
                else torch.empty_like(x).index_copy(0, order, leaf.grad)
            )
            whole = x.clone().requires_grad_()
            linear_dpo_loss(whole, w, y, ids, pairs, ref, backend="reference")[0].backward()
            torch.testing.assert_close(gradient, whole.grad, rtol=1e-11, atol=1e-12)


def test_pieces_hold_whole_comparisons_and_cover_all_once():
    x, _, _, y, ids, pairs, ref = packed(25, 3)
    problem = Problem(y, ids, pairs, ref, ref, ref, Loss(lambda pairs: pairs.margins))
    pieces = list(whole_comparisons(problem, 20))
    assert len(pieces) > 3
    assert [p.start for p, _ in pieces[1:]] == [p.stop for p, _ in pieces[:-1]]
    assert (pieces[0][0].start, pieces[-1][0].stop) == (0, len(x))
    every = torch.arange(len(pairs))
    assert sorted(itertools.chain(*(every[c].tolist() for _, c in pieces))) == every.tolist()
    for piece, chosen in pieces:
        inside = set(ids[piece].tolist())
        outside = set(ids.tolist()) - inside
        assert not inside & set(ids[: piece.start].tolist())
        assert not outside & set(pairs[chosen].flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_scored_in_fp32(dtype):
    x, w, _, y = make(50, hidden=64, dtype=dtype)
    exact = linear_logprob(x.double(), w.double(), y, backend="reference")
    ours = linear_logprob(x, w, y)
    naive = (x @ w.T).log_softmax(-1).gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1)
    error = (ours - exact).abs().max()
    same_dtype = (naive.where(y != -100, 0) - exact).abs().max()
    assert ours.dtype == torch.float32
    assert error <= 2 * same_dtype + 1e-6
    assert error < 1e-5


def test_extreme_logits_stay_finite_and_exact():
    vocab, hidden = 101, 8
    w = torch.zeros(vocab, hidden)
    w[3, 0], w[4, 0] = 1.0, -1.0
    x = torch.zeros(3, hidden)
    x[:, 0] = torch.tensor([1e4, 40.0, 9.0])
    y = torch.tensor([3, 4, 3])
    exact = linear_logprob(x.double(), w.double(), y, backend="reference")
    torch.testing.assert_close(linear_logprob(x, w, y).double(), exact, rtol=1e-6, atol=1e-6)
    assert exact[1] < -79


def test_first_loss_is_log_two():
    x, w, _, y, ids, pairs, _ = packed(dtype=torch.float32)
    _, logps = linear_dpo_loss(x, w, y, ids, pairs, torch.zeros(7))
    loss, _ = linear_dpo_loss(x, w, y, ids, pairs, logps)
    assert abs(loss.item() - math.log(2)) < 1e-6


def test_nothing_to_score():
    x, w, _, y = make(5)
    y[:] = -100
    leaf = x.requires_grad_()
    assert not linear_logprob(leaf, w, y).any()
    linear_logprob(leaf, w, y).sum().backward()
    assert not leaf.grad.any()
    ids = torch.zeros(5, dtype=torch.int64)
    loss, logps = linear_dpo_loss(
        leaf, w, y, ids, torch.tensor([[0, 1]]), torch.zeros(2, dtype=torch.float64)
    )
    loss.backward()
    assert abs(loss.item() - math.log(2)) < 1e-12 and not logps.any()


def test_a_loss_is_added_by_writing_a_function():
    try:
        register_loss("squared")(lambda pairs, *, beta, label_smoothing: (pairs.margins - 1) ** 2)
        x, w, _, y, ids, pairs, ref = packed()
        expected = linear_dpo_loss(x, w, y, ids, pairs, ref, loss_type="squared")
        direct = linear_dpo_loss(
            x, w, y, ids, pairs, ref, loss_type=lambda pairs: (pairs.margins - 1) ** 2
        )
        assert torch.equal(expected[0], direct[0])
        with pytest.raises(ValueError, match="registered already"):
            register_loss("squared")(lambda pairs: pairs.margins)
    finally:
        LOSSES.pop("squared", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets: expected shape"),
        ({"weight": torch.zeros(9, 3)}, "weight: expected"),
        ({"bias": torch.zeros(3)}, "bias: expected"),
        ({"targets": torch.full((5,), 101)}, "101 is outside the vocabulary of 101"),
        ({"outputs": ("entropie",)}, "unknown outputs"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(change, message):
    x, w, _, y = make(5)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{"hidden": x, "weight": w, "targets": y, **change})


def test_unknown_loss_is_named():
    x, w, _, y, ids, pairs, ref = packed()
    with pytest.raises(ValueError, match=r"'sigmoidal'; known: .*hinge.*sigmoid"):
        linear_dpo_loss(x, w, y, ids, pairs, ref, loss_type="sigmoidal")


def test_the_workspace_is_bounded_and_can_be_released():
    tiles.release_workspace()
    x, w, _, y = make(3000, vocab=4096, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_MAX_TILE_ROWS", 2048)
        linear_logprob(x.requires_grad_(), w.requires_grad_(), y, workspace_mib=2).sum().backward()
    (buffer,) = tiles._workspaces.values()
    assert buffer.numel() * buffer.element_size() <= 2 << 20
    tiles.release_workspace()
    assert not tiles._workspaces
