"""`LinearDPOLoss` beside Liger's own class: loss, metrics and gradients."""

import math
import sys

import pytest
import torch
from fastdpo_kernels import LOSSES, LinearDPOLoss, linear_dpo_loss
from fastdpo_kernels.integrations import liger
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("liger-kernel needs triton, which is for Linux", allow_module_level=True)
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

LIGERS = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
NAMES = (
    "loss",
    "chosen_logps",
    "rejected_logps",
    "chosen_logits_mean",
    "rejected_logits_mean",
    "nll_loss",
    "chosen_rewards",
    "rejected_rewards",
)


def batch(rows: int = 6, length: int = 11, seed: int = 0, dtype=torch.float32, bias: bool = True):
    """Weight, hidden states, labels, bias and the same of a narrower reference; each row has a
    prompt, a response of its own length and padding.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g)).to(dtype)

    labels = torch.randint(0, 67, (rows, length), generator=g)
    for row in range(rows):
        labels[row, : 1 + row % 3] = -100
        labels[row, length - (row * 5) % 4 :] = -100
    heads = [normal(67, 20, scale=0.4), normal(rows, length, 20), normal(67)]
    reference = [normal(rows, length, 12), normal(67, 12, scale=0.4), normal(67)]
    if not bias:
        heads[2] = reference[2] = None
    return heads[0], heads[1], labels, heads[2], *reference


def called(module: torch.nn.Module, arguments, frozen: bool = False, factor: float = 1.0):
    """Loss and metrics by name, and the gradients of weight, hidden states and bias."""
    w, x, labels, b, *reference = arguments
    leaves = [
        None if t is None else t.clone().requires_grad_(t is x or not frozen) for t in (w, x, b)
    ]
    loss, metrics = module(leaves[0], leaves[1], labels, leaves[2], *reference)
    assert not any(m.requires_grad for m in metrics)
    (factor * loss).backward()
    gradients = [None if leaf is None else leaf.grad for leaf in leaves]
    return dict(zip(NAMES, (loss.detach(), *metrics), strict=True)), gradients


def assert_same(ours, theirs, rtol: float = 1e-5) -> None:
    for name in NAMES:
        a, b = ours[0][name], theirs[0][name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale, msg=f"{name}: {a} {b}")
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


OPTIONS = {
    "plain": {},
    "averages": {"average_log_prob": True},
    "negative log-likelihood": {"compute_nll_loss": True, "alpha": 0.7},
    "both": {"compute_nll_loss": True, "average_log_prob": True, "beta": 0.5},
    "no reference": {"use_ref_model": False},
}


@pytest.mark.parametrize("loss_type", LIGERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_it_is_ligers_loss(loss_type, options, frozen):
    # Liger leaves label smoothing out of "sigmoid".
    smoothing = 0.0 if loss_type == "sigmoid" else 0.1
    options = {"loss_type": loss_type, "label_smoothing": smoothing, **options}
    theirs = LigerFusedLinearDPOLoss(compiled=False, **options)
    for arguments in (batch(), batch(rows=2, bias=False, seed=1)):
        if not options.get("use_ref_model", True):
            arguments = arguments[:4]
        assert_same(
            called(LinearDPOLoss(compiled=False, **options), arguments, frozen, 3.0),
            called(theirs, arguments, frozen, 3.0),
        )


def test_the_call_of_trl_0_28():
    w, x, labels, b, ref_x, ref_w, ref_b = batch()
    labels[labels == -100] = -7
    results = []
    for module in (LinearDPOLoss, LigerFusedLinearDPOLoss):
        extra = {} if module is LinearDPOLoss else {"compiled": False}
        loss_fn = module(
            ignore_index=-7,
            beta=0.2,
            use_ref_model=True,
            average_log_prob=False,
            loss_type="apo_zero",
            **extra,
        )
        loss, (chosen, rejected, mean_chosen, mean_rejected, nll, *aux) = loss_fn(
            w, x, labels, bias=b, ref_input=ref_x, ref_weight=ref_w, ref_bias=ref_b
        )
        results.append([loss, chosen, rejected, mean_chosen, mean_rejected, nll, *aux])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_call_of_trl_1_0_to_1_13():
    """Hidden states are a slice of one position less, made contiguous; the labels are a copy."""
    w, x, labels, b, ref_x, ref_w, ref_b = batch(length=12)
    shifted = labels[:, 1:].clone()
    call = (w, x[:, :-1].contiguous(), shifted, b, ref_x[:, :-1].contiguous(), ref_w, ref_b)
    for options in ({}, {"label_smoothing": 0.1, "discopop_tau": 0.2}):
        theirs = LigerFusedLinearDPOLoss(beta=0.1, loss_type="discopop", compiled=False, **options)
        ours = LinearDPOLoss(beta=0.1, loss_type="discopop", **options)
        assert_same(called(ours, call), called(theirs, call))
    # The slices themselves do as well.
    assert_same(
        called(ours, (w, x[:, :-1], shifted, b, ref_x[:, :-1], ref_w, ref_b)), called(theirs, call)
    )


def test_lower_precision_is_closer_to_the_truth_than_ligers():
    arguments = batch(dtype=torch.bfloat16, length=40)
    exact = called(
        LinearDPOLoss(), [t if t.dtype == torch.int64 else t.double() for t in arguments]
    )
    ours = called(LinearDPOLoss(), arguments)
    theirs = called(LigerFusedLinearDPOLoss(compiled=False), arguments)
    for name in NAMES:
        assert ours[0][name].dtype == torch.float32
        mine, other = ((m[0][name].double() - exact[0][name]).norm() for m in (ours, theirs))
        assert mine <= other + 1e-5
    for a, b, truth in zip(ours[1], theirs[1], exact[1], strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert (a.double() - truth).norm() <= 1.5 * (b.double() - truth).norm()


def test_a_pair_is_never_torn_apart(monkeypatch):
    """The tokens of a pair lie next to each other, so that a small workspace need not hold all."""
    seen = {}

    def spy(hidden, weight, targets, response_ids, comparisons, *args, **kwargs):
        seen.update(ids=response_ids.tolist(), pairs=comparisons.tolist(), **kwargs)
        return linear_dpo_loss(hidden, weight, targets, response_ids, comparisons, *args, **kwargs)

    monkeypatch.setattr(liger, "linear_dpo_loss", spy)
    arguments = batch()
    called(LinearDPOLoss(), arguments)
    assert seen["loss_type"] == "sigmoid"
    assert seen["pairs"] == [[0, 3], [1, 4], [2, 5]]
    order = list(dict.fromkeys(seen["ids"]))
    assert order == [0, 3, 1, 4, 2, 5]
    counts = (arguments[2] != -100).sum(1).tolist()
    assert [seen["ids"].count(row) for row in range(6)] == counts


def test_losses_beyond_ligers(monkeypatch):
    arguments = batch()
    chosen = called(LinearDPOLoss(), arguments)[0]
    counts = (arguments[2] != -100).sum(1)
    logratios = (chosen["chosen_rewards"] / 0.1, chosen["rejected_rewards"] / 0.1)
    mean = logratios[0] / counts[:3] - logratios[1] / counts[3:]
    expected = ((mean - 1 / (2 * 0.3)) ** 2).mean()
    for options in ({}, {"average_log_prob": True}):
        loss = called(LinearDPOLoss(loss_type="ipo", beta=0.3, **options), arguments)[0]["loss"]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setitem(
        LOSSES, "mine", lambda pairs, *, beta, label_smoothing: pairs.margins * beta
    )
    loss = called(LinearDPOLoss(loss_type="mine"), arguments)[0]["loss"]
    torch.testing.assert_close(
        loss, (chosen["chosen_rewards"] - chosen["rejected_rewards"]).mean(), rtol=1e-5, atol=1e-5
    )


def test_sigmoid_honours_label_smoothing():
    arguments = batch()
    values = called(LinearDPOLoss(label_smoothing=0.1), arguments)[0]
    margin = values["chosen_rewards"] - values["rejected_rewards"]
    expected = -0.9 * margin.sigmoid().log() - 0.1 * (-margin).sigmoid().log()
    torch.testing.assert_close(values["loss"], expected.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_without_labels_are_finite(options):
    arguments = list(batch())
    for empty in (slice(1, 2), slice(None)):
        arguments[2] = arguments[2].clone()
        arguments[2][empty] = -100
        values, gradients = called(LinearDPOLoss(**options), arguments)
        assert all(torch.isfinite(v).all() for v in values.values())
        assert all(torch.isfinite(g).all() for g in gradients)
    assert all(g.abs().sum() == 0 for g in gradients)


def test_a_policy_that_is_its_reference_has_rewards_of_zero():
    """As a LoRA run's first step: rounding must not make a reward accuracy out of nothing."""
    w, x, labels, b, *_ = batch()
    values, gradients = called(LinearDPOLoss(), (w, x, labels, b, x, w, b))
    assert not values["chosen_rewards"].any() and not values["rejected_rewards"].any()
    assert values["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert gradients[0].any()


def test_evaluation_needs_no_gradient():
    arguments = batch()
    expected = called(LinearDPOLoss(), arguments)[0]
    with torch.no_grad():
        loss, _ = LinearDPOLoss()(*arguments)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected["loss"])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"'sigmoidal'; known: .*apo_zero.*sigmoid"):
        LinearDPOLoss(loss_type="sigmoidal")
    with pytest.raises(ValueError, match=r"expected a loss of comparisons, got 'kto', a loss of"):
        LinearDPOLoss(loss_type="kto")
    with pytest.raises(ValueError, match=r"exo_pair: expected 0 < label_smoothing"):
        LinearDPOLoss(loss_type="exo_pair")
    with pytest.raises(ValueError, match=r"robust: expected .* got 0.5"):
        LinearDPOLoss(loss_type="robust", label_smoothing=0.5)
    w, x, labels, b, ref_x, ref_w, ref_b = batch()
    with pytest.raises(ValueError, match=r"ref_input and ref_weight are needed"):
        LinearDPOLoss()(w, x, labels, b)
    with pytest.raises(ValueError, match=r"as many rejected as chosen rows, got \(5, 11, 20"):
        LinearDPOLoss()(w, x[:5], labels[:5], b, ref_x[:5], ref_w, ref_b)
    with pytest.raises(ValueError, match=r"_input .B, L, H. .* got .6, 10, 20. and .6, 11."):
        LinearDPOLoss()(w, x[:, 1:], labels, b, ref_x, ref_w, ref_b)
    with pytest.raises(ValueError, match=r"ref_input: expected .6, 11. and a width"):
        LinearDPOLoss()(w, x, labels, b, ref_x[:, 1:], ref_w, ref_b)


def test_a_loss_sees_averages_of_responses_of_one_token(monkeypatch):
    seen = []

    def loss(pairs, *, beta, label_smoothing):
        seen.append(pairs)
        return pairs.margins

    monkeypatch.setitem(LOSSES, "seen", loss)
    arguments = batch()
    chosen, rejected = (arguments[2] != -100).sum(1).clamp(min=1).view(2, 3)
    for average in (False, True):
        called(LinearDPOLoss(loss_type="seen", average_log_prob=average), arguments)
    summed, averaged = seen[1], seen[-1]
    for name, count in (
        ("chosen_logps", chosen),
        ("rejected_logps", rejected),
        ("ref_chosen_logps", chosen),
        ("ref_rejected_logps", rejected),
    ):
        torch.testing.assert_close(getattr(averaged, name), getattr(summed, name) / count)
    assert (averaged.chosen_lengths == 1).all() and (averaged.rejected_lengths == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_sppo_hard_in_fp32_is_near_fp64(seed):
    """Its target 1/(2β) is large beside what the log-ratios add to it."""
    found, gradients = called(
        LinearDPOLoss(beta=0.1, loss_type="sppo_hard"), batch(seed=seed, rows=16)
    )
    exact, exact_gradients = called(
        LinearDPOLoss(beta=0.1, loss_type="sppo_hard"),
        batch(seed=seed, rows=16, dtype=torch.float64),
    )
    assert abs(found["loss"].double() / exact["loss"] - 1) < 1e-6
    for gradient, other in zip(gradients, exact_gradients, strict=True):
        assert (gradient.double() - other).norm() < 1e-6 * other.norm()
