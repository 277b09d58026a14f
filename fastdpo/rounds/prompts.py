"""The prompts of the rounds, and those that are held out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config.rounds import RoundsConfig
from ..data.messages import BadRow, Text
from ..data.prompts import split_explicit
from ..errors import DataError
from ..generation.prompts import Prompt, read_prompts
from ..model.load import load_tokenizer
from ..model.sampler import Sampler

logger = logging.getLogger(__name__)

_OWN = ("chosen", "completion", "answer", "response")
"""Columns that may hold a row's own answer."""


@dataclass(frozen=True)
class Prompts:
    """Prompts with their tokens.

    Attributes:
        source: what to call the data in errors.
        held_out: prompts of another data set, or of rows that no round has.
    """

    source: str
    all: Sequence[Prompt]
    tokens: Sequence[list[int]]
    held_out: Any = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.all)

    def where(self, index: int) -> str:
        """A row in words."""
        return f"{self.source}, row {self.all[index].number}"

    def own(self, index: int) -> Any:
        """The row's own answer, for SPIN; None without one."""
        prompt = self.all[index]
        bad = prompt.row.get("label") is False
        named = (prompt.row.get(name) for name in _OWN if not (bad and name == "completion"))
        answer = next((one for one in named if one is not None and str(one).strip()), None)
        if isinstance(answer, list) and isinstance(prompt.text, list):
            try:
                return split_explicit(prompt.text, {"answer": answer}, repeated=False)[1]["answer"]
            except BadRow as problem:
                raise DataError(f"{self.where(index)}: {problem}") from None
        return None if answer is None else as_completion(prompt.text, str(answer))

    def pair(self, index: int) -> tuple[str, str] | None:
        """The row's chosen and rejected answer as text; None where it is no pair of those."""
        row = self.all[index].row
        sides = [_only_text(row.get(name)) for name in ("chosen", "rejected")]
        return None if None in sides else (str(sides[0]), str(sides[1]))

    def of(self, places: Iterable[int]) -> Prompts:
        """Those at these places."""
        kept = list(places)
        return Prompts(self.source, [self.all[i] for i in kept], [self.tokens[i] for i in kept])

    def of_round(self, number: int, count: int | None) -> Prompts:
        """The prompts of a round: all, or the next `count` of an order that is drawn anew each
        time all have had their turn.
        """
        if count is None or count >= len(self):
            return self
        turns, chosen = -(-number * count // len(self)), []
        for turn in range(turns):
            chosen += np.random.default_rng([self.seed, turn]).permutation(len(self)).tolist()
        return self.of(sorted(chosen[(number - 1) * count : number * count]))


def load_prompts(config: RoundsConfig) -> Prompts:
    """The prompts of the data set, and the held-out ones: of `eval_dataset_name`, or else every
    n-th row, which no round has. Those without room for an answer are left out, with a line.

    Raises:
        DataError: no prompts, or rows without an answer of their own where the judge needs one.
    """
    sampler = Sampler(None, load_tokenizer(config))
    name, count = str(config.dataset_name), config.eval_prompts
    prompts = _with_room(config, sampler, name)
    if config.eval_dataset_name is not None:
        held_name = config.eval_dataset_name
        split = (config.eval_source or (held_name, "train"))[1]
        of_eval = config.choose("eval", dataset_name=held_name, dataset_train_split=split)
        held = _with_room(of_eval, sampler, held_name)
        held, kept = held.of(range(min(count, len(held)))), prompts
    else:
        step = max(2, len(prompts) // count)
        places = range(0, len(prompts), step)[:count]
        held = prompts.of(places)
        kept = prompts.of(sorted(set(range(len(prompts))) - set(places)))
    if not len(kept) or not len(held):
        raise DataError(
            f"{name}: {len(prompts)} prompts; expected some to train on and some to hold out"
        )
    if config.judge == "row":
        for index in range(len(kept)):
            if kept.own(index) is None:
                raise DataError(
                    f"{kept.where(index)}: no answer of its own; expected {', '.join(_OWN[:-1])} "
                    f"or {_OWN[-1]} beside the prompt, and no label false (judge: row)"
                )
    return Prompts(name, kept.all, kept.tokens, held, config.seed)


def _with_room(config: RoundsConfig, sampler: Sampler, name: str) -> Prompts:
    found = []
    for prompt in read_prompts(config):
        try:
            found.append((prompt, sampler.encode(prompt.text, prompt.template)))
        except DataError as problem:
            raise DataError(f"{name}, row {prompt.number}: {problem}") from None
    fit = [one for one in found if config.max_length is None or len(one[1]) < config.max_length]
    if not fit:
        raise DataError(
            f"{name}: no room for an answer: the shortest of {len(found)} prompts has "
            f"{min(len(ids) for _, ids in found)} tokens, max_length is {config.max_length}"
        )
    if len(fit) < len(found):
        logger.warning(
            f"{name}: left out {len(found) - len(fit)} prompts of max_length ({config.max_length}) "
            "tokens or more: no room for an answer"
        )
    return Prompts(name, [prompt for prompt, _ in fit], [ids for _, ids in fit])


def _only_text(answer: Any) -> str | None:
    """An answer that is text, or one message of text."""
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], Mapping):
        message = {name: value for name, value in answer[0].items() if value is not None}
        answer = message.get("content") if message.keys() == {"role", "content"} else None
    return answer if isinstance(answer, str) else None


def as_columns(template: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat template is given beside a prompt, as columns of a row."""
    rest = {name: value for name, value in template.items() if name != "tools"}
    columns = {"tools": template.get("tools"), "chat_template_kwargs": rest}
    return {name: value for name, value in columns.items() if value}


def as_completion(prompt: Text, text: str) -> Any:
    """An answer of the type of its prompt: text, or messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
