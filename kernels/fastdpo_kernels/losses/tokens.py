"""Losses that look at every token: offline GRPO and its normalisers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .registry import register_loss
from .scored import Responses


def _token_losses(
    responses: Responses,
    beta: float,
    epsilon: float,
    epsilon_high: float | None,
    importance_sampling_level: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token (n,): its loss, its KL penalty, and 1 where the ratio is clipped, else 0.

    GRPO, Shao et al. 2024 (arXiv:2402.03300), eq. 3 and 4, with A = "advantage" of the response and
    the ratio ρ to the policy that sampled it, whose log-probability is "logp", or else the
    reference's: −min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A) + β·(π_ref/π − log(π_ref/π) − 1). A ratio
    of the sequence is the geometric mean over its tokens, GSPO's (Zheng et al. 2025,
    arXiv:2507.18071, eq. 7). "none": ρ is 1 with the gradient of log π, for responses that the very
    policy sampled, whose first step this is.
    """
    tokens = responses.tokens
    assert tokens is not None
    old = responses.given.get("logp")
    if importance_sampling_level == "none":
        log_ratios = tokens.logps - tokens.logps.detach()
    elif importance_sampling_level == "sequence":
        whole = responses.logps - (responses.ref_logps if old is None else old)
        log_ratios = (whole / responses.lengths.clamp(min=1))[tokens.units]
    elif old is None:
        log_ratios = tokens.logps - tokens.ref_logps
    else:
        raise ValueError('logps of whole responses need importance_sampling_level "sequence"')
    low = math.log1p(-epsilon) if epsilon < 1 else -math.inf
    high = math.log1p(epsilon if epsilon_high is None else epsilon_high)
    advantages = responses.given["advantage"][tokens.units]
    # The minimum of the two products, in logs, where a ratio that is clipped cannot overflow.
    is_good = advantages >= 0
    clipped = torch.where(is_good, log_ratios.clamp(max=high), log_ratios.clamp(min=low))
    gains = clipped.exp() * advantages
    kl = torch.zeros_like(log_ratios)
    if beta:
        away = tokens.ref_logps - tokens.logps
        kl = away.exp() - away - 1
    is_clipped = (clipped != log_ratios) & (advantages != 0)
    return beta * kl - gains, kl, is_clipped.to(kl.dtype)


def _metrics(
    responses: Responses,
    *,
    beta: float,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    importance_sampling_level: str = "token",
) -> dict[str, Tensor]:
    options = (beta, epsilon, epsilon_high, importance_sampling_level)
    _, kl, is_clipped = _token_losses(responses, *options)
    tokens, count = responses.tokens, len(responses.logps)
    assert tokens is not None
    lengths = responses.lengths.clamp(min=1)
    penalty = {"kl": tokens.sums(kl, count) / lengths} if beta else {}
    return penalty | {
        "rewards": responses.logps - responses.given.get("logp", responses.ref_logps),
        "logps": responses.logps,
        "clip_ratio/region_mean": tokens.sums(is_clipped, count) / lengths,
    }


def _register(name: str, equation: str, divisor: Callable[[Responses, float], Tensor]) -> None:
    def loss(
        responses: Responses,
        *,
        beta: float,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        importance_sampling_level: str = "token",
        max_completion_length: float = 1024,
    ) -> Tensor:
        options = (beta, epsilon, epsilon_high, importance_sampling_level)
        each, _, _ = _token_losses(responses, *options)
        assert responses.tokens is not None
        total = responses.tokens.sums(each, len(responses.logps))
        return total / divisor(responses, max_completion_length)

    loss.__name__, loss.__doc__ = name, equation
    register_loss(name, kind="tokens", columns=("advantage",), metrics=_metrics)(loss)


_register(
    "grpo",
    """GRPO, Shao et al. 2024 (arXiv:2402.03300), eq. 3: the mean over the response's tokens,

    Σ_t l_t / |y|, shape (U,); l as in `_token_losses`.
    """,
    lambda responses, _: responses.lengths.clamp(min=1),
)
_register(
    "bnpo",
    """GRPO (arXiv:2402.03300) with a mean over the batch's tokens, as TRL's bnpo:

    Σ_t l_t / (tokens of a response in the batch on average), shape (U,).
    """,
    lambda responses, _: responses.given["batch_tokens"],
)
_register(
    "dapo",
    """GRPO with a mean over the step's tokens, DAPO, Yu et al. 2025 (arXiv:2503.14476), eq. 8:

    Σ_t l_t / (tokens of a response in the step on average), shape (U,).
    """,
    lambda responses, _: responses.given["step_tokens"],
)
_register(
    "dr_grpo",
    """Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783), eq. 4: a sum over tokens, over a constant,

    Σ_t l_t / `max_completion_length`, shape (U,).
    """,
    lambda responses, length: torch.full_like(responses.lengths, length),
)
