"""Preference pairs cut into those to train on and those to evaluate on, no prompt in both."""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdpo.data.load import load_rows
from fastdpo.data.tokenize import tokenize_dataset

from ..workloads import TEXTS

Ids = tuple[int, ...]
_FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Split:
    """Pairs to train on, pairs to evaluate on, and the token ids of each prompt with each of its
    chosen answers among the pairs to train on.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    texts: list[list[int]]


class _Item(NamedTuple):
    pair: dict[str, Any]
    prompt: Ids
    chosen: Ids
    rejected: Ids


def read_pairs(name: str) -> list[dict[str, Any]]:
    """Pairs of a named data set or of a file, without those of two equal answers.

    Raises:
        SystemExit: the data is not here, or is no pairs.
    """
    rows: Any = TEXTS[name]() if name in TEXTS else list(load_rows(name, "train"))
    if rows is None:
        raise SystemExit(f"{name}: the data is not here")
    if not all(field in rows[0] for field in _FIELDS):
        raise SystemExit(f"{name}: expected rows of {', '.join(_FIELDS)}")
    pairs = [{field: row[field] for field in _FIELDS} for row in rows]
    return [pair for pair in pairs if pair["chosen"] != pair["rejected"]]


def split_pairs(
    pairs: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
) -> Split:
    """One pair of each of `eval_pairs` random prompts is held out, so that they say independent
    things. Pairs of the other prompts, those of one prompt together, are trained on: as many as the
    steps need, or all that there are, in whole steps.

    Pairs whose prompt takes more than half of `max_length`, or whose answers differ only in what is
    cut off, are left out.

    Args:
        pairs: rows of prompt, chosen, rejected.
        tokenizer: decides which prompts are equal and how long they are.
        options: eval_pairs, pairs_per_step, steps, max_length, seed.

    Raises:
        SystemExit: too few pairs.
    """
    tokens, _ = tokenize_dataset(Dataset.from_list(list(pairs)), tokenizer, max_length=None)
    groups: dict[str, list[_Item]] = {}
    for pair, ids in zip(pairs, tokens, strict=True):
        item = _item(dict(pair), ids, options.max_length)
        if 2 * len(item.prompt) <= options.max_length and item.chosen != item.rejected:
            groups.setdefault(json.dumps(pair["prompt"]), []).append(item)
    order = list(groups.values())
    random.Random(options.seed).shuffle(order)
    held_out = [group[0].pair for group in order[: options.eval_pairs]]
    train = [item for group in order[options.eval_pairs :] for item in group]
    step = options.pairs_per_step
    train = train[: min(options.steps, len(train) // step) * step]
    if not train:
        raise SystemExit(f"{len(order)} prompts are too few to hold out {options.eval_pairs}")
    # One text can become two prompts, where its end merges with how an answer begins. fastdpo
    # brings the pairs of one prompt together, so they have to stand together for TRL as well.
    first: dict[Ids, int] = {}
    train.sort(key=lambda item: first.setdefault(item.prompt, len(first)))
    texts = dict.fromkeys(item.prompt + item.chosen for item in train)
    return Split([item.pair for item in train], held_out, [list(text) for text in texts])


def _item(pair: dict[str, Any], ids: Mapping[str, Any], max_length: int) -> _Item:
    prompt = tuple(ids["prompt_ids"])
    chosen, rejected = (
        tuple(ids["response_ids"][ids[side][0]][: max_length - len(prompt)])
        for side in ("winners", "losers")
    )
    return _Item(pair, prompt, chosen, rejected)
