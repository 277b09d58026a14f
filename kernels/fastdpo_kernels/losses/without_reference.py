"""Losses of comparisons that need no reference: CPO, SimPO, ORPO, and the likelihood itself."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .pairs import smoothed
from .registry import register_loss
from .scored import Comparisons

_SUREST = -1e-30  # nats a token; of an empty response, or where fp32 has p = 1, odds are infinite


@register_loss("sft", reference=False, divergences=True)
def sft(pairs: Comparisons) -> Tensor:
    """The negative log-likelihood of the chosen responses, RPO's regulariser (Pang et al. 2024,
    arXiv:2404.19733, eq. 1), a mean over the batch's tokens:

    −log π(y_w|x) / (tokens of a chosen response in the batch on average), shape (C,).
    """
    return pairs.chosen_nll


def _reward(averages_or_sums: Tensor, alpha: float) -> Tensor:
    """AlphaPO's reward, Gupta et al. 2025 (arXiv:2501.03884), eq. 7, of a log-probability:
    (1 − π^(−α)) / α, and log π for α = 0.
    """
    if alpha == 0:
        return averages_or_sums
    return -torch.expm1(-alpha * averages_or_sums) / alpha


def _rewards(
    pairs: Comparisons, averages: bool, beta: float, alpha: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rewards of both responses, and what TRL's CPO trainer reports of them."""
    chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
    if averages:
        chosen, rejected = pairs.chosen_averages, pairs.rejected_averages
    r_w, r_l = _reward(chosen, alpha), _reward(rejected, alpha)
    reported = {
        "rewards/chosen": beta * r_w,
        "rewards/rejected": beta * r_l,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    return r_w, r_l, reported


def _sum_metrics(
    pairs: Comparisons, *, beta: float, alpha: float = 0.0, cpo_alpha: float = 1.0
) -> dict[str, Tensor]:
    return _rewards(pairs, False, beta, alpha)[2] | _nll_metric(pairs, cpo_alpha)


def _average_metrics(
    pairs: Comparisons, *, beta: float, alpha: float = 0.0, cpo_alpha: float = 1.0
) -> dict[str, Tensor]:
    return _rewards(pairs, True, beta, alpha)[2] | _nll_metric(pairs, cpo_alpha)


def _nll_metric(pairs: Comparisons, cpo_alpha: float) -> dict[str, Tensor]:
    nll = pairs.chosen_nll
    return {"nll_loss": nll if cpo_alpha else torch.zeros_like(nll)}


def _with_nll(loss: Tensor, pairs: Comparisons, cpo_alpha: float) -> Tensor:
    return loss + cpo_alpha * pairs.chosen_nll if cpo_alpha else loss


@register_loss("cpo", reference=False, metrics=_sum_metrics)
def cpo(
    pairs: Comparisons,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    alpha: float = 0.0,
) -> Tensor:
    """CPO, Xu et al. 2024 (arXiv:2401.08417), eq. 3 and 5, on the summed log-probabilities r, with
    label smoothing ε and AlphaPO's α as TRL has them:

    −(1 − ε)·log σ(β·(r_w − r_l)) − ε·log σ(−β·(r_w − r_l)) + `cpo_alpha`·NLL_w, shape (C,).
    """
    r_w, r_l, _ = _rewards(pairs, False, beta, alpha)
    return _with_nll(smoothed(beta * (r_w - r_l), label_smoothing), pairs, cpo_alpha)


@register_loss("cpo_hinge", reference=False, metrics=_sum_metrics)
def cpo_hinge(
    pairs: Comparisons, *, beta: float, cpo_alpha: float = 1.0, alpha: float = 0.0
) -> Tensor:
    """CPO with SLiC-HF's hinge, Zhao et al. 2023 (arXiv:2305.10425), on the rewards of `cpo`:

    max(0, 1 − β·(r_w − r_l)) + `cpo_alpha`·NLL_w, shape (C,).
    """
    r_w, r_l, _ = _rewards(pairs, False, beta, alpha)
    return _with_nll(torch.relu(1 - beta * (r_w - r_l)), pairs, cpo_alpha)


@register_loss("cpo_ipo", reference=False, metrics=_average_metrics)
def cpo_ipo(
    pairs: Comparisons, *, beta: float, cpo_alpha: float = 1.0, alpha: float = 0.0
) -> Tensor:
    """CPO with IPO's square, Azar et al. 2023 (arXiv:2310.12036), eq. 17, on log-probabilities r
    averaged over the response's tokens:

    (r_w − r_l − 1/(2β))² + `cpo_alpha`·NLL_w, shape (C,).
    """
    r_w, r_l, _ = _rewards(pairs, True, beta, alpha)
    return _with_nll((r_w - r_l - 1 / (2 * beta)) ** 2, pairs, cpo_alpha)


@register_loss("simpo", reference=False, metrics=_average_metrics)
def simpo(
    pairs: Comparisons,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
    alpha: float = 0.0,
) -> Tensor:
    """SimPO, Meng et al. 2024 (arXiv:2405.14734), eq. 6, on log-probabilities r averaged over the
    response's tokens, with the target margin γ = `simpo_gamma`:

    −(1 − ε)·log σ(h) − ε·log σ(−h) + `cpo_alpha`·NLL_w with h = β·(r_w − r_l) − γ, shape (C,); the
    paper's loss has `cpo_alpha` 0, and AlphaPO's an α of its own.
    """
    r_w, r_l, _ = _rewards(pairs, True, beta, alpha)
    logits = beta * (r_w - r_l) - simpo_gamma
    return _with_nll(smoothed(logits, label_smoothing), pairs, cpo_alpha)


def _log_odds(averages: Tensor) -> Tensor:
    """log(p / (1 − p)) of p = exp(averages); near p = 1 without cancellation, and finite there."""
    averages = averages.clamp(max=_SUREST)
    near_one = averages > -0.693
    small = torch.where(near_one, averages, -0.693)
    large = torch.where(near_one, -0.693, averages)
    rest = torch.where(near_one, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
    return averages - rest


def _orpo_metrics(pairs: Comparisons, *, beta: float) -> dict[str, Tensor]:
    log_odds = _log_odds(pairs.chosen_averages) - _log_odds(pairs.rejected_averages)
    reported = _rewards(pairs, True, beta, 0.0)[2]
    return reported | {
        "nll_loss": pairs.sequence_nll,
        "log_odds_ratio": logsigmoid(log_odds),
        "log_odds_chosen": log_odds,
    }


@register_loss("orpo", reference=False, prompt=True, metrics=_orpo_metrics)
def orpo(pairs: Comparisons, *, beta: float) -> Tensor:
    """ORPO, Hong et al. 2024 (arXiv:2403.07691), eq. 6 and 7, with the odds p / (1 − p) of the
    geometric mean p of a response's token probabilities:

    NLL(x, y_w) − β·log σ(log odds_w − log odds_l), shape (C,); β is the paper's λ, and as in TRL
    the likelihood is that of the prompt and the chosen response.
    """
    log_odds = _log_odds(pairs.chosen_averages) - _log_odds(pairs.rejected_averages)
    return pairs.sequence_nll - beta * logsigmoid(log_odds)
