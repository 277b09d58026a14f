"""A data set of raw rows to a cached data set of token ids."""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
import xxhash
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from .encode import (
    BAD,
    FEATURES,
    IDENTICAL,
    KEPT,
    NO_COMPARISON,
    PROMPT_TOO_LONG,
    Encoder,
)
from .readers import row_label
from .rows import FIELDS, LINE_COLUMN, PROBLEM_COLUMN, row_kind

logger = logging.getLogger(__name__)

COLUMNS = ("prompt_ids", "response_ids", "winners", "losers", "weights", "labels")
# To be raised whenever the same arguments give other tokens than before: it is part of every
# cache key.
_VERSION = 1
_BATCH_SIZE = 512
_REASONS = 5


@dataclass(frozen=True)
class TokenizeReport:
    """What became of the rows; `rows_in` is the sum of `rows_out`, the dropped and the skipped.

    Attributes:
        source: what the rows came from.
        rows_in: rows before.
        rows_out: rows after.
        dropped_prompt_too_long: rows whose prompt alone reaches `max_length`.
        dropped_no_comparison: groups whose scores are all equal or that state no comparison.
        skipped: rows that cannot be trained on, those with identical responses among them.
        identical_pairs: skipped rows that compare two identical responses.
        truncated: rows with a response cut to `max_length`.
        identical_after_truncation: rows kept although two compared responses differ only in what
            was cut off; they have no gradient.
        boundary_moved: rows whose tokenised prompt is not how the full sequence begins.
        reasons: the first few reasons for skipping, each with its row.
    """

    source: str
    rows_in: int
    rows_out: int
    dropped_prompt_too_long: int = 0
    dropped_no_comparison: int = 0
    skipped: int = 0
    identical_pairs: int = 0
    truncated: int = 0
    identical_after_truncation: int = 0
    boundary_moved: int = 0
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line that names only what happened."""
        counts = {
            "dropped, the prompt alone reaching max_length": self.dropped_prompt_too_long,
            "dropped without a comparison": self.dropped_no_comparison,
            "skipped as bad": self.skipped - self.identical_pairs,
            "skipped with identical responses": self.identical_pairs,
            "truncated to max_length": self.truncated,
            "identical once truncated": self.identical_after_truncation,
        }
        notes = "".join(f"; {count} {what}" for what, count in counts.items() if count)
        return f"{self.source}: {self.rows_out} of {self.rows_in} rows kept{notes}"


def tokenize_dataset(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    skip_bad_rows: bool = False,
    max_comparisons_per_group: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    source: str = "dataset",
) -> tuple[datasets.Dataset, TokenizeReport]:
    """Tokenise preference data as TRL 1.16 does, and cache the result.

    The columns are `prompt_ids` (list of int32), `response_ids` (a list of int32 for each response:
    completion tokens only, cut to `max_length` with the prompt), `winners` and `losers` (lists of
    int32, indices into `response_ids`), `weights` (list of float32) and `labels` (one bool in a row
    of KTO data, else none).

    The cache is that of the `datasets` library, under a key made of the rows, of what the
    tokenizer does and of the arguments that change tokens. A data set in memory is not cached.

    Args:
        dataset: raw rows in one of the layouts of `fastdpo.data.rows`.
        tokenizer: any transformers tokenizer, with a chat template where rows hold messages.
        max_length: tokens of a prompt and a response; None for no limit. Rows whose prompt alone
            reaches it are dropped, longer responses keep their start.
        truncation_mode: only "keep_start".
        num_proc: processes to tokenise with.
        skip_bad_rows: drop and count rows that cannot be trained on instead of raising.
        max_comparisons_per_group: of a group's comparisons, keep at most so many, chosen by `seed`
            and by what the row says.
        seed: of that choice.
        vocab_size: rows of the model's embedding, to refuse tokens outside it.
        source: what to call the data in messages; the path where it is a JSONL file, so that a row
            is named by its line.

    Raises:
        DataError: naming the first row that cannot be trained on, or where none is left.
        ModelError: a tokenizer without the chat template or the eos_token that the rows need.
        ConfigError: a setting that cannot be honoured.
    """
    _check_settings(max_length, truncation_mode, max_comparisons_per_group)
    if len(dataset) == 0:
        raise DataError(f"{source}: has no rows")
    wanted = (*FIELDS, LINE_COLUMN, PROBLEM_COLUMN)
    dataset = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    encoder = Encoder(
        tokenizer=tokenizer,
        kind=row_kind(dataset.column_names, source),
        num_rows=len(dataset),
        source=source,
        max_length=max_length,
        vocab_size=vocab_size,
        max_comparisons=max_comparisons_per_group,
        seed=seed,
        skip_bad_rows=skip_bad_rows,
    )
    encoded = dataset.with_format(None).map(
        encoder,
        batched=True,
        batch_size=_BATCH_SIZE,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        features=FEATURES,
        new_fingerprint=_cache_key(dataset, encoder),
        desc=f"Tokenizing {source}",
    )
    report = _make_report(encoded, source)
    if report.skipped and not skip_bad_rows:
        raise DataError(report.reasons[0])
    _log(report, max_length)
    return _keep(encoded, num_proc), report


def _check_settings(
    max_length: int | None, truncation_mode: str, max_comparisons_per_group: int | None
) -> None:
    if truncation_mode != "keep_start":
        raise ConfigError(
            f"truncation_mode: {truncation_mode!r} cannot be honoured, expected 'keep_start': cut "
            "at its start, a prompt differs from response to response and cannot be shared by them"
        )
    if max_length is not None and max_length < 2:
        raise ConfigError(f"max_length: expected at least 2 or null, found {max_length}")
    if max_comparisons_per_group is not None and max_comparisons_per_group < 1:
        raise ConfigError(
            "max_comparisons_per_group: expected at least 1 or null, "
            f"found {max_comparisons_per_group}"
        )


def _cache_key(dataset: datasets.Dataset, encoder: Encoder) -> str:
    key = {
        "version": _VERSION,
        "libraries": [tokenizers.__version__, transformers.__version__],
        "rows": dataset._fingerprint,
        "tokenizer": tokenizer_content(encoder.tokenizer),
        "max_length": encoder.max_length,
        "vocab_size": encoder.vocab_size,
        "max_comparisons": encoder.max_comparisons,
        "seed": None if encoder.max_comparisons is None else encoder.seed,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(key, sort_keys=True).encode())


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer's ids depend on, as JSON, and nothing that using the tokenizer changes.

    Padding and truncation are left out: a fast tokenizer keeps the last call's, and we use neither.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = datasets.fingerprint.Hasher.hash(tokenizer)
    else:
        if backend.padding is not None or backend.truncation is not None:
            backend = copy.deepcopy(backend)
            backend.no_padding()
            backend.no_truncation()
        content = xxhash.xxh3_128_hexdigest(backend.to_str().encode())
    return {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "content": content,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
    }


def _make_report(encoded: datasets.Dataset, source: str) -> TokenizeReport:
    table: Mapping[str, Any] = encoded.data
    outcome = table["outcome"].to_numpy()
    counts = np.bincount(outcome, minlength=NO_COMPARISON + 1)
    reasons = []
    for index in np.flatnonzero((outcome == BAD) | (outcome == IDENTICAL))[:_REASONS].tolist():
        label = row_label(source, index, len(outcome), table["line"][index].as_py())
        reasons.append(f"{label}: {table['reason'][index].as_py()}")
    return TokenizeReport(
        source=source,
        rows_in=len(outcome),
        rows_out=int(counts[KEPT]),
        dropped_prompt_too_long=int(counts[PROMPT_TOO_LONG]),
        dropped_no_comparison=int(counts[NO_COMPARISON]),
        skipped=int(counts[BAD] + counts[IDENTICAL]),
        identical_pairs=int(counts[IDENTICAL]),
        reasons=tuple(reasons),
        **{
            name: int(table[name].to_numpy().sum())
            for name in ("truncated", "identical_after_truncation", "boundary_moved")
        },
    )


def _log(report: TokenizeReport, max_length: int | None) -> None:
    for reason in report.reasons:
        logger.warning("skipped: %s", reason)
    if report.boundary_moved:
        logger.warning(
            "%s: in %d of %d rows the tokenised prompt is not how prompt and response begin "
            "(tokens merge across the boundary, or the chat template renders a prompt alone "
            "differently); the response starts where they part, so it trains on a context that "
            "generation never sees",
            report.source,
            report.boundary_moved,
            report.rows_in,
        )
    if report.rows_out == 0:
        hint = f" (max_length is {max_length})" if report.dropped_prompt_too_long else ""
        raise DataError(f"{report}{hint}; expected at least one")


def _keep(encoded: datasets.Dataset, num_proc: int | None) -> datasets.Dataset:
    """The rows to train on, in the contract's columns, without an indices mapping."""
    outcome = encoded.data["outcome"].to_numpy()
    columns = encoded.select_columns(list(COLUMNS))
    kept = np.flatnonzero(outcome == KEPT)
    if len(kept) == len(outcome):
        return columns
    chosen = columns.select(kept)
    return chosen.flatten_indices(num_proc=num_proc, new_fingerprint=f"{encoded._fingerprint}-kept")
