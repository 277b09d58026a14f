"""How often what is measured of a response puts the better one of two first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

TIE = 1e-6
"""Nats; values that differ by less are equal: each order of such a pair is half right."""

Values = dict[str, np.ndarray]
"""Of each response of a row (R,): `logp`, `logp_per_token` and, with a reference, `reward`."""


@dataclass
class Accuracy:
    """Pairs in the right order and all pairs, for each measure."""

    right: dict[str, float] = field(default_factory=dict)
    pairs: int = 0

    def add(self, values: Values, comparisons: Sequence[tuple[int, int]]) -> None:
        """The comparisons (winner, loser) of a row."""
        self.pairs += len(comparisons)
        for name, value in values.items():
            margins = (value[winner] - value[loser] for winner, loser in comparisons)
            right = sum(0.5 if abs(margin) <= TIE else float(margin > 0) for margin in margins)
            self.right[name] = self.right.get(name, 0.0) + right

    def shares(self) -> dict[str, float]:
        """The share of pairs in the right order by measure; nothing without pairs."""
        return {name: right / self.pairs for name, right in self.right.items() if self.pairs}


def label_accuracy(values: Iterable[Values], labels: Iterable[bool | None]) -> dict[str, float]:
    """The share of (desirable, undesirable) pairs of all labelled responses in the right order, the
    area under the ROC curve; nothing where one of the labels is missing.
    """
    kept = [
        (value, label) for value, label in zip(values, labels, strict=True) if label is not None
    ]
    good = np.array([label for _, label in kept], bool)
    if good.all() or not good.any():
        return {}
    return {name: area(np.array([v[name][0] for v, _ in kept]), good) for name in kept[0][0]}


def area(values: np.ndarray, good: np.ndarray) -> float:
    """The area under the ROC curve: how often one of the good has the higher value (N,) than one of
    the others, a tie one half.
    """
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    positive = int(good.sum())
    surplus = rank[place][good].sum() - positive * (positive + 1) / 2
    return float(surplus / (positive * (len(good) - positive)))
