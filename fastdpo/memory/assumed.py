"""The data that a plan assumes where none is given: one step of what the loss needs."""

from __future__ import annotations

import numpy as np

from ..config import TrainConfig
from ..data.dataset import Data
from ..data.groups import Group, Groups
from ..data.plan import units_per_step
from ..losses import TrainingLoss

_LENGTH = 1024
_RESPONSES = 4
"""To a prompt, where their scores or ranks say something of each other alone."""


def assumed_data(config: TrainConfig, loss: TrainingLoss) -> tuple[Data, str]:
    """Groups for one step in the layout that the loss needs, whose sequences have `max_length`
    tokens, half of them the prompt's; and these words.
    """
    length, count = config.max_length or _LENGTH, units_per_step(config)
    prompt = np.zeros(length // 2, np.int32)
    response = np.zeros(length - length // 2, np.int32)
    if loss.unit == "comparison":
        what = "pairs"
        groups = [Group(prompt, [response, response], [(0, 1, 1.0)])] * count
    elif loss.unit == "group":
        what = f"groups of {_RESPONSES} ranked responses"
        groups = [_group(loss, prompt, response, _RESPONSES)] * count
    elif any("label" in one.columns for one in loss.losses):
        what = "labelled responses"
        groups = [_group(loss, prompt, response, 1)] * count
    else:
        what = f"groups of {_RESPONSES} scored responses"
        sizes = [min(_RESPONSES, count - start) for start in range(0, count, _RESPONSES)]
        groups = [_group(loss, prompt, response, size) for size in sizes]
    how = f"no data given: {what} of {length} tokens each are assumed, half of them the prompt's"
    return Data(Groups.of(groups), Groups.of([]), config), how


def _group(loss: TrainingLoss, prompt: np.ndarray, response: np.ndarray, count: int) -> Group:
    """One row of so many responses, and of the row before it one more where the loss asks."""
    mismatched = [count] * count if loss.mismatched else []
    return Group(
        prompt,
        [response] * (count + bool(mismatched)),
        unit=loss.unit,
        items=list(range(count)),
        rows=[0] * count,
        mismatched=mismatched,
    )
