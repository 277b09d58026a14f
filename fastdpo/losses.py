"""The training objective: one registered loss, or a weighted mix, as a function of the comparisons'
log-probabilities.

The losses themselves live in `fastdpo_kernels.losses`, where a new one is added.
"""

from collections.abc import Callable, Sequence

import torch
from fastdpo_kernels.losses import LOSSES, Comparisons, Loss
from torch import Tensor

from .errors import ConfigError


def make_loss(
    loss_types: Sequence[str],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    loss_weights: Sequence[float] | None = None,
) -> Callable[[Comparisons], Tensor]:
    """Σ_k weight_k · loss_k of each comparison, shape (C,); weights default to 1.

    Raises:
        ConfigError: an unknown loss, or another number of weights than of losses.
    """
    unknown = [name for name in loss_types if name not in LOSSES]
    if unknown:
        raise ConfigError(f"loss_type: unknown {unknown[0]!r}; known: {', '.join(sorted(LOSSES))}")
    weights = [1.0] * len(loss_types) if loss_weights is None else list(loss_weights)
    if len(weights) != len(loss_types):
        raise ConfigError(
            f"loss_weights: expected {len(loss_types)} numbers, one per loss, got {len(weights)}"
        )
    if weights == [1.0]:  # by its name, so that a kernel that knows it can be used
        return Loss.named(loss_types[0], beta=beta, label_smoothing=label_smoothing)

    def loss(pairs: Comparisons) -> Tensor:
        terms = [
            weight * LOSSES[name](pairs, beta=beta, label_smoothing=label_smoothing)
            for name, weight in zip(loss_types, weights, strict=True)
        ]
        return torch.stack(terms).sum(0)

    return loss


def loss_at_reference(loss: Callable[[Comparisons], Tensor]) -> float:
    """The loss of a comparison while the policy still equals the reference: log 2 for DPO."""
    zero = torch.zeros(1, dtype=torch.float64)
    return float(loss(Comparisons(zero, zero, zero, zero, zero + 1, zero + 1)))
