"""Whether the weights of a loss make up for how many responses have each label."""

from collections.abc import Sequence

from ..config import TrainConfig
from ..losses import TrainingLoss
from .groups import Group

_MOST = 4 / 3


def describe_labels(config: TrainConfig, groups: Sequence[Group], loss: TrainingLoss) -> str | None:
    """What is to be said of the labels; None where that is nothing.

    KTO, Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8, recommends λ_D·n_D / (λ_U·n_U) from 1 to
    4/3, with the numbers n of desirable and undesirable responses and their weights λ.
    """
    weighed = any("desirable_weight" in one.options for one in loss.losses)
    if not weighed or "label" not in groups[0].given:
        return None
    labels = [label for group in groups for label in group.given["label"]]
    good = sum(map(bool, labels))
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


def _batches_of_one_label(config: TrainConfig, groups: Sequence[Group]) -> str | None:
    """What is to be said where most batches, in the order of the file, have one label only."""
    rows = sorted(
        (row, bool(label))
        for group in groups
        for row, label in zip(group.rows, group.given["label"], strict=True)
    )
    size = config.per_device_train_batch_size
    if config.shuffles or size == 1:
        return None
    batches = [{label for _, label in rows[i : i + size]} for i in range(0, len(rows), size)]
    alone = sum(len(labels) == 1 for labels in batches)
    if 2 * alone <= len(batches):
        return None
    return (
        f"{alone} of {len(batches)} batches of {size} have one label only, in the order of the "
        "file; shuffle its rows, or write both labels in turn"
    )
