"""Exact log-probabilities and DPO gradients out of a language-model head, never holding the full
logits.

Needs torch alone. `linear_logprob` gives the log-probability of given tokens, `linear_dpo_loss` the
loss of packed preference comparisons together with its gradient, `linear_loss` any other loss of
the family. `vocab_parallel_logprob` and `vocab_parallel_loss` are those for a head that is spread
over devices by its vocabulary. `linear_cross_entropy` is what supervised training takes, under the
calls of CCE, Liger (`LinearCrossEntropyLoss`) and PyTorch (`torch_linear_cross_entropy`).
`LinearDPOLoss`, `patch_trl` and `patch_transformers` put the head into trainers that are written
for Liger, into TRL and into transformers' models. `workspace_bytes` says beforehand what memory
they take, `head_passes` how much they compute; `compile_ahead` compiles their kernels before the
first step.
"""

from .ahead import compile_ahead
from .backends import workspace_bytes
from .cross_entropy import linear_cross_entropy
from .head import WorkspaceBytes
from .integrations.causal_lm import patch_transformers
from .integrations.cross_entropy import LinearCrossEntropyLoss, torch_linear_cross_entropy
from .integrations.liger import LinearDPOLoss
from .integrations.trl import patch_trl
from .losses import LOSSES, Comparisons, Responses, register_loss
from .ops import (
    linear_dpo_loss,
    linear_logprob,
    linear_loss,
    vocab_parallel_logprob,
    vocab_parallel_loss,
)
from .passes import head_passes

__all__ = [
    "LOSSES",
    "Comparisons",
    "LinearCrossEntropyLoss",
    "LinearDPOLoss",
    "Responses",
    "WorkspaceBytes",
    "compile_ahead",
    "head_passes",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_logprob",
    "linear_loss",
    "patch_transformers",
    "patch_trl",
    "register_loss",
    "torch_linear_cross_entropy",
    "vocab_parallel_logprob",
    "vocab_parallel_loss",
    "workspace_bytes",
]
