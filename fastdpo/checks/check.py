"""All checks of a data set, and the few that every run begins with."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import datasets

from ..data.sources import Mixture
from ..errors import ConfigError
from .duplicates import contradictions, exact_duplicates, near_duplicates, repeated_responses
from .faults import (
    clipped_responses,
    empty_responses,
    identical_responses,
    special_tokens,
    templated_texts,
    unreadable_rows,
)
from .findings import LEVELS, Finding
from .formats import format_bias, length_bias, opening_bias
from .languages import languages
from .overlap import shared_prompts
from .texts import Texts, read_texts
from .tokens import token_findings, word_lengths

_QUICK: tuple[Callable[[Texts], Iterable[Finding]], ...] = (
    empty_responses,
    identical_responses,
    contradictions,
    exact_duplicates,
    length_bias,
)
_THOROUGH: tuple[Callable[[Texts], Iterable[Finding]], ...] = (
    unreadable_rows,
    *_QUICK,
    near_duplicates,
    repeated_responses,
    format_bias,
    opening_bias,
    templated_texts,
    special_tokens,
    clipped_responses,
    languages,
)
QUICK_ROWS = 20_000
"""Of more rows, the checks before a run read so many."""


@dataclass
class Checked:
    """What the checks of a data set found.

    Attributes:
        summary: rows, responses, pairs, seconds, and how many findings there are of each level;
            of several data sets read as one, `parts`: the name, first and last row of each.
        findings: the gravest first.
        lengths: see `lengths_of`.
    """

    summary: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    lengths: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, and for the report of a run."""
        findings = [finding.as_dict() for finding in self.findings]
        return {"summary": self.summary, "findings": findings, "lengths": self.lengths}


def check(
    dataset: datasets.Dataset,
    source: str,
    test: tuple[datasets.Dataset, str] | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    num_proc: int | None = None,
    also: Iterable[Finding] = (),
) -> Checked:
    """Every check that needs no model.

    Args:
        dataset: rows in one of the layouts for training.
        source: what to call them.
        test: rows to evaluate on and what to call those, whose prompts should not be trained on.
        tokenizer: lengths are in tokens and truncation is looked at, if it is given.
        max_length: tokens of prompt and response.
        num_proc: processes to tokenise with.
        also: what was found in another way.

    Raises:
        DataError: columns of no layout.
    """
    start = time.perf_counter()
    texts = read_texts(dataset, source)
    findings = [*_all(_THOROUGH, texts), *also]
    if test is not None:
        held_out = read_texts(*test)

        def near_shared_prompts(train: Texts) -> Iterator[Finding]:
            return shared_prompts(train, held_out)

        findings += _all((near_shared_prompts,), texts)
    if tokenizer is None:
        lengths = word_lengths(texts)
    else:
        some, lengths = token_findings(dataset, source, tokenizer, max_length, num_proc)
        findings += some
    return _summed(texts, findings, lengths, source, len(dataset), start)


def check_quickly(
    dataset: datasets.Dataset, source: str, test: tuple[datasets.Dataset, str] | None = None
) -> Checked:
    """The checks of a few seconds, on at most `QUICK_ROWS` rows, that a run begins with."""
    start = time.perf_counter()
    texts = read_texts(dataset, source, QUICK_ROWS)
    findings = list(_all(_QUICK, texts))
    if test is not None:
        findings += shared_prompts(texts, read_texts(*test, QUICK_ROWS), near=False)
    return _summed(texts, findings, word_lengths(texts), source, len(dataset), start)


def _all(checks: Iterable[Callable[[Texts], Iterable[Finding]]], texts: Texts) -> Iterator[Finding]:
    """What the checks find; where one lacks its library, a note says so."""
    for one in checks:
        try:
            yield from one(texts)
        except ConfigError as error:
            yield Finding(one.__name__, "note", 0, 0, f"not looked at: {error}")


def _summed(
    texts: Texts, findings: list[Finding], lengths: dict[str, Any], source: str, of: int,
    start: float,
) -> Checked:  # fmt: skip
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    summary = {
        "source": source,
        **_parts(source),
        "rows": of,
        "read": len(texts.rows) + len(texts.bad),
        "layout": texts.kind,
        "responses": len(texts.responses),
        "pairs": len(texts.pairs),
        "seconds": round(time.perf_counter() - start, 2),
        **{level: sum(f.level == level for f in findings) for level in LEVELS},
    }
    return Checked(summary, findings, lengths)


def _parts(source: str) -> dict[str, Any]:
    if not isinstance(source, Mixture):
        return {}
    ends = accumulate(part.length for part in source.parts)
    named = zip(source.parts, ends, strict=True)
    return {"parts": [[part.name, end - part.length + 1, end] for part, end in named]}
