"""Losses of single responses that are labelled or scored, and of whole groups of them."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .registry import register_loss
from .scored import Responses


def _by_label(responses: Responses, good: Tensor, bad: Tensor) -> Tensor:
    """`good` of desirable responses, `bad` of the others, (U,)."""
    return torch.where(responses.given["label"] > 0, good, bad)


def _mean_log_ratio(mismatched: Responses) -> dict[str, Tensor]:
    """KTO's estimate z = max(0, mean log-ratio of mismatched pairs), section 4.1 of the paper."""
    return {"kl": mismatched.logratios.mean().clamp(min=0)}


@register_loss("kto", kind="response", columns=("label",), terms=_mean_log_ratio, mismatched=True)
def kto(
    responses: Responses,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 7, on the reward r = β·log-ratio, with
    "kl" of the batch as z, without gradient:

    λ_D·(1 − σ(r − β·z)) for a desirable response, λ_U·(1 − σ(β·z − r)) for an undesirable one,
    shape (U,).
    """
    gap = beta * (responses.logratios - responses.given["kl"])
    good, bad = desirable_weight * (-gap).sigmoid(), undesirable_weight * gap.sigmoid()
    return _by_label(responses, good, bad)


@register_loss("apo_zero_unpaired", kind="response", columns=("label",))
def apo_zero_unpaired(
    responses: Responses,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero for labels, D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7 one response at a
    time, on the reward r = β·log-ratio:

    λ_D·(1 − σ(r)) for a desirable response, λ_U·σ(r) for an undesirable one, shape (U,).
    """
    rewards = beta * responses.logratios
    good, bad = desirable_weight * (-rewards).sigmoid(), undesirable_weight * rewards.sigmoid()
    return _by_label(responses, good, bad)


def _mean_reward(responses: Responses, *, beta: float) -> dict[str, Tensor]:
    """The mean reward of a batch, of which BCO's shift δ is the running mean."""
    return {"delta": (beta * responses.logratios).mean()}


@register_loss("bco", kind="response", columns=("label",), terms=_mean_reward, running=("delta",))
def bco(
    responses: Responses,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """BCO, Jung et al. 2024 (arXiv:2404.04656), eq. 9, on the reward r = β·log-ratio, with δ =
    "delta", the running mean of the rewards up to this batch, without gradient:

    −λ_D·log σ(r − δ) for a desirable response, −λ_U·log σ(δ − r) for an undesirable one, (U,).
    """
    gap = beta * responses.logratios - responses.given["delta"]
    good, bad = -desirable_weight * logsigmoid(gap), -undesirable_weight * logsigmoid(-gap)
    return _by_label(responses, good, bad)


@register_loss("sppo", kind="response", columns=("win_rate",))
def sppo(responses: Responses, *, beta: float) -> Tensor:
    """SPPO, Wu et al. 2024 (arXiv:2405.00675), eq. 4.6, with P = "win_rate", the share of the
    group's responses that this one is better than, where a tie, as with itself, is one half:

    (log-ratio − (P − ½)/β)², shape (U,); β is 1/η of the paper.
    """
    return (responses.logratios - (responses.given["win_rate"] - 0.5) / beta) ** 2


@register_loss("listwise", kind="group", columns=("rank",))
def listwise(groups: Responses, *, beta: float) -> Tensor:
    """DPO under the Plackett-Luce model, Rafailov et al. 2023 (arXiv:2305.18290), eq. 20, on the
    rewards r = β·log-ratio of a group's responses, of which "rank" orders them, 0 the best:

    −Σ_k log(exp r_k / (exp r_k + Σ_{j ranked below k} exp r_j)), shape (U,). Equal ranks say
    nothing of each other; without any this is the paper's loss.
    """
    assert groups.members is not None
    rewards, rank = beta * groups.logratios, groups.given["rank"]
    below = (rank.unsqueeze(1) > rank.unsqueeze(2)) & groups.members.unsqueeze(1)
    itself = torch.eye(rank.shape[1], dtype=torch.bool, device=rank.device)
    rivals = rewards.unsqueeze(1).masked_fill(~(below | itself), -torch.inf)
    lost = rivals.logsumexp(2) - rewards
    return lost.masked_fill(~groups.members, 0).sum(1)
