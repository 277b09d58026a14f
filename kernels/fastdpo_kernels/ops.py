"""The public functions: of the log-probability in `logprob`, of the losses in `loss`, and both of
a head that is sharded in `vocab_parallel`.
"""

from .logprob import linear_logprob
from .loss import LinearLoss, linear_dpo_loss, linear_loss
from .vocab_parallel import vocab_parallel_logprob, vocab_parallel_loss

__all__ = [
    "LinearLoss",
    "linear_dpo_loss",
    "linear_logprob",
    "linear_loss",
    "vocab_parallel_logprob",
    "vocab_parallel_loss",
]
