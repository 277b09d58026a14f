"""A data set of raw rows to a cached data set of token ids."""

import copy
import json
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
import xxhash
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from .columns import (
    FIELDS,
    LINE_COLUMN,
    PROBLEM_COLUMN,
    may_hold_prompt,
    other_texts,
    row_kind,
)
from .convert import convert_rows
from .encode import KEPT, Encoder
from .encoded import FEATURES
from .load import explain_disk
from .messages import template_roles
from .needs import COMPARISONS, Convert, Needs
from .notes import EMPTY_PROMPT, SAME_SCORES
from .processes import processes_for
from .prompts import repeats_prompt
from .report import TokenizeReport, make_report

COLUMNS = (
    "prompt_ids",
    "response_ids",
    "winners",
    "losers",
    "weights",
    "labels",
    "scores",
    "ranks",
    "logps",
    "digests",
)
"""Of a tokenised data set:

- `prompt_ids`: list of int32;
- `response_ids`: a list of int32 for each response, completion tokens only, cut to `max_length`
  with the prompt; in a labelled row not cut, because losses score it after other prompts too;
- `winners`, `losers`: lists of int32, indices into `response_ids`; `weights`: list of float32;
- `labels`: one bool in a labelled row, else none;
- `scores` (float64, the higher the better), `ranks` (int32, 0 the best, no number left out) and
  `logps` (float64, nats, of the policy that made the responses): one a response, or none;
- `digests` (int64): two numbers, 128 bits, for the prompt and then for each response, see
  `fastdpo.data.digests`.
"""
# To be raised whenever the same arguments give other tokens than before: it is part of every
# cache key.
_VERSION = 6
_BATCH_SIZE = 512


def tokenize_dataset(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    skip_bad_rows: bool = False,
    max_comparisons_per_group: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    needs: Needs = COMPARISONS,
    convert: Convert | None = None,
    source: str = "dataset",
) -> tuple[datasets.Dataset, TokenizeReport]:
    """Tokenise preference data as TRL 1.16 does, into `COLUMNS`, and cache the result.

    The cache is that of the `datasets` library, under a key made of the rows, of what the
    tokenizer does and of the arguments that change tokens. A data set in memory is not cached.

    Args:
        dataset: raw rows in one of the layouts of `fastdpo.data.rows`.
        tokenizer: any transformers tokenizer, with a chat template where rows hold messages.
        max_length: tokens of a prompt and a response; None for no limit. Rows whose prompt alone
            reaches it are dropped, longer responses keep their start.
        num_proc: processes to tokenise with; None for as many as the rows keep busy.
        skip_bad_rows: drop and count rows that cannot be trained on instead of raising.
        max_comparisons_per_group: of a group's comparisons, keep at most so many, selected by
            `seed` and by what the row says.
        seed: of that selection.
        vocab_size: rows of the model's embedding, to refuse tokens outside it.
        needs: what the loss has to know of a row's responses.
        convert: a conversion to go before: see `fastdpo.data.convert`.
        source: what to call the data in messages; the path where it is a JSONL file, so that a row
            is named by its line.

    Raises:
        DataError: rows of another layout than the loss needs, or where `convert` has nothing to do;
            naming the first row that cannot be trained on; or where none is left.
        ModelError: a tokenizer without the chat template or the eos_token that the rows need.
        ConfigError: a setting that cannot be honoured.
    """
    for name, limit, least in (
        ("max_length", max_length, 2),
        ("max_comparisons_per_group", max_comparisons_per_group, 1),
    ):
        if limit is not None and limit < least:
            raise ConfigError(f"{name}: expected at least {least} or null, found {limit}")
    if len(dataset) == 0:
        raise DataError(f"{source}: has no rows")
    row_kind(dataset.column_names, source)
    num_rows, others, conversion = len(dataset), other_texts(dataset), ""
    watched = tuple(filter(may_hold_prompt, others))
    wanted = (*FIELDS, LINE_COLUMN, PROBLEM_COLUMN, *watched)
    dataset = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    if convert is not None:
        roles = template_roles(tokenizer.chat_template)
        dataset, conversion = convert_rows(dataset, convert, roles, source)
    kind = needs.choose_kind(dataset.column_names, source, convert)
    encoder = Encoder(
        tokenizer=tokenizer,
        kind=kind,
        num_rows=num_rows,
        source=source,
        max_length=max_length,
        vocab_size=vocab_size,
        max_comparisons=max_comparisons_per_group,
        seed=seed,
        skip_bad_rows=skip_bad_rows,
        needs=needs,
        watched=watched,
        repeated=repeats_prompt(dataset, kind),
    )
    encoded = _encode(dataset, encoder, num_proc)
    report = make_report(encoded, source, num_rows, conversion)
    if report.skipped and not skip_bad_rows:
        raise DataError(report.reasons[0])
    report.warn(watched)
    if report.rows_out == 0:
        hint = f" (max_length is {max_length})" if report.dropped_prompt_too_long else ""
        raise DataError(f"{report}{hint}; expected at least one")
    if report.noted[SAME_SCORES] == report.rows_out:
        raise DataError(f"{report}; expected some whose responses have different ones")
    if report.noted[EMPTY_PROMPT] == report.rows_out and others:
        raise DataError(
            f"{source}: no row has a prompt, and the text of {', '.join(others)} is not read; "
            "expected the prompt in a column named prompt, or at the start of chosen and rejected"
        )
    return _keep(encoded, num_proc), report


def _encode(dataset: datasets.Dataset, encoder: Encoder, num_proc: int | None) -> datasets.Dataset:
    with explain_disk(encoder.source):
        return dataset.with_format(None).map(
            encoder,
            batched=True,
            batch_size=_BATCH_SIZE,
            with_indices=True,
            num_proc=processes_for(len(dataset), num_proc),
            remove_columns=dataset.column_names,
            features=FEATURES,
            new_fingerprint=_cache_key(dataset, encoder),
            desc=f"Tokenizing {encoder.source}",
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
        "needs": sorted(encoder.needs.columns),
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


def _keep(encoded: datasets.Dataset, num_proc: int | None) -> datasets.Dataset:
    """The rows to train on, in the contract's columns, without an indices mapping."""
    outcome = encoded.data["outcome"].to_numpy()
    columns = encoded.select_columns(list(COLUMNS))
    kept = np.flatnonzero(outcome == KEPT)
    if len(kept) == len(outcome):
        return columns
    selected = columns.select(kept)
    return selected.flatten_indices(
        num_proc=num_proc, new_fingerprint=f"{encoded._fingerprint}-kept"
    )
