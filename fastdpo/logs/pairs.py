"""Exchanges of a log to rows for training.

A log is read twice: once for what is asked and how it was rated, of which some numbers a line are
kept, and once for the texts that are needed. So it may be larger than memory.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from ..errors import DataError
from .exchange import Exchange, at, read_exchange
from .lines import read_lines
from .mask import Masker
from .messages import said
from .plan import Plan, Retries, Seen

To = Literal["pairs", "labels", "groups"]


@dataclass
class Made:
    """Rows, and what became of each line of the log."""

    rows: Iterator[dict[str, Any]]
    outcomes: Counter[str]
    masked: Counter[str]


def make_rows(
    paths: Sequence[Path],
    to: To = "pairs",
    *,
    names: Mapping[str, str] | None = None,
    min_margin: float = 0.0,
    masker: Masker | None = None,
) -> Made:
    """Rows from logs, read in this order.

    Args:
        paths: JSONL files, or JSON lists, which may be packed by gzip or zstd.
        to: "pairs": the best and the worst answer to a prompt, an edited answer and what it was,
            an answer and the one that was asked for in its place; "labels": each rated answer;
            "groups": all rated answers to a prompt with their ratings.
        names: what fields are called, where they have other names; with dots for inner ones.
        min_margin: ratings that differ by less, or not at all, make no pair.
        masker: what takes personal data out; None keeps it.

    Raises:
        DataError: a file that cannot be read, or a name in `names` that no line has.
    """
    names = names or {}
    masker = masker or _Unmasked()
    plan, retries = Plan(), Retries()
    prompts: dict[bytes, list[Seen]] = defaultdict(list)
    missing = set(names.values())
    for number, line in read_lines(paths):
        missing = {name for name in missing if isinstance(line, str) or at(line, name) is None}
        found = line if isinstance(line, str) else read_exchange(line, names)
        if isinstance(found, str):
            plan.outcomes[number] = found
            continue
        seen = _summary(number, found, masker)
        prompts[seen.key].append(seen)
        retries.add(seen, found)
    if missing and (plan.outcomes or prompts):
        raise DataError(f"no line has {', '.join(sorted(missing))}, which columns name")
    masker.counts.clear()
    if to == "pairs":
        plan.plan_pairs(prompts, retries, min_margin)
    elif to == "groups":
        plan.plan_groups(prompts)
    else:
        plan.plan_labels(prompts)
    outcomes = Counter(plan.outcomes.values())
    return Made(_rows(paths, names, plan, masker), outcomes, masker.counts)


class _Unmasked(Masker):
    def __call__(self, value: Any) -> Any:
        return value


def _summary(number: int, found: Exchange, masker: Masker) -> Seen:
    """What is kept of a line: answers are compared as they are written, without personal data."""
    written = masker(found.answer)
    answer = xxhash.xxh3_64_intdigest(_words(written).encode())
    edited = found.edited is not None and said(masker(found.edited)) != said(written)
    return Seen(number, found.key, answer, found.rating, found.kind, edited)


def _words(answer: list[dict[str, Any]]) -> str:
    parts = [[role, " ".join(text.split()), *calls] for role, text, *calls in said(answer)]
    return json.dumps(parts, sort_keys=True)


def _rows(
    paths: Sequence[Path], names: Mapping[str, str], plan: Plan, masker: Masker
) -> Iterator[dict[str, Any]]:
    """The rows, each as soon as the last of its lines has been read."""
    wanted: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    scores = {tuple(n for n, _ in group): [s for _, s in group] for group in plan.groups}
    jobs: list[tuple[int, ...]] = [*plan.pairs, *scores]
    for job in jobs:
        for number in job:
            wanted[number].append(job)
    edits, known, written = set(plan.edits), dict[int, Exchange](), set[bytes]()
    left = Counter({job: len(job) for job in jobs})
    needed = Counter(number for job in jobs for number in job)
    for number, line in read_lines(paths):
        found = line if isinstance(line, str) else read_exchange(line, names)
        if isinstance(found, str):
            continue
        made = []
        if number in edits:
            made.append(_row(found, chosen=found.edited, rejected=found.answer))
        if number in plan.labels:
            made.append(_row(found, completion=found.answer, label=plan.labels[number]))
        if number in wanted:
            known[number] = found
        for job in wanted.get(number, ()):
            left[job] -= 1
            if left[job]:
                continue
            parts = [known[n] for n in job]
            if job in scores:
                responses = [part.answer for part in parts]
                made.append(_row(parts[0], responses=responses, scores=scores[job]))
            else:
                better, worse = parts
                made.append(_row(better, chosen=better.answer, rejected=worse.answer))
            for n in job:
                needed[n] -= 1
                if not needed[n]:
                    del known[n]
        for row in made:
            row = masker(row)
            digest = xxhash.xxh3_128_digest(json.dumps(row, sort_keys=True).encode())
            if digest not in written:
                written.add(digest)
                yield row


def _row(asked: Exchange, **rest: Any) -> dict[str, Any]:
    tools = {"tools": asked.tools} if asked.tools else {}
    return {"prompt": asked.messages, **rest, **tools}
