"""Metrics under TRL's names: summed over the rows of a step on the device, averaged exactly over
its comparisons.
"""

from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..devices import known_gpu
from ..model.quantised import count_weights

# Rewards closer than this differ by the rounding of fp32 sums alone.
_TIE = 1e-5
_SUMS = (
    "loss",
    "comparisons",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "chosen_tokens",
    "rejected_tokens",
    "entropy",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
)


class StepSums:
    """Sums over the comparisons and tokens of one step (or one evaluation).

    A token of a response that several comparisons name counts once for each, as it does where every
    comparison is a pair of sequences. A tie of rewards counts one half, so a policy that still is
    its reference has accuracy 0.5.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self.comparisons = 0
        self.pair_tokens = 0
        self.computed_tokens = 0

    def add(
        self, batch: Batch, loss: Tensor, logps: Tensor, ref_logps: Tensor, stats: Any, beta: float
    ) -> None:
        """Add one row: its share of the loss, (R,) log-probabilities of both models, per-token
        statistics.
        """
        win, lose = batch.comparisons.unbind(1)
        # Both rounded alike, so that equal models have equal rewards.
        ratios = beta * (logps - ref_logps.to(logps.dtype))
        chosen, rejected = ratios[win], ratios[lose]
        margins = chosen - rejected
        count = logps.new_zeros(2, len(logps))
        ones = logps.new_ones(len(win))
        wins = count[0].index_add_(0, win, ones)[batch.response_ids]
        losses = count[1].index_add_(0, lose, ones)[batch.response_ids]
        values = [
            loss.detach(),
            ones.sum(),
            chosen.sum(),
            rejected.sum(),
            (margins > _TIE).sum() + 0.5 * (margins.abs() <= _TIE).sum(),
            margins.sum(),
            logps[win].sum(),
            logps[lose].sum(),
            wins.sum(),
            losses.sum(),
            ((wins + losses) * stats.entropy).sum(),
            (wins * stats.mean_logit).sum(),
            (losses * stats.mean_logit).sum(),
            (wins * stats.is_top1).sum(),
        ]
        self.sums += torch.stack([v.double() for v in values])
        self.comparisons += len(win)
        self.pair_tokens += batch.pair_tokens
        self.computed_tokens += batch.computed_tokens

    def means(self, sums: list[float] | None = None) -> dict[str, float]:
        """The metrics, each a mean over comparisons or over tokens; reads the device, unless its
        `sums` are given.
        """
        total = dict(zip(_SUMS, self.sums.tolist() if sums is None else sums, strict=True))
        pairs = max(total.pop("comparisons"), 1.0)
        chosen = max(total.pop("chosen_tokens"), 1.0)
        rejected = max(total.pop("rejected_tokens"), 1.0)
        divisor = {
            "loss": 1.0,
            "entropy": chosen + rejected,
            "logits/chosen": chosen,
            "logits/rejected": rejected,
            "mean_token_accuracy": chosen,
        }
        return {name: value / divisor.get(name, pairs) for name, value in total.items()}


def rates(
    model: torch.nn.Module, comparisons: int, pair_tokens: int, computed_tokens: int, seconds: float
) -> dict[str, float]:
    """Throughput of steps that took `seconds`.

    `tokens_per_second` counts the tokens that two unpadded sequences per comparison hold, so
    sharing shows in it. `mfu`, 6·parameters·tokens a second over the GPU's dense bf16 peak, is left
    out where that is not known.
    """
    found = {
        "tokens_per_second": pair_tokens / seconds,
        "pairs_per_second": comparisons / seconds,
        "tokens_saved_by_sharing": 1 - computed_tokens / pair_tokens,
    }
    gpu = known_gpu(next(model.parameters()).device)
    if gpu is None or gpu.bf16 is None:
        return found
    parameters = sum(count_weights(p) for p in model.parameters())
    return found | {"mfu": 6.0 * parameters * computed_tokens / seconds / gpu.bf16}


def show(metrics: dict[str, float]) -> str:
    """The few metrics that a person watches, in one line."""
    names = {
        "loss": "loss",
        "rewards/margins": "margin",
        "rewards/accuracies": "reward accuracy",
        "tokens_per_second": "tokens/s",
    }
    found = ((short, metrics.get(n, metrics.get(f"eval_{n}"))) for n, short in names.items())
    return ", ".join(f"{short} {value:.4g}" for short, value in found if value is not None)
