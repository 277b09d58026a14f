"""A run's data: the rows of both splits, wherever they are, as tokenised groups."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import datasets

from ..config import TrainConfig
from ..errors import DataError
from ..losses import TrainingLoss, loss_of
from .columns import FIELDS, LINE_COLUMN, MEDIA, PROBLEM_COLUMN, may_hold_prompt, row_kinds
from .grouping import check_agreement, make_groups
from .groups import Groups, describe_units
from .labels import describe_labels
from .layouts.convert import to_canonical
from .load import load_rows
from .messages import unreadable
from .mixture import load_mixture
from .needs import Convert, Known, Needs
from .readers import stored, stored_types
from .tokenize import tokenize_dataset

logger = logging.getLogger(__name__)

RowsInMemory: TypeAlias = datasets.Dataset | datasets.IterableDataset | Sequence[Mapping[str, Any]]
"""Rows in memory, in one of the layouts of `fastdpo.data.layouts`."""


_OURS = (LINE_COLUMN, PROBLEM_COLUMN)  # which our readers add, and nobody else


@dataclass
class Data:
    """Groups to train on and to evaluate on, and the configuration with the loss that the rows'
    layout asks for, where it names none.
    """

    train: Groups
    evaluation: Groups
    config: TrainConfig

    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one response that is trained on."""
        return int(self.train.sequence_lengths().max())


def needs_reference(loss: TrainingLoss, data: Data) -> bool:
    """Whether reference log-probabilities are read: not where GRPO has no penalty, and the data the
    log-probabilities of the policy that sampled it.
    """
    given = all("logp" in Groups.of(each).given for each in (data.train, data.evaluation) if each)
    unread = loss.losses[0].kind == "tokens" and loss.options.get("beta") == 0 and given
    return loss.reference and not unread


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

    def load(name: str, given: RowsInMemory | None, source: tuple[str, str]) -> _Rows:
        if given is not None:
            how = _how(config)
            every = bool(how["layout"] or how["columns"] or how["scores"])
            held = _in_memory(given, name, all_columns=every)
            return _Rows(name, to_canonical(held, name, **how))
        return _Rows(source[0], _load(config, *source))

    if rows is None and config.datasets:
        trained = _mixture(config)
    else:
        trained = load("rows", rows, (str(config.dataset_name), config.dataset_train_split))
    config = config.for_layout(row_kinds(trained.dataset.column_names))
    make = partial(_groups, config, loss_of(config), tokenizer, vocab_size)
    groups = make(trained)
    if note := describe_labels(config, groups, loss_of(config)):
        logger.warning(f"note: {trained.name}: {note}")
    if not config.evaluates:
        return Data(groups, Groups.of([]), config)
    if eval_rows is None and config.eval_source is None:
        raise config.error("eval_dataset_name", "expected the data to evaluate on")
    evaluation = load("eval_rows", eval_rows, config.eval_source or ("", ""))
    return Data(groups, make(evaluation), config)


class _Rows(NamedTuple):
    """The rows of a split, and what to call it in messages."""

    name: str
    dataset: datasets.Dataset


_NEEDED: dict[str, tuple[Known, ...]] = {
    "label": ("label",),
    "advantage": ("scores",),
    "win_rate": ("scores", "comparisons"),
    "rank": ("ranks",),
}


def _needs(loss: TrainingLoss) -> Needs:
    """What the rows have to say for a loss."""
    name = loss.names[0]
    if loss.unit == "comparison":
        return Needs(("comparisons",), name)
    columns = [column for one in loss.losses for column in one.columns]
    if not columns:  # of a loss that looks at responses alone
        return Needs(("label", "scores", "ranks", "comparisons"), name)
    return Needs(_NEEDED[columns[0]], name)


def _how(config: TrainConfig) -> dict[str, Any]:
    """What the configuration says of the layout of rows."""
    needs = _needs(loss_of(config)).columns
    return {
        "layout": config.layout,
        "columns": config.columns,
        "num_proc": config.dataset_num_proc,
        "scores": "comparisons" not in needs and bool({"scores", "ranks"} & set(needs)),
    }


def _load(config: TrainConfig, name: str, split: str) -> datasets.Dataset:
    if config.dataset_streaming:
        logger.info("dataset_streaming: the rows are read to the cache once, before the run")
    return load_rows(
        name,
        split,
        config_name=config.dataset_config,
        skip_bad_rows=config.skip_bad_rows,
        **_how(config),
    )


def _mixture(config: TrainConfig) -> _Rows:
    """The rows of the key `datasets`."""
    name, rows = load_mixture(
        config.datasets,
        seed=config.seed if config.data_seed is None else config.data_seed,
        num_proc=config.dataset_num_proc,
        skip_bad_rows=config.skip_bad_rows,
        layout=config.layout,
        columns=config.columns,
    )
    return _Rows(name, rows)


def _groups(
    config: TrainConfig, loss: TrainingLoss, tokenizer: Any, vocab_size: int | None, rows: _Rows
) -> Groups:
    """The groups of one split."""
    tokens, report = tokenize_dataset(
        rows.dataset,
        tokenizer,
        max_length=config.max_length,
        num_proc=config.dataset_num_proc,
        skip_bad_rows=config.skip_bad_rows,
        max_comparisons_per_group=config.max_comparisons_per_group,
        seed=config.seed,
        vocab_size=vocab_size,
        source=rows.name,
        needs=_needs(loss),
        convert=cast(Convert | None, config.convert),
    )
    groups = make_groups(
        tokens,
        group_prompts=config.group_prompts,
        source=rows.name,
        unit=loss.unit,
        max_length=config.max_length,
        scale_rewards=config.scale_rewards,
        mismatch=config.per_device_train_batch_size if loss.mismatched else None,
    )
    _check_logps(config, loss, groups)
    if loss.whole_step and not (groups.comparisons.values[:, 2] == 1).all():
        raise DataError(
            f"{rows.name}: comparisons have weights, which {' and '.join(loss.names)} cannot take: "
            "it sorts the responses of a batch; expected comparisons without"
        )
    said = describe_units(groups)
    if loss.unit == "comparison":
        said += str(check_agreement(groups))
    else:
        said = f"{said} to train on"
    logger.info(f"data: {report}; {len(groups)} groups, {len(groups.responses)} responses, {said}")
    return groups


def _check_logps(config: TrainConfig, loss: TrainingLoss, groups: Groups) -> None:
    """Raise ConfigError for log-probabilities of whole responses where those of tokens are read."""
    by_tokens = config.importance_sampling_level == "token" and loss.losses[0].kind == "tokens"
    if by_tokens and "logp" in groups.given:
        raise config.error(
            "importance_sampling_level",
            f"expected sequence, since the rows have logps, one for a whole response, for "
            f"{loss.names[0]}, got token",
        )


def _in_memory(rows: RowsInMemory, name: str, *, all_columns: bool) -> datasets.Dataset:
    """Rows as a data set with the union of their columns; of rows in TRL's columns, those that
    training reads or that may hold a prompt, unless all are asked for.
    """
    if isinstance(rows, datasets.IterableDataset):
        logger.info(f"{name}: the stream is read to the cache once, before the run")
        rows = datasets.Dataset.from_generator(
            _stream, gen_kwargs={"rows": rows}, features=rows.features
        )
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
    is_text = {c: all(isinstance(row.get(c), str | None) for row in rows) for c in columns}
    # What training does not read may hold anything.
    chooses = bool(row_kinds(columns)) and not all_columns
    columns = [
        c
        for c in columns
        if is_text[c]
        or c in (*FIELDS, *MEDIA)
        or may_hold_prompt(c)
        or (all(_is_plain(row.get(c)) for row in rows) and not chooses)
    ]
    encoded = [
        {c: _stored(row.get(c), is_text[c], f"{name}, row {number}: {c}") for c in columns}
        for number, row in enumerate(rows, 1)
    ]
    return datasets.Dataset.from_list(
        encoded, features=datasets.Features(stored_types({c: is_text[c] for c in columns}))
    )


def _is_plain(value: Any) -> bool:
    try:
        return unreadable(value) is None
    except (TypeError, ValueError):
        return False


def _stream(rows: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    yield from rows


def _stored(value: Any, is_text: bool, where: str) -> Any:
    try:
        problem, kept = unreadable(value), stored(value, is_text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected plain values ({error})") from None
    if problem:
        raise DataError(f"{where}: {problem}")
    return kept
