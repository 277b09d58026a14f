"""Metrics under TRL's names: summed over the rows of a step on the device, averaged exactly over
its units and tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..devices import known_gpu
from ..model.quantised import count_weights
from ..parallel.world import World

TIE = 1e-5
"""Rewards closer than this differ by the rounding of fp32 sums alone."""


class StepSums:
    """Sums over the units and tokens of one step (or one evaluation), each with what it is divided
    by.

    A token of a response that several units name counts once for each, as it does where every
    comparison is a pair of sequences. A tie of rewards counts one half, so a policy that still is
    its reference has accuracy 0.5.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)
        """The loss, then every sum, then their divisors."""

    def add(
        self,
        batch: Batch,
        loss: Tensor,
        found: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        stats: Any,
    ) -> None:
        """Add one row: its share of the loss, what was measured of every unit, the constants that
        the units were given, per-token statistics.
        """
        if batch.units.ndim == 2 and "batch_chosen_tokens" in given:
            parts = _of_comparisons(batch, found, stats)
        else:
            parts = _of_responses(batch, found, given, stats)
        parts = {"loss": (loss.detach(), loss.new_ones(()))} | parts
        if not self.names:
            self.names = list(parts)
            self.sums = torch.zeros(2 * len(parts), dtype=torch.float64, device=self.device)
        rows = [value.double().reshape(()) for value, _ in parts.values()]
        counts = [count.double().reshape(()) for _, count in parts.values()]
        self.sums += torch.stack([*rows, *counts])

    def over(self, world: World, names: list[str]) -> None:
        """Make the sums those of all ranks; `names` are what is summed, which a rank without rows
        does not know, and are filled in the first time.
        """
        if world.data_size == 1:
            return
        if not names:
            names += next(filter(None, world.gather(self.names)), [])
        if not self.names:
            self.names = names
            self.sums = torch.zeros(2 * len(names), dtype=torch.float64, device=self.device)
        world.add(self.sums)

    def means(self, sums: list[float] | None = None) -> dict[str, float]:
        """The metrics, each a mean over units or over tokens; reads the device, unless its `sums`
        are given. What nothing was counted of is left out.
        """
        values = self.sums.tolist() if sums is None else sums
        count = len(self.names)
        table = zip(self.names, values[:count], values[count:], strict=True)
        found = {name: value / max(over, 1.0) for name, value, over in table if over}
        if self.names:
            found["loss"] = values[0]
        if {
            "rewards/chosen",
            "rewards/rejected",
        } <= found.keys() and "rewards/margins" not in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


Parts = dict[str, tuple[Tensor, Tensor]]
"""A sum and what it is divided by, by the metric's name."""


def _named(batch: Batch, responses: Tensor, weights: Tensor) -> Tensor:
    """How much each scored token counts (T,) where units name responses with weights."""
    count = weights.new_zeros(len(batch.response_lengths))
    return count.index_add_(0, responses, weights)[batch.response_ids]


def _of_comparisons(batch: Batch, found: Mapping[str, Tensor], stats: Any) -> Parts:
    win, lose = batch.units[:, 0], batch.units[:, 1]
    ones = torch.ones(len(win), device=win.device, dtype=torch.float64)
    units = dict(found)
    if {"rewards/chosen", "rewards/rejected"} <= found.keys():
        margins = found["rewards/chosen"] - found["rewards/rejected"]
        right = (margins > TIE).double() + 0.5 * (margins.abs() <= TIE)
        units |= {"rewards/accuracies": right, "rewards/margins": margins}
    parts = {name: (value.sum(), ones.sum()) for name, value in units.items()}
    wins, losses = _named(batch, win, ones), _named(batch, lose, ones)
    tokens = {
        "entropy": (wins + losses, stats.entropy),
        "logits/chosen": (wins, stats.mean_logit),
        "logits/rejected": (losses, stats.mean_logit),
        "mean_token_accuracy": (wins, stats.is_top1),
    }
    return parts | _over_tokens(tokens)


def _over_tokens(tokens: Mapping[str, tuple[Tensor, Tensor]]) -> Parts:
    return {name: ((w * values).sum(), w.sum()) for name, (w, values) in tokens.items()}


def _of_responses(
    batch: Batch, found: Mapping[str, Tensor], given: Mapping[str, Tensor], stats: Any
) -> Parts:
    there = (batch.units >= 0).double().reshape(-1)  # a mask would make the host wait
    responses = batch.units.clamp(min=0).reshape(-1)
    whole = _named(batch, responses, there)
    tokens = {"entropy": (whole, stats.entropy)}
    parts: Parts = {}
    for term in ("kl", "delta"):
        if term in given:
            parts[term] = (given[term].sum(), there.sum())
    if "label" not in given:
        tokens["logits/mean"] = (whole, stats.mean_logit)
        means = {"rewards": "rewards/mean", "logps": "logps/mean"}
        for name, value in found.items():
            parts[means.get(name, name)] = ((there * value.reshape(-1)).sum(), there.sum())
        return parts | _over_tokens(tokens)
    label = given["label"].double()
    for kind, here in (("chosen", label), ("rejected", 1 - label)):
        for name in [name for name in ("rewards", "logps") if name in found]:
            parts[f"{name}/{kind}"] = ((here * found[name]).sum(), here.sum())
        tokens[f"logits/{kind}"] = (_named(batch, responses, here), stats.mean_logit)
    return parts | _over_tokens(tokens)


def rates(
    model: torch.nn.Module,
    devices: int,
    units: int,
    pair_tokens: int,
    computed_tokens: int,
    seconds: float,
) -> dict[str, float]:
    """Throughput of steps that took `seconds` on so many devices, all of them together.

    `tokens_per_second` counts the tokens that an unpadded sequence for each response of a unit
    holds, so sharing shows in it. `mfu`, 6·parameters·tokens a second over the GPUs' dense bf16
    peak, is left out where that is not known.
    """
    found = {
        "tokens_per_second": pair_tokens / seconds,
        "pairs_per_second": units / seconds,
        "tokens_saved_by_sharing": 1 - computed_tokens / pair_tokens,
    }
    gpu = known_gpu(next(model.parameters()).device)
    if gpu is None or gpu.bf16 is None:
        return found
    parameters = sum(count_weights(p) for p in model.parameters())
    return found | {"mfu": 6.0 * parameters * computed_tokens / seconds / gpu.bf16 / devices}


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
