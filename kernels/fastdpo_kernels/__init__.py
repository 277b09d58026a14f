"""Exact log-probabilities and DPO gradients out of a language-model head, never holding the full
logits.

Needs torch alone. `linear_logprob` gives the log-probability of given tokens, `linear_dpo_loss` the
loss of packed preference comparisons together with its gradient.
"""

from .losses import LOSSES, Comparisons, register_loss
from .ops import linear_dpo_loss, linear_logprob

__all__ = ["LOSSES", "Comparisons", "linear_dpo_loss", "linear_logprob", "register_loss"]
