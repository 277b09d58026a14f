"""The loss of a comparison, as a pure function of a handful of log-probabilities.

A loss sees no model and no tokens: only, for each comparison, the log-probability that the policy
and the reference give to the chosen and to the rejected response. Its gradient comes from autograd
on those few scalars, and the head turns that gradient into the gradient of its weights.

To add a loss, write a function of `Comparisons` that returns one value per comparison and register
it:

    @register_loss("my_loss")
    def my_loss(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
        return torch.relu(1 - beta * pairs.margins)

It is then a valid `loss_type` of the trainer and of `linear_dpo_loss`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Comparisons:
    """What a loss may depend on. Every field has shape (C,), one entry per comparison, fp32 or
    fp64.

    `*_logps` are summed over the response's tokens, in nats; `*_lengths` count the response's
    tokens.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def chosen_logratios(self) -> Tensor:
        """log π(y_w|x) − log π_ref(y_w|x), shape (C,)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log π(y_l|x) − log π_ref(y_l|x), shape (C,)."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def margins(self) -> Tensor:
        """Difference of the two log-ratios, shape (C,); times β it is the reward margin."""
        return self.chosen_logratios - self.rejected_logratios


LossFunction = Callable[..., Tensor]
LOSSES: dict[str, LossFunction] = {}


def register_loss(name: str) -> Callable[[LossFunction], LossFunction]:
    """Make a function `(Comparisons, *, beta, label_smoothing) -> (C,)` available as
    `loss_type=name`.
    """

    def add(function: LossFunction) -> LossFunction:
        if name in LOSSES:
            raise ValueError(f"a loss named {name!r} is registered already")
        LOSSES[name] = function
        return function

    return add


def get_loss(name: str) -> LossFunction:
    """Look up a registered loss; an unknown name is a `ValueError` that lists the known ones."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss_type {name!r}; known: {', '.join(sorted(LOSSES))}")
    return LOSSES[name]


@dataclass(frozen=True)
class Loss:
    """The loss of a comparison, a function from `Comparisons` to (C,).

    `name` is None for one that is not registered; a kernel that knows the name may compute it from
    `beta` and `label_smoothing`.
    """

    function: Callable[[Comparisons], Tensor]
    name: str | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(self, pairs: Comparisons) -> Tensor:
        loss, expected = self.function(pairs), pairs.chosen_logps.shape
        if loss.shape != expected:  # which weights would be broadcast to
            subject = "loss_function" if self.name is None else f"loss {self.name!r}"
            raise ValueError(
                f"{subject}: expected a function that returns {tuple(expected)}, one loss a "
                f"comparison, got {tuple(loss.shape)}"
            )
        return loss

    @staticmethod
    def named(name: str, *, beta: float, label_smoothing: float) -> "Loss":
        """A registered loss; `ValueError` as `get_loss`."""
        function = partial(get_loss(name), beta=beta, label_smoothing=label_smoothing)
        return Loss(function, name, beta, label_smoothing)


@register_loss("sigmoid")
def sigmoid(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv:2305.18290), eq. 7, with the label smoothing ε of cDPO
    (Mitchell 2023):

    −(1 − ε)·log σ(β·margin) − ε·log σ(−β·margin), shape (C,).
    """
    logits = beta * pairs.margins
    if label_smoothing == 0.0:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


@register_loss("ipo")
def ipo(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """IPO, Azar et al. 2023 (arXiv:2310.12036), eq. 17, on log-ratios averaged over the response's
    tokens:

    (mean log-ratio of chosen − mean log-ratio of rejected − 1/(2β))², shape (C,); β is the paper's
    τ.
    """
    chosen = pairs.chosen_logratios / pairs.chosen_lengths.clamp(min=1)
    rejected = pairs.rejected_logratios / pairs.rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@register_loss("hinge")
def hinge(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """SLiC-HF's hinge, Zhao et al. 2023 (arXiv:2305.10425), on DPO's rewards:

    max(0, 1 − β·margin), shape (C,).
    """
    return torch.relu(1 - beta * pairs.margins)


@register_loss("robust")
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


@register_loss("exo_pair")
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
def nca_pair(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """NCA for pairs, Chen et al. 2024 (arXiv:2402.05369), on the rewards r = β·log-ratio:

    −log σ(r_w) − ½·log σ(−r_w) − ½·log σ(−r_l), shape (C,).
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


@register_loss("bco_pair")
def bco_pair(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """BCO, Jung et al. 2024 (arXiv:2404.04656), without its running mean of the rewards r =
    β·log-ratio:

    −log σ(r_w) − log σ(−r_l), shape (C,).
    """
    return -logsigmoid(beta * pairs.chosen_logratios) - logsigmoid(-beta * pairs.rejected_logratios)


@register_loss("sppo_hard")
def sppo_hard(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """SPPO, Wu et al. 2024 (arXiv:2405.00675), eq. 4.7 with winning probabilities of 1 and 0:

    (log-ratio_w − 1/(2β))² + (log-ratio_l + 1/(2β))², shape (C,); β is 1/η of the paper.
    """
    shift = 0.5 / beta
    return (pairs.chosen_logratios - shift) ** 2 + (pairs.rejected_logratios + shift) ** 2


@register_loss("apo_zero")
def apo_zero(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7, for chosen responses that are
    better than the model's own, on the rewards r = β·log-ratio:

    1 − σ(r_w) + σ(r_l), shape (C,).
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return (-chosen).sigmoid() + rejected.sigmoid()


@register_loss("apo_down")
def apo_down(pairs: Comparisons, *, beta: float, label_smoothing: float) -> Tensor:
    """APO-down, D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8, for chosen responses that are
    worse than the model's own, on the rewards r = β·log-ratio:

    σ(r_w) + 1 − σ(r_w − r_l), shape (C,).
    """
    return (beta * pairs.chosen_logratios).sigmoid() + (-beta * pairs.margins).sigmoid()


@register_loss("discopop")
def discopop(
    pairs: Comparisons, *, beta: float, label_smoothing: float, tau: float = 0.05
) -> Tensor:
    """DiscoPOP's log-ratio modulated loss, Lu et al. 2024 (arXiv:2406.08414), eq. 5, on ρ =
    β·margin:

    −(1 − σ(ρ/τ))·log σ(ρ) + σ(ρ/τ)·exp(−ρ), shape (C,).
    """
    logits = beta * pairs.margins
    # σ(ρ/τ)·exp(−ρ) as one exponential: of the two factors one may be 0 and the other infinite.
    exponential = (logsigmoid(logits / tau) - logits).exp()
    return exponential - (-logits / tau).sigmoid() * logsigmoid(logits)
