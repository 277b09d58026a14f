"""Losses and gradients are finite far from the reference, wherever their formula is."""

import itertools
from dataclasses import replace

import pytest
import torch
from fastdpo_kernels import LOSSES, Comparisons
from fastdpo_kernels.losses import Loss
from loss_samples import (
    BETA,
    EPSILON,
    OF_PAIRS,
    OF_RESPONSES,
    OF_TOKENS,
    OPTIONS,
    responses,
    tokens,
)

from fastdpo.config.losses import WITH_DIVERGENCE


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("advantage", "far"), [(1.0, 5000.0), (1.0, -5000.0), (-1.0, -5000.0)])
@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_clipped_ratio_stays_finite_far_away(name, advantage, far, level) -> None:
    """Infinite by definition are the ratio of a bad response that has become more probable by so
    much, and the penalty of one that has become less.
    """
    r = tokens()
    assert r.tokens is not None
    logps = (r.tokens.ref_logps + far).requires_grad_()
    each = replace(r.tokens, logps=logps)
    given = {**r.given, "advantage": torch.full_like(r.logps, advantage)}
    seen = replace(r, logps=each.sums(logps, len(r.logps)), tokens=each, given=given)
    how = OPTIONS | {"beta": BETA if far > 0 else 0.0, "importance_sampling_level": level}
    loss = LOSSES[name](seen, **how)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("far", [-5000.0, 5000.0])
def test_losses_and_gradients_stay_finite_far_from_the_reference(name: str, far: float) -> None:
    """AlphaPO's rewards are the one exception: of a probability of exp(−5000) they are infinite."""
    one = torch.ones(1, dtype=torch.float64)
    free = not LOSSES[name].reference
    high = -1e-3 * one if free else abs(far) * one  # no log-probability is above 0
    low = -5000 * one
    ends = (high, low) if far > 0 else (low, high)
    chosen, rejected = (value.clone().requires_grad_() for value in ends)
    given = {"batch_chosen_tokens": one, "batch_sequence_tokens": one}
    p = Comparisons(chosen, rejected, 0 * one, 0 * one, one, one, given, prompt_logps=-one)
    loss = LOSSES[name](p, beta=BETA, label_smoothing=EPSILON).sum()
    gradients = torch.autograd.grad(loss, (chosen, rejected), allow_unused=True)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)


@pytest.mark.parametrize("certain", ["chosen", "rejected", "both"])
def test_orpo_is_finite_where_a_response_is_certain(certain: str) -> None:
    """Where fp32 has a probability of 1, or a response has no token, odds would be infinite."""
    one = torch.ones(1, dtype=torch.float64)
    chosen, rejected = (
        (0.0 * one if certain in (name, "both") else -one).requires_grad_()
        for name in ("chosen", "rejected")
    )
    given = {"batch_sequence_tokens": one}
    p = Comparisons(chosen, rejected, 0 * one, 0 * one, one, one, given, prompt_logps=-one)
    loss = LOSSES["orpo"](p, beta=BETA).sum()
    assert loss.isfinite()
    assert all(g.isfinite() for g in torch.autograd.grad(loss, (chosen, rejected)))


FINITE = [
    case
    for case in itertools.product(
        WITH_DIVERGENCE, ["js_divergence", "alpha_divergence"], [-5000.0, 5000.0]
    )
    if case != ("discopop", "alpha_divergence", -5000.0)
]


@pytest.mark.parametrize(("name", "divergence", "far"), FINITE)
def test_divergences_stay_finite_far_from_the_reference(name, divergence, far) -> None:
    """The forward KL's −1/u is infinite for a response that has become so improbable, and so is
    DiscoPOP's exponential of what the alpha divergence makes of it.
    """
    one = torch.ones(1, dtype=torch.float64)
    chosen, rejected = (far * one).requires_grad_(), (-far * one).requires_grad_()
    given = {"batch_chosen_tokens": one}
    p = Comparisons(chosen, rejected, 0 * one, 0 * one, one, one, given)
    options = {"label_smoothing": EPSILON, "f_divergence_type": divergence}
    loss = Loss.named(name, beta=BETA, **options)(p).sum()
    gradients = torch.autograd.grad(loss, (chosen, rejected), allow_unused=True)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients if g is not None)


@pytest.mark.parametrize("name", OF_RESPONSES)
@pytest.mark.parametrize("far", [-5000.0, 5000.0])
def test_losses_of_responses_stay_finite_far_from_the_reference(name: str, far: float) -> None:
    r = responses(2)
    logps = torch.full((2,), far, dtype=torch.float64, requires_grad=True)
    given = {**r.given, "label": torch.tensor([0.0, 1.0])}
    loss = LOSSES[name](replace(r, logps=logps, given=given), **OPTIONS).sum()
    (gradient,) = torch.autograd.grad(loss, logps)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
