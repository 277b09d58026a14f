"""A run's data: the rows of both splits, wherever they are, as tokenised groups."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets

from ..config import TrainConfig
from ..errors import DataError
from .columns import row_kind
from .groups import Group, check_agreement, count_comparisons, make_groups
from .load import load_rows
from .messages import unreadable
from .readers import stored, stored_types
from .tokenize import tokenize_dataset

logger = logging.getLogger(__name__)

RowsInMemory: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]
"""Rows in memory, in one of the layouts of `fastdpo.data.rows`."""


@dataclass
class Data:
    """Groups to train on and to evaluate on."""

    train: list[Group]
    evaluation: list[Group]

    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one response that is trained on."""
        return max(len(g.prompt) + len(response) for g in self.train for response in g.responses)


def load_data(
    config: TrainConfig,
    tokenizer: Any,
    vocab_size: int | None,
    rows: RowsInMemory | None = None,
    eval_rows: RowsInMemory | None = None,
) -> Data:
    """Both splits, from the rows that are given or else those that the configuration names;
    evaluation is empty where nothing is evaluated. One line about each is logged.

    Raises:
        DataError: data that cannot be read or trained on.
    """
    if rows is None:
        assert config.dataset_name is not None
        training = _groups(
            config, tokenizer, vocab_size, (config.dataset_name, config.dataset_train_split)
        )
    else:
        training = _groups(config, tokenizer, vocab_size, ("rows", rows))
    held_out = ("eval_rows", eval_rows) if eval_rows is not None else config.eval_source
    if not config.evaluates or held_out is None:
        return Data(training, [])
    return Data(training, _groups(config, tokenizer, vocab_size, held_out))


def _groups(
    config: TrainConfig,
    tokenizer: Any,
    vocab_size: int | None,
    source: tuple[str, str | RowsInMemory],
) -> list[Group]:
    """The groups of one split: a name and, of what lies outside, its split, or the rows."""
    name, where = source
    if isinstance(where, str):
        raw = load_rows(
            name,
            where,
            config_name=config.dataset_config,
            num_proc=config.dataset_num_proc,
            skip_bad_rows=config.skip_bad_rows,
        )
    else:
        raw = _in_memory(where, name)
    tokens, report = tokenize_dataset(
        raw,
        tokenizer,
        max_length=config.max_length,
        num_proc=config.dataset_num_proc,
        skip_bad_rows=config.skip_bad_rows,
        max_comparisons_per_group=config.max_comparisons_per_group,
        seed=config.seed,
        vocab_size=vocab_size,
        source=name,
    )
    groups = make_groups(tokens, group_prompts=config.group_prompts, source=name)
    logger.info(
        f"data: {report}; {len(groups)} groups, {sum(len(g.responses) for g in groups)} responses, "
        f"{count_comparisons(groups)} comparisons{check_agreement(groups)}"
    )
    return groups


def _in_memory(rows: RowsInMemory, name: str) -> datasets.Dataset:
    """Rows as a data set with the union of their columns."""
    if isinstance(rows, datasets.Dataset):
        return rows
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
        expected = "a list of dicts or a datasets.Dataset"
        raise DataError(f"{name}: expected {expected}, got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, row {number}: expected a dict, got {type(row).__name__}")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        raise DataError(f"{name}: has no rows")
    row_kind(columns, name)
    is_text = {c: all(isinstance(row.get(c), str | None) for row in rows) for c in columns}
    encoded = [
        {c: _stored(row.get(c), is_text[c], f"{name}, row {number}: {c}") for c in columns}
        for number, row in enumerate(rows, 1)
    ]
    return datasets.Dataset.from_list(encoded, features=datasets.Features(stored_types(is_text)))


def _stored(value: Any, is_text: bool, where: str) -> Any:
    try:
        problem, kept = unreadable(value), stored(value, is_text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected plain values ({error})") from None
    if problem:
        raise DataError(f"{where}: {problem}")
    return kept
