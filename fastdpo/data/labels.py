"""Whether the weights of a loss make up for how many responses have each label."""

import numpy as np

from ..config import TrainConfig
from ..losses import TrainingLoss
from .groups import Groups

_MOST = 4 / 3


def describe_labels(config: TrainConfig, groups: Groups, loss: TrainingLoss) -> str | None:
    """What is to be said of the labels; None where that is nothing.

    KTO, Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8, recommends λ_D·n_D / (λ_U·n_U) from 1 to
    4/3, with the numbers n of desirable and undesirable responses and their weights λ.
    """
    weighed = any("desirable_weight" in one.options for one in loss.losses)
    if not weighed or "label" not in groups.given:
        return None
    labels = groups.given["label"].values
    good = np.count_nonzero(labels)
    bad = len(labels) - good
    if good == 0 or bad == 0:
        kind, other = ("desirable", "undesirable") if good else ("undesirable", "desirable")
        return (
            f"all {len(labels)} responses are {kind}; {loss.names[0]} is made for {other} ones too"
        )
    if (alone := _batches_of_one_label(config, groups)) is not None:
        return alone
    weighted_good, weighted_bad = good * config.desirable_weight, bad * config.undesirable_weight
    balanced = good == bad or weighted_bad <= weighted_good <= _MOST * weighted_bad
    if balanced or weighted_good == 0 or weighted_bad == 0:
        return None
    desirable, undesirable = weighted_bad / good, weighted_good / bad
    return (
        f"{good} desirable and {bad} undesirable responses; the KTO paper recommends a "
        f"desirable_weight from {desirable:.3g} to {_MOST * desirable:.3g}, or an "
        f"undesirable_weight from {undesirable / _MOST:.3g} to {undesirable:.3g}"
    )


def _batches_of_one_label(config: TrainConfig, groups: Groups) -> str | None:
    """What is to be said where most batches, in the order of the file, have one label only."""
    labels = groups.given["label"].values[np.argsort(groups.rows.values, kind="stable")]
    size = config.per_device_train_batch_size
    if config.shuffles or size == 1:
        return None
    starts = np.arange(0, len(labels), size)
    same = np.maximum.reduceat(labels, starts) == np.minimum.reduceat(labels, starts)
    alone = np.count_nonzero(same)
    if 2 * alone <= len(starts):
        return None
    return (
        f"{alone} of {len(starts)} batches of {size} have one label only, in the order of the "
        "file; shuffle its rows, or write both labels in turn"
    )
