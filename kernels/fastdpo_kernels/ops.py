"""The public functions: of the log-probability in `logprob`, of the losses in `loss`."""

from .logprob import linear_logprob
from .loss import LinearLoss, linear_dpo_loss, linear_loss

__all__ = ["LinearLoss", "linear_dpo_loss", "linear_logprob", "linear_loss"]
