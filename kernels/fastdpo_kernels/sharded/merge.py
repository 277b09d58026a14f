"""From what every rank knows of a token to its statistics over the whole vocabulary."""

import torch
from torch import Tensor

from ..head import Stats
from ..tiles import FAR
from .exchange import Exchange

ANCHOR, LOG_SHARE = "anchor", "log_share"
"""Statistics beside those of every `Tiles` (t,), from which a second pass has log p_v = z_v − a +
LOG_SHARE: the highest logit as the anchor a, in the unit of the tiles, and the logarithm of the
share of its exponential. (z − z_y) + log p_y would be a small difference of large numbers.
"""


def merge(
    sums: Stats, exchange: Exchange, share: float, outputs: tuple[str, ...], unit: float = 1.0
) -> tuple[Stats, Tensor, Tensor]:
    """Statistics of the whole vocabulary, Σ_{v≠y} exp(z − m) and 1/s, (t,) each.

    Args:
        sums: of this rank's columns, (t,) each: "peak", their highest logit m_r, "highest", that m
            of all ranks, "target" (z_y, 0 where it is not here), and with E = exp(z − m_r), "rest"
            (Σ_{v≠y} E); for outputs "mass" (Σ E), "moment" (Σ E·(z − m_r)), "square" (Σ E²) and
            "mean" (of z).
        share: of this rank in the columns.
        unit: nats of the unit that "peak", "highest" and "target" are in. Their differences are
            converted: they are smaller, and so are their roundings.
    """
    peak = sums["highest"]
    shift = ((sums["peak"] - peak) * unit).clamp_(min=-FAR)
    factor = shift.exp()
    merged = {"target": sums["target"], "rest": factor * sums["rest"]}
    if "entropy" in outputs:
        merged["moment"] = factor * (sums["moment"] + shift * sums["mass"])
    if "log_sum_sq_prob" in outputs:
        merged["square"] = factor.square() * sums["square"]
    if "mean_logit" in outputs:
        merged["mean"] = sums["mean"] * share
    total = exchange.total(torch.stack(list(merged.values())))
    merged = dict(zip(merged, total.unbind(0), strict=True))
    rest, away = merged["rest"], (merged["target"] - peak) * unit
    s = rest + away.exp()
    log_s = s.log()
    # As p → 1, log p is minus the sum of the other entries, which 1 + that sum would round off.
    logprob = torch.where(away == 0, -rest.log1p(), away - log_s)
    stats = {"logprob": logprob, "lse": log_s + peak * unit}
    stats |= {ANCHOR: peak, LOG_SHARE: torch.where(away == 0, logprob, -log_s)}
    if "is_top1" in outputs:
        stats["is_top1"] = (away >= 0) & (rest == rest)  # a kernel's peak drops NaN
    if "entropy" in outputs:
        stats["entropy"] = log_s - merged["moment"] / s
    if "log_sum_sq_prob" in outputs:
        stats["log_sum_sq_prob"] = merged["square"].log() - 2 * log_s
    if "mean_logit" in outputs:
        stats["mean_logit"] = merged["mean"].clone()
    return stats, rest, s.reciprocal()
