"""The prompts of the rounds, and those that are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config.rounds import RoundsConfig
from ..data.messages import Text
from ..errors import DataError
from ..generation.sample import prompts_of


@dataclass(frozen=True)
class Prompts:
    """Prompts with the rows that they stand in.

    Attributes:
        source: what to call the data in errors.
        numbers: of the rows in the data, from 0.
        held_out: prompts of another data set, or of rows that no round has.
    """

    source: str
    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]
    held_out: Any = None
    seed: int = 0

    @property
    def texts(self) -> list[Text]:
        """The prompts."""
        return [row["prompt"] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """A row in words."""
        return f"{self.source}, row {self.numbers[index] + 1}"

    def own(self, index: int) -> Any:
        """The row's own answer, for SPIN; None without one."""
        row = self.rows[index]
        named = (row.get(name) for name in ("chosen", "completion", "answer", "response"))
        return next((answer for answer in named if answer), None)

    def of_round(self, number: int, count: int | None) -> Prompts:
        """The prompts of a round: all, or the next `count` of an order that is drawn anew each
        time all have had their turn.
        """
        if count is None or count >= len(self):
            return self
        turns, chosen = -(-number * count // len(self)), []
        for turn in range(turns):
            chosen += np.random.default_rng([self.seed, turn]).permutation(len(self)).tolist()
        some = sorted(chosen[(number - 1) * count : number * count])
        return Prompts(self.source, [self.rows[i] for i in some], [self.numbers[i] for i in some])


def load_prompts(config: RoundsConfig) -> Prompts:
    """The prompts of the data set, and the held-out ones: of `eval_dataset_name`, or else every
    n-th row, which no round has.

    Raises:
        DataError: no prompts, or rows without an answer of their own where the judge needs one.
    """
    name, rows = str(config.dataset_name), prompts_of(config)
    count = config.eval_prompts
    if config.eval_dataset_name is not None:
        held_name = config.eval_dataset_name
        split = (config.eval_source or (held_name, "train"))[1]
        held = prompts_of(config.choose("eval", dataset_name=held_name, dataset_train_split=split))
        held_numbers = list(range(len(held)))[:count]
        kept = list(range(len(rows)))
    else:
        held_name, held = name, rows
        step = max(2, len(rows) // max(1, count))
        held_numbers = list(range(0, len(rows), step))[:count]
        kept = sorted(set(range(len(rows))) - set(held_numbers))
    if not kept or not held_numbers:
        raise DataError(
            f"{name}: {len(rows)} prompts; expected some to train on and some to hold out"
        )
    made = Prompts(
        name,
        [rows[i] for i in kept],
        kept,
        Prompts(held_name, [held[i] for i in held_numbers], held_numbers),
        config.seed,
    )
    if config.judge == "row":
        for index in range(len(made)):
            if made.own(index) is None:
                raise DataError(
                    f"{made.where(index)}: no answer of its own; expected chosen, completion, "
                    "answer or response beside the prompt (judge: row)"
                )
    return made


def as_completion(prompt: Text, text: str) -> Any:
    """An answer of the type of its prompt: text, or messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
