"""How often the better of two responses to a prompt has the higher reward, where the loss itself is
not one of comparisons: measured over whole groups, however they were packed.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.groups import Group
from ..data.packing import PackedRow
from ..parallel.world import ALONE, World
from .metrics import TIE


class GroupRewards:
    """Collects the reward of every labelled or scored response."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self._keys: list[tuple[int, int]] = []
        self._values: list[Tensor] = []

    def row(self, row: PackedRow) -> None:
        """The parts of the row whose rewards are added next."""
        for part in row:
            group = self.groups[part.group]
            for unit in part.units:
                self._keys += [(part.group, response) for response in group.responses_of(unit)]

    def add(self, batch: Batch, rewards: Tensor) -> None:
        """Rewards (U,), or (U, G) where units are groups, in the order of the row's parts."""
        self._values.append(rewards[batch.units >= 0].double())

    def accuracy(self, world: World = ALONE) -> dict[str, float]:
        """The share of pairs in the right order over all ranks, a tie counting one half; nothing
        without pairs.
        """
        values = torch.cat(self._values).tolist() if self._values else []
        own = dict(zip(self._keys, values, strict=True)) if values else {}
        rewards = {key: value for rank in world.gather(own) for key, value in rank.items()}
        if not rewards:  # of a loss that reports none
            return {}
        margins = [
            rewards[index, better] - rewards[index, worse]
            for index, group in enumerate(self.groups)
            for better, worse in _pairs(group)
        ]
        if not margins:
            return {}
        right = sum(0.5 if abs(margin) <= TIE else float(margin > 0) for margin in margins)
        return {"rewards/accuracies": right / len(margins)}


def _pairs(group: Group) -> Iterator[tuple[int, int]]:
    yield from ((win, lose) for win, lose, _ in group.comparisons)
    labels = list(zip(group.items, group.given.get("label", ()), strict=False))
    yield from ((a, b) for a, good in labels if good for b, other in labels if not other)
