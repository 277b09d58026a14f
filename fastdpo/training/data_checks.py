"""The short form of `fastdpo check` that a run begins with. Whatever goes wrong with it is said in
one line and stops nothing.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets

from ..checks.check import check_quickly
from ..checks.show import brief
from ..config import TrainConfig
from ..data.columns import FIELDS, row_kinds
from ..data.dataset import RowsInMemory
from ..data.layouts.convert import to_canonical
from ..data.load import load_rows
from ..data.mixture import each_once, load_mixture
from ..errors import one_line

logger = logging.getLogger(__name__)

LINES = 4
"""Findings that are said, after a line on all of them."""


def check_data(
    config: TrainConfig, rows: RowsInMemory | None, eval_rows: RowsInMemory | None
) -> dict[str, Any] | None:
    """Look at the rows that a run has read, and log what was found in at most five lines.

    Args:
        config: of the run.
        rows: in place of those that it names.
        eval_rows: in place of those to evaluate on.

    Returns:
        What `Checked.as_dict` gives; None where the rows could not be looked at.
    """
    try:
        with _unheard():
            train, test = _read(config, rows, eval_rows)
            found = check_quickly(*train, test)
    except Exception as error:
        logger.warning(f"checks: the rows were not looked at ({one_line(error)}); training goes on")
        return None
    said = found.summary
    part = "" if said["read"] == said["rows"] else f", of which {said['read']} were looked at"
    lines = brief(found)
    counts = [f"{said[level]} {level}{'s' * (said[level] != 1)}" for level in ("error", "warning")]
    what = ", ".join(counts) if lines else "nothing was found"
    more = f" ({len(lines) - LINES} more in data_checks.json)" if len(lines) > LINES else ""
    logger.info(f"checks: {said['rows']} rows{part}: {what}{more}; fastdpo check looks at more")
    for line in lines[:LINES]:
        logger.warning(f"checks: {line}")
    return found.as_dict()


_Named = tuple[datasets.Dataset, str]


def _read(
    config: TrainConfig, rows: RowsInMemory | None, eval_rows: RowsInMemory | None
) -> tuple[_Named, _Named | None]:
    """The rows of both splits and what to call them, from the cache that the run's own reading has
    filled.
    """
    test = None
    if eval_rows is not None:
        test = _given(config, eval_rows, "eval_rows")
    elif config.eval_source is not None:
        test = _loaded(config, *config.eval_source)
    if rows is not None:
        return _given(config, rows, "rows"), test
    if config.datasets:
        seed = config.seed if config.data_seed is None else config.data_seed
        name, mixed = load_mixture(
            each_once(config.datasets), seed=seed, **_how(config), skip_bad_rows=True
        )
        return (mixed, str(name)), test
    return _loaded(config, str(config.dataset_name), config.dataset_train_split), test


def _how(config: TrainConfig) -> dict[str, Any]:
    names = {"layout": "layout", "columns": "columns", "num_proc": "dataset_num_proc"}
    return {name: getattr(config, key) for name, key in names.items()}


def _loaded(config: TrainConfig, name: str, split: str) -> _Named:
    how = {**_how(config), "config_name": config.dataset_config}
    return load_rows(name, split, skip_bad_rows=config.skip_bad_rows, **how), name


def _given(config: TrainConfig, rows: RowsInMemory, name: str) -> _Named:
    """Rows in memory; of those in TRL's columns, what these hold."""
    if isinstance(rows, datasets.IterableDataset):
        raise TypeError(f"{name} are a stream")
    if not isinstance(rows, datasets.Dataset):
        columns = {column for row in rows for column in row}
        held = columns & {*FIELDS} if row_kinds(columns) else columns
        kept = [name for name in dict.fromkeys(c for row in rows for c in row) if name in held]
        rows = datasets.Dataset.from_list(_of_columns(rows, kept))
    return to_canonical(rows, name, **_how(config)), name


def _of_columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in names} for row in rows]


@contextmanager
def _unheard() -> Iterator[None]:
    """Without what reading says, which has been said."""
    read = logging.getLogger("fastdpo.data")
    before = read.level
    read.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        read.setLevel(before)
