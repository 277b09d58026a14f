"""The naive way, which is the specification: every operation in plain PyTorch, in any dtype up to
fp64.

Nothing here is chunked or fused, so the whole (T, V) logits exist. Tests compare every other path
with this one.
"""

import torch
from torch import Tensor

from .problem import Problem


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """z = cap·tanh(scale·(x·Wᵀ + b) / cap) / temperature, shape (..., V); no tanh when `softcap` is
    None.
    """
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def token_stats(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    """Log-probability of the target and every optional output, each of `targets`' shape, 0 where
    ignored.
    """
    valid = targets != ignore_index
    index = targets.masked_fill(~valid, 0).unsqueeze(-1)
    logp = logits.log_softmax(-1)
    probs = logp.exp()
    target_logp = logp.gather(-1, index).squeeze(-1)
    stats = {
        "logprob": target_logp,
        "entropy": torch.special.entr(probs).sum(-1),
        "mean_logit": logits.mean(-1),
        "is_top1": target_logp >= logp.amax(-1),
        "log_sum_sq_prob": (probs**2).sum(-1).log(),
        "lse": logits.logsumexp(-1),
    }
    return {name: value.masked_fill(~valid, 0) for name, value in stats.items()}


def preference_loss(stats: dict[str, Tensor], problem: Problem) -> tuple[Tensor, Tensor]:
    """Σ weight·loss over units, and the log-probability of each response, (R,); fp64 sums."""
    exact = stats | {"logprob": stats["logprob"].double()}
    zeros = exact["logprob"].new_zeros(problem.ref_logps.shape[0])
    logps = zeros.index_add(0, problem.response_ids, exact["logprob"])
    everything = slice(0, len(problem.targets))
    return problem.total(logps, slice(None), everything, exact), logps
