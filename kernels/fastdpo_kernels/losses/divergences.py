"""f-divergences in the place of DPO's reverse KL: Wang et al. 2023 (arXiv:2309.16240).

With u = π/π_ref, the reward is β·f′(u) in the place of β·log u. Everything here is a function of
log u, in nats, of any shape.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_LARGEST = 80.0  # whose exponential fp32 still holds
_NEAR_ONE = 1e-6


def forward_kl(logratios: Tensor) -> Tensor:
    """f′(u) = 1 − 1/u; a constant apart from the paper's −1/u."""
    return -torch.expm1(-logratios)


def js_divergence(logratios: Tensor) -> Tensor:
    """f′(u) = log(2u / (1 + u))."""
    return math.log(2) + logsigmoid(logratios)


def alpha_divergence(logratios: Tensor, alpha: float) -> Tensor:
    """f′(u) = (u^(α − 1) − 1) / (α − 1); log u in the limit of α = 1."""
    if abs(alpha - 1) < _NEAR_ONE:
        return logratios
    exponent = ((alpha - 1) * logratios).clamp(max=_LARGEST)
    return torch.expm1(exponent) / (alpha - 1)


DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def score_of(options: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """Take `f_divergence_type` and its coefficient out of a loss's options; None for the reverse
    KL, whose score is the log-ratio itself.
    """
    name = options.pop("f_divergence_type", "reverse_kl")
    alpha = options.pop("f_alpha_divergence_coef", 0.5)
    if name not in DIVERGENCES:
        known = ", ".join(DIVERGENCES)
        raise ValueError(f"f_divergence_type: expected one of {known}, got {name!r}")
    if name == "alpha_divergence":
        return partial(alpha_divergence, alpha=alpha)
    return {"forward_kl": forward_kl, "js_divergence": js_divergence}.get(name)
