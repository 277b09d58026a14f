"""Every registered loss against its paper's formula, written with probabilities in fp64."""

import inspect
import itertools
import math
from dataclasses import replace

import pytest
import torch
from fastdpo_kernels import LOSSES, Comparisons, Responses
from fastdpo_kernels.losses import Loss
from loss_samples import (
    BETA,
    EPSILON,
    OF_PAIRS,
    OF_RESPONSES,
    OF_TOKENS,
    OPTIONS,
    TAU,
    pairs,
    random,
    responses,
    tokens,
)
from torch import Tensor

from fastdpo.config.losses import WITH_DIVERGENCE
from fastdpo.losses import make_loss


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def by_formula(name: str, p: Comparisons) -> Tensor:
    """The loss from ratios of probabilities: w and l of the policy over the reference."""
    if not LOSSES[name].reference:
        return without_reference(name, p)
    w = torch.exp(p.chosen_logps) / torch.exp(p.ref_chosen_logps)
    l = torch.exp(p.rejected_logps) / torch.exp(p.ref_rejected_logps)  # noqa: E741
    prefer = w**BETA / (w**BETA + l**BETA)
    r_w, r_l = BETA * w.log(), BETA * l.log()
    per_token = w.log() / p.chosen_lengths - l.log() / p.rejected_lengths
    share = sigma((r_w - r_l) / TAU)
    rank = torch.exp(p.chosen_logps) / torch.exp(p.rejected_logps)
    ref_rank = torch.exp(p.ref_chosen_logps) / torch.exp(p.ref_rejected_logps)
    matched, unpaired = torch.empty_like(w), torch.empty_like(w)
    matched[rank.argsort()] = sigma(BETA * (rank.sort()[0] / ref_rank.sort()[0]).log())
    unpaired[w.argsort()] = sigma(BETA * (w.sort()[0] / l.sort()[0]).log())
    return {
        "sigmoid": -(1 - EPSILON) * prefer.log() - EPSILON * (1 - prefer).log(),
        "spin": -prefer.log(),
        "sigmoid_norm": -sigma(BETA * per_token).log(),
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
        "aot": -(1 - EPSILON) * matched.log() - EPSILON * (1 - matched).log(),
        "aot_unpaired": -(1 - EPSILON) * unpaired.log() - EPSILON * (1 - unpaired).log(),
    }[name]


def without_reference(name: str, p: Comparisons) -> Tensor:
    """The same for losses of the policy's probabilities alone, sums and geometric means."""
    nll = -torch.exp(p.chosen_logps).log() / 17.5
    sums = [torch.exp(logps) for logps in (p.chosen_logps, p.rejected_logps)]
    means = [sums[0] ** (1 / p.chosen_lengths), sums[1] ** (1 / p.rejected_lengths)]
    gap, mean_gap = ((a**-0.25 - b**-0.25) / -0.25 for a, b in (sums, means))
    odds = [mean / (1 - mean) for mean in means]
    joint = torch.exp(p.prompt_logps) * sums[0]
    prefer = sigma(BETA * gap)
    margin = sigma(BETA * mean_gap - 0.4)
    return {
        "sft": nll,
        "cpo": -(1 - EPSILON) * prefer.log() - EPSILON * sigma(-BETA * gap).log() + 0.7 * nll,
        "cpo_hinge": (1 - BETA * gap).clamp(min=0) + 0.7 * nll,
        "cpo_ipo": (mean_gap - 1 / (2 * BETA)) ** 2 + 0.7 * nll,
        "simpo": -(1 - EPSILON) * margin.log() - EPSILON * (1 - margin).log() + 0.7 * nll,
        "orpo": -joint.log() / 26 - BETA * (odds[0] / odds[1] / (1 + odds[0] / odds[1])).log(),
    }[name]


def test_every_registered_loss_has_its_formula_here() -> None:
    assert {*OF_PAIRS, *OF_RESPONSES, *OF_TOKENS, "listwise"} == set(LOSSES)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_loss_of_pairs_is_its_papers_formula(name: str) -> None:
    p = pairs()
    if not LOSSES[name].reference:  # AlphaPO's powers would be as good as infinite
        p = replace(p, chosen_logps=p.chosen_logps / 10, rejected_logps=p.rejected_logps / 10)
    loss = LOSSES[name](p, **OPTIONS)
    assert loss.shape == (64,)
    torch.testing.assert_close(loss, by_formula(name, p), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OF_RESPONSES)
def test_a_loss_of_responses_is_its_papers_formula(name: str) -> None:
    r = responses()
    ratio = torch.exp(r.logps) / torch.exp(r.ref_logps)
    reward, good = ratio.log() * BETA, r.given["label"] == 1
    value = sigma(reward - BETA * 1.7)
    expected = {
        "kto": torch.where(good, 0.8 * (1 - value), 1.3 * (1 - sigma(BETA * 1.7 - reward))),
        "apo_zero_unpaired": torch.where(good, 0.8 * (1 - sigma(reward)), 1.3 * sigma(reward)),
        "bco": torch.where(
            good, -0.8 * sigma(reward + 0.3).log(), -1.3 * sigma(-0.3 - reward).log()
        ),
        "sppo": (ratio.log() - (r.given["win_rate"] - 0.5) / BETA) ** 2,
    }[name]
    torch.testing.assert_close(LOSSES[name](r, **OPTIONS), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cpo", "cpo_hinge", "cpo_ipo", "simpo"])
def test_alphapos_rewards_are_log_probabilities_in_the_limit(name: str) -> None:
    p = pairs()
    for cpo_alpha in (0.0, 0.7):
        options = OPTIONS | {"cpo_alpha": cpo_alpha}
        limit, near = (LOSSES[name](p, **options | {"alpha": alpha}) for alpha in (0.0, 1e-9))
        torch.testing.assert_close(limit, near, rtol=1e-5, atol=1e-5)
        gap = p.chosen_logps - p.rejected_logps
        if name in ("cpo_ipo", "simpo"):
            gap = p.chosen_logps / p.chosen_lengths - p.rejected_logps / p.rejected_lengths
        margin = sigma(BETA * gap - (0.4 if name == "simpo" else 0))
        expected = -(1 - EPSILON) * margin.log() - EPSILON * (1 - margin).log()
        if name == "cpo_hinge":
            expected = (1 - BETA * gap).clamp(min=0)
        if name == "cpo_ipo":
            expected = (gap - 1 / (2 * BETA)) ** 2
        expected = expected - cpo_alpha * p.chosen_logps / 17.5
        torch.testing.assert_close(limit, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_a_sorted_loss_is_that_of_the_comparison_it_stands_at(name: str) -> None:
    """So that the gradient of one comparison's loss with respect to its own policy is all of it."""
    p = pairs()
    chosen = p.chosen_logps.requires_grad_()
    loss = LOSSES[name](replace(p, chosen_logps=chosen), **OPTIONS)
    weights = torch.linspace(0.1, 1, len(loss), dtype=torch.float64)
    (each,) = torch.autograd.grad(loss.sum(), chosen, retain_graph=True)
    (weighted,) = torch.autograd.grad((weights * loss).sum(), chosen)
    torch.testing.assert_close(weighted, weights * each)


def test_ktos_estimate_and_bcos_shift_of_a_batch() -> None:
    r = responses()
    mean = (torch.exp(r.logps) / torch.exp(r.ref_logps)).log().mean()
    (kl,) = LOSSES["kto"].batch_terms(r, **OPTIONS).values()
    (delta,) = LOSSES["bco"].batch_terms(r, **OPTIONS).values()
    assert kl.item() == pytest.approx(max(0.0, mean.item()))
    assert delta.item() == pytest.approx(BETA * mean.item())
    below = replace(r, logps=r.ref_logps - 1)
    assert LOSSES["kto"].batch_terms(below)["kl"] == 0


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("level", ["token", "sequence", "sampled"])
def test_grpo_is_its_papers_formula(name: str, level: str) -> None:
    r = tokens()
    assert r.tokens is not None
    given, old = dict(r.given), r.ref_logps
    if level == "sampled":
        given["logp"] = old = r.ref_logps - 0.2
    expected = []
    for unit in range(len(r.logps)):
        here = r.tokens.units == unit
        p, ref, size = r.tokens.logps[here].exp(), r.tokens.ref_logps[here].exp(), here.sum()
        ratio = p / ref
        if level != "token":
            ratio = (p.prod() / torch.exp(old[unit])) ** (1 / float(size)) * torch.ones(
                int(size), dtype=torch.float64
            )
        advantage = r.given["advantage"][unit]
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
        total = (BETA * (ref / p - (ref / p).log() - 1) - gain).sum()
        over = {"grpo": size, "bnpo": 4.5, "dapo": 5.5, "dr_grpo": 40}[name]
        expected.append(total / over)
    how = "token" if level == "token" else "sequence"
    loss = LOSSES[name](replace(r, given=given), **OPTIONS, importance_sampling_level=how)
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_grpo_without_a_ratio_is_that_of_a_reference_that_is_the_policy(name):
    r = tokens()
    found = []
    for level in ("none", "token"):
        logps = r.tokens.logps.detach().clone().requires_grad_()
        held = replace(r.tokens, logps=logps)
        if level == "token":
            held = replace(held, reference=logps.detach())
        seen = replace(r, tokens=held)
        loss = LOSSES[name](seen, **OPTIONS | {"beta": 0.0}, importance_sampling_level=level)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), logps)))
    torch.testing.assert_close(*found)
    assert found[0][1].abs().max() > 0


def test_grpo_wants_the_ratio_of_sequences_where_sums_are_given() -> None:
    r = tokens()
    with pytest.raises(ValueError, match='need importance_sampling_level "sequence"'):
        LOSSES["grpo"](replace(r, given={**r.given, "logp": r.ref_logps}), **OPTIONS)


def test_listwise_is_the_likelihood_of_a_ranking() -> None:
    g = random(3)
    logps, ref = (-40 + 8 * torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in "ab")
    rank = torch.tensor([[2, 0, 3, 1], [1, 2, 0, 0], [0, 1, 1, 2]])
    members = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4])
    groups = Responses(logps, ref, torch.ones(3, 4), {"rank": rank.double()}, members)
    loss = LOSSES["listwise"](groups, beta=BETA)
    odds = (torch.exp(logps) / torch.exp(ref)) ** BETA
    for line, (weights, ranks) in enumerate(zip(odds[:2], ([2, 0, 3, 1], [1, 2, 0]), strict=True)):
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        chances = [weights[order[k]] / weights[order[k:]].sum() for k in range(len(order))]
        assert loss[line].item() == pytest.approx(-math.log(math.prod(chances)), rel=1e-9)
    # Of two that are equal, each is compared with what is worse, and not with the other.
    a, b, c, d = odds[2]
    tie = a / (a + b + c + d) * (b / (b + d)) * (c / (c + d))
    assert loss[2].item() == pytest.approx(-tie.log().item(), rel=1e-9)
    every = [
        LOSSES["listwise"](
            replace(groups, given={"rank": torch.tensor([order] * 3).double()}), beta=1
        )
        for order in itertools.permutations(range(4))
    ]
    assert torch.stack(every)[:, 0].neg().exp().sum().item() == pytest.approx(1, rel=1e-9)


DIVERGENCES = {
    "forward_kl": lambda u: 1 - 1 / u,
    "js_divergence": lambda u: (2 * u / (1 + u)).log(),
    "alpha_divergence": lambda u: (u ** (0.7 - 1) - 1) / (0.7 - 1),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", WITH_DIVERGENCE)
def test_an_f_divergence_is_its_derivative_in_place_of_the_log_ratio(name, divergence) -> None:
    p = pairs(spread=0.7)
    options = {"f_divergence_type": divergence, "f_alpha_divergence_coef": 0.7}
    loss = Loss.named(name, beta=BETA, label_smoothing=EPSILON, **options)
    score = DIVERGENCES[divergence]
    zero = torch.zeros_like(p.chosen_logps)
    same = replace(
        p,
        chosen_logps=score(torch.exp(p.chosen_logps) / torch.exp(p.ref_chosen_logps)),
        rejected_logps=score(torch.exp(p.rejected_logps) / torch.exp(p.ref_rejected_logps)),
        ref_chosen_logps=zero,
        ref_rejected_logps=zero,
    )
    expected = by_formula(name, p if name == "sft" else same)  # a likelihood has no reference
    torch.testing.assert_close(loss(p), expected, rtol=1e-9, atol=1e-9)


def test_the_reverse_kl_and_its_limit_are_the_log_ratio() -> None:
    p = pairs()
    plain = Loss.named("sigmoid", beta=BETA)
    for options in ({"f_divergence_type": "reverse_kl"}, {"f_divergence_type": "alpha_divergence"}):
        loss = Loss.named("sigmoid", beta=BETA, f_alpha_divergence_coef=1.0, **options)
        torch.testing.assert_close(loss(p), plain(p))
    with pytest.raises(ValueError, match=r"f_divergence_type: expected one of reverse_kl, .* 'kl'"):
        Loss.named("sigmoid", beta=BETA, f_divergence_type="kl")


def test_options_of_other_losses_are_refused() -> None:
    """The configuration knows the same losses without importing them."""
    known = {name for name, loss in LOSSES.items() if loss.divergences}
    assert known == set(WITH_DIVERGENCE)
    with pytest.raises(ValueError, match=r"f_divergence_type: nca_pair has reverse_kl only; disco"):
        Loss.named("nca_pair", beta=BETA, f_divergence_type="js_divergence")
    for option in ({"ld_alpha": 0.5}, {"use_weighting": True}):
        with pytest.raises(ValueError, match=rf"{next(iter(option))}: of losses of comp.*got kto"):
            Loss.named("kto", beta=BETA, **option)
    Loss.named("kto", beta=BETA, ld_alpha=None, use_weighting=False, f_divergence_type="reverse_kl")


def test_label_smoothing_outside_a_losses_range_is_an_error() -> None:
    for name, value in [("robust", 0.5), ("robust", -0.1), ("exo_pair", 0.0), ("exo_pair", 1.0)]:
        with pytest.raises(ValueError, match=f"{name}: expected .* label_smoothing .* got {value}"):
            LOSSES[name](pairs(), beta=BETA, label_smoothing=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sigmoid", math.log(2)), ("bco_pair", 2 * math.log(2)), ("apo_zero", 1.0), ("hinge", 1.0)],
)
def test_the_first_loss_is_known(name: str, value: float) -> None:
    assert make_loss([name], beta=0.1).at_reference() == pytest.approx(value, abs=1e-12)


def test_the_first_loss_is_unknown_without_a_reference() -> None:
    assert all(make_loss([n], beta=0.1).at_reference() is None for n in ("orpo", "sft", "kto"))


def test_every_loss_names_its_equation_and_its_paper() -> None:
    assert all(loss.equation and loss.paper for loss in LOSSES.values())


DEFAULTS = {
    "discopop_tau": 0.05,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "importance_sampling_level": "token",
    "max_completion_length": 1024,
    "label_smoothing": 0.0,
    "cpo_alpha": 1.0,
    "alpha": 0.0,
    "simpo_gamma": 0.5,
}


@pytest.mark.parametrize("name", LOSSES)
def test_options_that_are_left_out_have_these_values(name):
    loss = LOSSES[name]
    for function in filter(None, (loss.function, loss.terms, loss.metrics)):
        for option in inspect.signature(function).parameters.values():
            if option.default is not option.empty:
                assert option.default == DEFAULTS[option.name], (function, option.name)


@pytest.mark.parametrize(("name", "averaged"), [("cpo", False), ("simpo", True)])
def test_what_is_reported_without_a_reference(name, averaged):
    found, p, alpha = LOSSES[name].measure(pairs(), **OPTIONS), pairs(), OPTIONS["alpha"]
    for side in ("chosen", "rejected"):
        logps = getattr(p, f"{side}_averages" if averaged else f"{side}_logps")
        rewards = BETA * (1 - torch.exp(logps) ** -alpha) / alpha
        torch.testing.assert_close(found[f"rewards/{side}"], rewards)
        torch.testing.assert_close(found[f"logps/{side}"], logps)
