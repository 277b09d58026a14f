"""Every registered loss against its paper's formula, written with probabilities in fp64."""

import math

import pytest
import torch
from fastdpo_kernels import LOSSES, Comparisons
from torch import Tensor

from fastdpo.losses import loss_at_reference, make_loss

BETA, EPSILON, TAU = 0.3, 0.1, 0.05


def pairs(count: int = 64, spread: float = 8.0) -> Comparisons:
    g = torch.Generator().manual_seed(0)
    logps = [-40 + spread * torch.randn(count, generator=g, dtype=torch.float64) for _ in range(4)]
    lengths = [torch.randint(1, 30, (count,), generator=g).double() for _ in range(2)]
    return Comparisons(*logps, *lengths)


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def by_formula(name: str, p: Comparisons) -> Tensor:
    """The loss from ratios of probabilities: w and l of the policy over the reference."""
    w = torch.exp(p.chosen_logps) / torch.exp(p.ref_chosen_logps)
    l = torch.exp(p.rejected_logps) / torch.exp(p.ref_rejected_logps)  # noqa: E741
    prefer = w**BETA / (w**BETA + l**BETA)
    r_w, r_l = BETA * w.log(), BETA * l.log()
    per_token = w.log() / p.chosen_lengths - l.log() / p.rejected_lengths
    share = sigma((r_w - r_l) / TAU)
    return {
        "sigmoid": -(1 - EPSILON) * prefer.log() - EPSILON * (1 - prefer).log(),
        "hinge": (1 - (r_w - r_l)).clamp(min=0),
        "ipo": (per_token - 1 / (2 * BETA)) ** 2,
        "robust": (-(1 - EPSILON) * prefer.log() + EPSILON * (1 - prefer).log())
        / (1 - 2 * EPSILON),
        "exo_pair": prefer * (prefer / (1 - EPSILON)).log()
        + (1 - prefer) * ((1 - prefer) / EPSILON).log(),
        "nca_pair": -sigma(r_w).log() - (sigma(-r_w).log() + sigma(-r_l).log()) / 2,
        "bco_pair": -sigma(r_w).log() - sigma(-r_l).log(),
        "sppo_hard": (w.log() - 1 / (2 * BETA)) ** 2 + (l.log() + 1 / (2 * BETA)) ** 2,
        "apo_zero": 1 - sigma(r_w) + sigma(r_l),
        "apo_down": sigma(r_w) + 1 - prefer,
        "discopop": (1 - share) * -prefer.log() + share * torch.exp(-(r_w - r_l)),
    }[name]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_is_its_papers_formula(name: str) -> None:
    p = pairs()
    loss = LOSSES[name](p, beta=BETA, label_smoothing=EPSILON)
    assert loss.shape == (64,)
    torch.testing.assert_close(loss, by_formula(name, p), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("far", [-5000.0, 5000.0])
def test_losses_and_gradients_stay_finite_far_from_the_reference(name: str, far: float) -> None:
    one = torch.ones(1, dtype=torch.float64)
    chosen, rejected = (far * one).requires_grad_(), (-far * one).requires_grad_()
    p = Comparisons(chosen, rejected, 0 * one, 0 * one, one, one)
    loss = LOSSES[name](p, beta=BETA, label_smoothing=EPSILON).sum()
    gradients = torch.autograd.grad(loss, (chosen, rejected), allow_unused=True)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)


def test_label_smoothing_outside_a_losses_range_is_an_error() -> None:
    for name, value in [("robust", 0.5), ("robust", -0.1), ("exo_pair", 0.0), ("exo_pair", 1.0)]:
        with pytest.raises(ValueError, match=f"{name}: expected .* label_smoothing .* got {value}"):
            LOSSES[name](pairs(), beta=BETA, label_smoothing=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sigmoid", math.log(2)), ("bco_pair", 2 * math.log(2)), ("apo_zero", 1.0), ("hinge", 1.0)],
)
def test_the_first_loss_is_known(name: str, value: float) -> None:
    assert loss_at_reference(make_loss([name], beta=0.1)) == pytest.approx(value, abs=1e-12)
