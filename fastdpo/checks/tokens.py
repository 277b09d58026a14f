"""Lengths in tokens, and what truncation and token boundaries do to rows."""

from typing import Any

import datasets
import numpy as np

from ..data.needs import COMPARISONS, Needs
from ..data.notes import BOUNDARY_MOVED, DOUBLE_BOS, IDENTICAL_AFTER_TRUNCATION, TRUNCATED
from ..data.tokenize import tokenize_dataset
from .findings import Finding, Level
from .texts import Texts

_NOTED: tuple[tuple[str, Level, str], ...] = (
    (TRUNCATED, "warning", "rows are cut to max_length"),
    (IDENTICAL_AFTER_TRUNCATION, "error", "rows compare responses that are the same once cut"),
    (BOUNDARY_MOVED, "note", "rows have a token over the boundary of prompt and response"),
    (DOUBLE_BOS, "warning", "rows begin with BOS twice"),
)
SHARES = (0.0, 0.5, 0.9, 0.99, 1.0)


def token_findings(
    dataset: datasets.Dataset,
    source: str,
    tokenizer: Any,
    max_length: int | None,
    num_proc: int | None = None,
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings of the tokenised rows, and their lengths: of prompts and of better and worse
    responses, quantiles and a histogram each.
    """
    labelled = "label" in dataset.column_names and "completion" in dataset.column_names
    needs = Needs(("label",), "kto") if labelled else COMPARISONS
    tokens, report = tokenize_dataset(
        dataset,
        tokenizer,
        max_length=max_length,
        num_proc=num_proc,
        skip_bad_rows=True,
        needs=needs,
        source=source,
    )
    findings = [
        Finding(name, level, n, report.rows_in, f"{n} {text}")
        for name, level, text in _NOTED
        if (n := report.noted[name])
    ]
    if n := report.dropped_prompt_too_long:
        text = f"{n} rows are dropped: the prompt alone reaches max_length"
        findings.append(Finding("prompt_too_long", "warning", n, report.rows_in, text))
    return findings, lengths_of("tokens", *_counts(tokens))


def word_lengths(texts: Texts) -> dict[str, Any]:
    """The same lengths in words, where there is no tokenizer."""
    better, worse = texts.compared
    counts = np.array([len(text.split()) for text in texts.responses], np.int64)
    prompts = np.array([len(text.split()) for text in texts.prompts], np.int64)
    return lengths_of("words", prompts, counts[better], counts[worse])


def _counts(tokens: datasets.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of the prompts, and of the better and the worse responses."""
    prompts: list[int] = []
    better: list[int] = []
    worse: list[int] = []
    for batch in tokens.with_format(None).iter(1000):
        prompts += map(len, batch["prompt_ids"])
        for responses, winners, losers, labels in zip(
            batch["response_ids"], batch["winners"], batch["losers"], batch["labels"], strict=True
        ):
            sizes = [*map(len, responses)]
            better += [sizes[w] for w in winners] + (sizes if labels == [True] else [])
            worse += [sizes[loser] for loser in losers] + (sizes if labels == [False] else [])
    return np.array(prompts), np.array(better), np.array(worse)


def lengths_of(
    unit: str, prompts: np.ndarray, better: np.ndarray, worse: np.ndarray
) -> dict[str, Any]:
    """Quantiles and histograms, for a table and a chart."""
    found: dict[str, Any] = {"unit": unit}
    top = max((int(some.max()) for some in (prompts, better, worse) if len(some)), default=1)
    edges = np.unique(np.linspace(0, top + 1, 31).astype(np.int64))
    found["edges"] = edges.tolist()
    for name, some in (("prompt", prompts), ("chosen", better), ("rejected", worse)):
        if len(some):
            found[name] = {
                "quantiles": np.quantile(some, SHARES).round(1).tolist(),
                "mean": round(float(some.mean()), 2),
                "histogram": np.histogram(some, edges)[0].tolist(),
            }
    return found
