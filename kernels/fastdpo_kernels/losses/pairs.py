"""Losses of comparisons with a reference: DPO and its variants."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .registry import register_loss
from .scored import Comparisons


@register_loss("sigmoid", divergences=True)
def sigmoid(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv:2305.18290), eq. 7, with the label smoothing ε of cDPO
    (Mitchell 2023):

    −(1 − ε)·log σ(β·margin) − ε·log σ(−β·margin), shape (C,).
    """
    return smoothed(beta * pairs.margins, label_smoothing)


@register_loss("spin")
def spin(pairs: Comparisons, *, beta: float) -> Tensor:
    """SPIN, Chen et al. 2024 (arXiv:2401.01335), eq. 4.7 with the logistic loss: DPO's, where the
    chosen response is the data's own and the rejected one was sampled from the policy:

    −log σ(β·margin), shape (C,); β is the paper's λ.
    """
    return -logsigmoid(beta * pairs.margins)


@register_loss("sigmoid_norm", divergences=True)
def sigmoid_norm(pairs: Comparisons, *, beta: float) -> Tensor:
    """DPO on log-ratios averaged over the response's tokens, the length-normalised DPO of Lambert
    et al. 2024 (arXiv:2411.15124), eq. 6:

    −log σ(β·(mean log-ratio of chosen − mean log-ratio of rejected)), shape (C,).
    """
    return -logsigmoid(beta * _average_margins(pairs))


def _average_margins(pairs: Comparisons) -> Tensor:
    chosen = pairs.chosen_scores / pairs.chosen_lengths.clamp(min=1)
    return chosen - pairs.rejected_scores / pairs.rejected_lengths.clamp(min=1)


@register_loss("ipo", divergences=True)
def ipo(pairs: Comparisons, *, beta: float) -> Tensor:
    """IPO, Azar et al. 2023 (arXiv:2310.12036), eq. 17, on log-ratios averaged over the response's
    tokens:

    (mean log-ratio of chosen − mean log-ratio of rejected − 1/(2β))², shape (C,); β is the paper's
    τ.
    """
    return (_average_margins(pairs) - 1 / (2 * beta)) ** 2


@register_loss("hinge", divergences=True)
def hinge(pairs: Comparisons, *, beta: float) -> Tensor:
    """SLiC-HF's hinge, Zhao et al. 2023 (arXiv:2305.10425), on DPO's rewards:

    max(0, 1 − β·margin), shape (C,).
    """
    return torch.relu(1 - beta * pairs.margins)


@register_loss("robust", divergences=True)
def robust(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024 (arXiv:2403.00409), eq. 12: unbiased when a share ε of
    labels is flipped:

    (−(1 − ε)·log σ(β·margin) + ε·log σ(−β·margin)) / (1 − 2ε), shape (C,); ε = `label_smoothing` <
    0.5.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"robust: expected 0 <= label_smoothing < 0.5, got {label_smoothing}")
    logits = beta * pairs.margins
    clean = -(1 - label_smoothing) * logsigmoid(logits)
    return (clean + label_smoothing * logsigmoid(-logits)) / (1 - 2 * label_smoothing)


@register_loss("exo_pair", divergences=True)
def exo_pair(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO, Ji et al. 2024 (arXiv:2402.00856), eq. 16: the reverse KL divergence of the policy's
    preference q = σ(β·margin) from labels of which a share ε is flipped:

    q·(log q − log(1 − ε)) + (1 − q)·(log(1 − q) − log ε), shape (C,); 0 < ε = `label_smoothing` <
    1, of which the paper recommends 1e-3.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"exo_pair: expected 0 < label_smoothing < 1, got {label_smoothing}")
    logits = beta * pairs.margins
    agree = logits.sigmoid() * (logsigmoid(logits) - math.log1p(-label_smoothing))
    return agree + (-logits).sigmoid() * (logsigmoid(-logits) - math.log(label_smoothing))


@register_loss("nca_pair")
def nca_pair(pairs: Comparisons, *, beta: float) -> Tensor:
    """NCA for pairs, Chen et al. 2024 (arXiv:2402.05369), on the rewards r = β·log-ratio:

    −log σ(r_w) − ½·log σ(−r_w) − ½·log σ(−r_l), shape (C,).
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


@register_loss("bco_pair")
def bco_pair(pairs: Comparisons, *, beta: float) -> Tensor:
    """BCO, Jung et al. 2024 (arXiv:2404.04656), without its running mean of the rewards r =
    β·log-ratio:

    −log σ(r_w) − log σ(−r_l), shape (C,).
    """
    return -logsigmoid(beta * pairs.chosen_logratios) - logsigmoid(-beta * pairs.rejected_logratios)


@register_loss("sppo_hard")
def sppo_hard(pairs: Comparisons, *, beta: float) -> Tensor:
    """SPPO, Wu et al. 2024 (arXiv:2405.00675), eq. 4.7 with winning probabilities of 1 and 0:

    (log-ratio_w − 1/(2β))² + (log-ratio_l + 1/(2β))², shape (C,); β is 1/η of the paper.
    """
    shift = 0.5 / beta
    return (pairs.chosen_logratios - shift) ** 2 + (pairs.rejected_logratios + shift) ** 2


@register_loss("apo_zero")
def apo_zero(pairs: Comparisons, *, beta: float) -> Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7, for chosen responses that are
    better than the model's own, on the rewards r = β·log-ratio:

    1 − σ(r_w) + σ(r_l), shape (C,).
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return (-chosen).sigmoid() + rejected.sigmoid()


@register_loss("apo_down")
def apo_down(pairs: Comparisons, *, beta: float) -> Tensor:
    """APO-down, D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8, for chosen responses that are
    worse than the model's own, on the rewards r = β·log-ratio:

    σ(r_w) + 1 − σ(r_w − r_l), shape (C,).
    """
    return (beta * pairs.chosen_logratios).sigmoid() + (-beta * pairs.margins).sigmoid()


@register_loss("discopop", divergences=True)
def discopop(pairs: Comparisons, *, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP's log-ratio modulated loss, Lu et al. 2024 (arXiv:2406.08414), eq. 5, on ρ =
    β·margin:

    −(1 − σ(ρ/τ))·log σ(ρ) + σ(ρ/τ)·exp(−ρ), shape (C,); τ is `discopop_tau`.
    """
    logits = beta * pairs.margins
    # σ(ρ/τ)·exp(−ρ) as one exponential: of the two factors one may be 0 and the other infinite.
    exponential = (logsigmoid(logits / discopop_tau) - logits).exp()
    return exponential - (-logits / discopop_tau).sigmoid() * logsigmoid(logits)


@register_loss("aot", kind="step")
def aot(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT for pairs, Melnyk et al. 2024 (arXiv:2406.05882), eq. 11: the policy's margins of the
    batch, sorted, against the reference's, sorted, each m = log π(y_w|x) − log π(y_l|x):

    −(1 − ε)·log σ(β·(m_(i) − m_ref,(i))) − ε·log σ(−β·(m_(i) − m_ref,(i))), shape (C,), where the
    comparison whose policy margin is m_(i) stands.
    """
    policy = pairs.chosen_logps - pairs.rejected_logps
    reference = pairs.ref_chosen_logps - pairs.ref_rejected_logps
    return smoothed(beta * (policy - _of_same_rank(reference, policy)), label_smoothing)


@register_loss("aot_unpaired", kind="step")
def aot_unpaired(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT without pairs, Melnyk et al. 2024 (arXiv:2406.05882), eq. 10: the chosen log-ratios of
    the batch, sorted, against the rejected ones, sorted:

    −(1 − ε)·log σ(β·(w_(i) − l_(i))) − ε·log σ(−β·(w_(i) − l_(i))), shape (C,), where the
    comparison whose chosen log-ratio is w_(i) stands.
    """
    chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    return smoothed(beta * (chosen - _of_same_rank(rejected, chosen)), label_smoothing)


def _of_same_rank(values: Tensor, beside: Tensor) -> Tensor:
    """The values (C,) in the order in which those `beside` them stand, so that a comparison's loss
    is its own, and its weight falls on it.
    """
    return values.sort().values[beside.argsort(stable=True).argsort()]


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """−log σ with a share of the labels the other way round."""
    agree = -(1 - label_smoothing) * logsigmoid(logits)
    return agree - label_smoothing * logsigmoid(-logits)
