"""A run's data: the rows of both splits, wherever they are, as tokenised groups."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets

from ..config import TrainConfig
from ..errors import DataError
from .columns import FIELDS, LINE_COLUMN, PROBLEM_COLUMN, may_hold_prompt, row_kind
from .groups import Group, check_agreement, count_comparisons, make_groups
from .load import load_rows
from .messages import unreadable
from .readers import stored, stored_types
from .tokenize import tokenize_dataset

logger = logging.getLogger(__name__)

RowsInMemory: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]
"""Rows in memory, in one of the layouts of `fastdpo.data.rows`."""


_OURS = (LINE_COLUMN, PROBLEM_COLUMN)  # which our readers add, and nobody else


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

    def groups(name: str, given: RowsInMemory | None, source: tuple[str, str]) -> list[Group]:
        if given is not None:
            return _groups(config, tokenizer, vocab_size, name, _in_memory(given, name))
        return _groups(config, tokenizer, vocab_size, source[0], _load(config, *source))

    trained = groups("rows", rows, (str(config.dataset_name), config.dataset_train_split))
    if not config.evaluates:
        return Data(trained, [])
    assert eval_rows is not None or config.eval_source is not None
    return Data(trained, groups("eval_rows", eval_rows, config.eval_source or ("", "")))


def _load(config: TrainConfig, name: str, split: str) -> datasets.Dataset:
    return load_rows(
        name,
        split,
        config_name=config.dataset_config,
        num_proc=config.dataset_num_proc,
        skip_bad_rows=config.skip_bad_rows,
    )


def _groups(
    config: TrainConfig, tokenizer: Any, vocab_size: int | None, name: str, rows: datasets.Dataset
) -> list[Group]:
    """The groups of one split; `name` stands for it in messages."""
    tokens, report = tokenize_dataset(
        rows,
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
        return rows.remove_columns([c for c in rows.column_names if c in _OURS])
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
        expected = "a list of dicts or a datasets.Dataset"
        raise DataError(f"{name}: expected {expected}, got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, row {number}: expected a dict, got {type(row).__name__}")
    columns = list(dict.fromkeys(str(c) for row in rows for c in row if c not in _OURS))
    if not columns:
        raise DataError(f"{name}: has no rows")
    row_kind(columns, name)
    is_text = {c: all(isinstance(row.get(c), str | None) for row in rows) for c in columns}
    # What training does not read may hold anything.
    columns = [c for c in columns if is_text[c] or c in FIELDS or may_hold_prompt(c)]
    encoded = [
        {c: _stored(row.get(c), is_text[c], f"{name}, row {number}: {c}") for c in columns}
        for number, row in enumerate(rows, 1)
    ]
    return datasets.Dataset.from_list(
        encoded, features=datasets.Features(stored_types({c: is_text[c] for c in columns}))
    )


def _stored(value: Any, is_text: bool, where: str) -> Any:
    try:
        problem, kept = unreadable(value), stored(value, is_text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected plain values ({error})") from None
    if problem:
        raise DataError(f"{where}: {problem}")
    return kept
