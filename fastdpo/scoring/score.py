"""`score`: log-probabilities and implicit rewards of all responses of a data set, and how well they
agree with what its rows say.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from ..arguments import check_output
from ..config import TrainConfig
from ..config.datasets import paths_read
from ..data.dataset import RowsInMemory
from ..data.layouts.convert import to_canonical
from ..data.load import Reader
from ..data.write import as_dataset, writer_of
from ..errors import ConfigError, DataError
from ..hub import reached
from ..model.lent import lent
from ..model.load import check_given
from ..terminal import progress_bars, withheld
from .columns import own_names, score_columns, scored_before
from .measures import Accuracy, Values, label_accuracy
from .responses import GroupScores, ResponseScorer, load_response_scorer
from .rows import (
    READERS_OWN,
    ScoredRow,
    holds_responses,
    kind_of,
    make_encoder,
    read_mixture,
    windows,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreResult:
    """What was measured of the rows of a data set."""

    columns: dict[str, list[Any]]
    """New columns by name, an item a row, None where a row could not be scored:

    - of pairs `chosen_logp`, `chosen_tokens` and the same of `rejected`, and `margin`;
    - of single responses `logp`, `tokens`;
    - of several, lists in `response_logps` and `response_tokens`, and `best`, the index of one;
    - with a reference also `ref_logp` and `reward` of each;
    - `unscored`: why a row could not be scored, where one could not.

    Log-probabilities are sums over a response's tokens, in nats.
    """
    summary: dict[str, Any]
    """`rows`, `unscored`, `responses`, `tokens`, `seconds`, `pairs` and, where the rows say which
    responses are better, `accuracy` by measure and, with `by`, `by`: the same of each value.
    """
    rows: datasets.Dataset
    """The rows with every column that they had, and the new ones; those of an earlier score are
    gone.
    """


def score(
    config: TrainConfig,
    rows: RowsInMemory | None = None,
    model: Any = None,
    tokenizer: Any = None,
    *,
    by: str | None = None,
    output: str | Path | None = None,
) -> ScoreResult:
    """Score as `fastdpo score` does: log π(y|x) of every response and, with a reference, its
    implicit reward β (log π(y|x) − log π_ref(y|x)).

    Args:
        config: the keys of `fastdpo train`; read are those of model, reference, data, precision
            and device, `max_length`, `max_tokens_per_batch` and `beta`.
        rows: data in place of `dataset_name`: a list of dicts or a `datasets.Dataset`, in a layout
            for training, or with responses alone: `prompt` and `responses` or `completion`.
        model: a transformers causal language model in place of `model_name_or_path`.
        tokenizer: its tokenizer, in place of the one at `model_name_or_path`.
        by: a column; accuracies are also given for each of its values.
        output: a .jsonl, .jsonl.gz or .parquet file to write the rows to, which must have no other
            columns of the new ones' names.

    Raises:
        FastDPOError: anything wrong with configuration, data or model.
    """
    write = None if output is None else writer_of(Path(output))
    _check(config, rows, model, tokenizer)
    if output is not None:
        check_output(Path(output), paths_read(config.datasets, config.dataset_name))
    with (
        progress_bars(config.disable_tqdm),
        reached(config),
        nullcontext() if model is None else lent(model),
        withheld(),
    ):
        dataset, readable, name = _read(config, rows)
        if by is not None and by not in dataset.column_names:
            raise DataError(f"{name}: no column {by}; there are {', '.join(dataset.column_names)}")
        kind = kind_of(readable, name)
        clashing = [] if scored_before(kind, dataset) else own_names(kind, dataset)
        if clashing and output is not None:
            raise DataError(
                f"{name}: has columns that fastdpo score writes: {', '.join(clashing)}; expected "
                "other names for them"
            )
        if not clashing and (old := own_names(kind, dataset)):
            logger.info(f"{name}: columns of an earlier score are replaced: {', '.join(old)}")
        scorer = load_response_scorer(config, model, tokenizer)
        result = _score(scorer, dataset, readable, name, by)
        if write is not None:
            write(result.rows)
    return result


def _check(config: TrainConfig, rows: Any, model: Any, tokenizer: Any) -> None:
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"config: expected a TrainConfig, got {type(config).__name__}")
    if model is None or tokenizer is None:
        config.require("model_name_or_path")
    if rows is None:
        config.require("dataset_name")
    if model is not None:
        check_given(model, config)
    if (config.devices or 1) > 1:
        raise config.error("devices", "fastdpo score runs on one device; expected 1")


def _read(
    config: TrainConfig, rows: RowsInMemory | None
) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """The rows as they are and in columns that can be scored, and what to call them."""
    if rows is None and config.datasets:
        dataset, name = read_mixture(config)
        return dataset, dataset, name
    name = "rows" if rows is not None else str(config.dataset_name)
    dataset = _load(config) if rows is None else _in_memory(rows)
    return dataset, _readable(config, dataset, name), name


def _load(config: TrainConfig) -> datasets.Dataset:
    reader = Reader(
        config.dataset_train_split,
        config.dataset_config,
        config.dataset_num_proc,
        skip_bad_rows=True,
        all_columns=True,
    )
    return reader.read(str(config.dataset_name))


def _in_memory(rows: RowsInMemory) -> datasets.Dataset:
    if isinstance(rows, datasets.Dataset):
        return rows
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence) or not rows:
        raise DataError("rows: expected a list of dicts or a datasets.Dataset, with rows")
    if not all(isinstance(row, Mapping) for row in rows):
        raise DataError("rows: expected a list of dicts or a datasets.Dataset, with rows")
    return as_dataset(rows)


def _readable(config: TrainConfig, dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    """The same rows in columns that can be scored.

    Raises:
        DataError: of no layout that is known.
    """
    try:
        return to_canonical(
            dataset,
            name,
            layout=config.layout,
            columns=config.columns,
            num_proc=config.dataset_num_proc,
        )
    except DataError:
        named = config.layout is not None or config.columns is not None
        if named or not holds_responses(dataset.column_names):
            raise
        return dataset  # responses of which nothing is said


def _score(
    scorer: ResponseScorer,
    dataset: datasets.Dataset,
    readable: datasets.Dataset,
    name: str,
    by: str | None,
) -> ScoreResult:
    hide = scorer.config.disable_tqdm
    encoder = make_encoder(
        readable, scorer.tokenizer, name, scorer.config.max_length, scorer.vocab_size
    )
    start = time.perf_counter()
    rows: list[ScoredRow] = []
    scores: list[GroupScores | None] = []
    with tqdm(total=len(dataset), desc="score", unit="row", disable=hide) as bar:
        for groups, some in windows(readable, encoder):
            found = scorer(groups)
            rows += some
            scores += [None if row.reason else found[row.group].of(row.places) for row in some]
            bar.update(len(some))
    seconds = time.perf_counter() - start
    values = [None if one is None else one.values(scorer.config.beta) for one in scores]
    columns = score_columns(encoder.kind, rows, scores, values)
    tokens = sum(int(one.tokens.sum()) for one in scores if one is not None)
    summary = {
        "rows": len(rows),
        "unscored": sum(row.reason is not None for row in rows),
        "responses": sum(len(row.places) for row in rows),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "reference": scorer.measured_from,
        **_agreement(rows, values, None if by is None else dataset[by]),
    }
    again = scored_before(encoder.kind, dataset)
    left = {*READERS_OWN, *(own_names(encoder.kind, dataset) if again else ())}
    kept = dataset.remove_columns([c for c in dataset.column_names if c in left])
    for column, items in columns.items():
        if column not in kept.column_names:
            kept = kept.add_column(column, items)
    return ScoreResult(columns, summary, kept)


def _agreement(
    rows: Sequence[ScoredRow], values: Sequence[Values | None], by: Iterable[Any] | None
) -> dict[str, Any]:
    """How many pairs the rows state and how many of them each measure has in the right order."""
    whole, parts = Accuracy(), dict[str, Accuracy]()
    keys: Iterator[Any] = iter(by) if by is not None else iter([None] * len(rows))
    for row, value, key in zip(rows, values, keys, strict=True):
        if value is not None:
            whole.add(value, row.comparisons)
            if by is not None:
                parts.setdefault(str(key), Accuracy()).add(value, row.comparisons)
    said: dict[str, Any] = {"pairs": whole.pairs, "accuracy": whole.shares()}
    if by is not None:
        said["by"] = {
            key: {"pairs": part.pairs, **part.shares()} for key, part in sorted(parts.items())
        }
    labelled = [(v, row.label) for row, v in zip(rows, values, strict=True) if v is not None]
    if labels := label_accuracy([v for v, _ in labelled], [label for _, label in labelled]):
        said["label_accuracy"] = labels
    return said
