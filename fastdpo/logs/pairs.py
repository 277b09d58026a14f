"""Exchanges of a log to rows for training.

A log is read twice: once for what is asked and how it was rated, of which some numbers a line are
kept, and once for the texts that are needed. So it may be larger than memory.
"""

import contextlib
import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from ..errors import DataError
from .exchange import Exchange, read_exchange, said
from .mask import Masker

To = Literal["pairs", "labels", "groups"]
USED = "used"
_SINGLE = "nothing to compare it with"


@dataclass(frozen=True)
class _Seen:
    """What is kept of a line."""

    number: int
    answer: int  # a hash
    rating: float | None
    thumb: bool
    edited: bool

    @property
    def value(self) -> float:
        """The rating of one that has any."""
        assert self.rating is not None
        return self.rating


@dataclass
class Made:
    """Rows, and what became of each line of the log."""

    rows: Iterator[dict[str, Any]]
    outcomes: Counter[str]
    masked: Counter[str]


@dataclass
class _Plan:
    """Rows to make: lines by their numbers, the better first; the answers that were edited."""

    pairs: list[tuple[int, int]] = field(default_factory=list)
    edits: list[int] = field(default_factory=list)
    groups: list[list[tuple[int, float]]] = field(default_factory=list)
    labels: dict[int, bool] = field(default_factory=dict)
    outcomes: dict[int, str] = field(default_factory=dict)


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
        paths: JSONL files, which may be gzipped.
        to: "pairs": the best and the worst answer to a prompt, an edited answer and what it was,
            an answer and the one that was asked for in its place; "labels": each rated answer;
            "groups": all rated answers to a prompt with their ratings.
        names: what fields are called, where they have other names; with dots for inner ones.
        min_margin: ratings that differ by less, or not at all, make no pair.
        masker: what takes personal data out; None keeps it.

    Raises:
        DataError: a file that cannot be read.
    """
    names = names or {}
    plan = _Plan()
    prompts: dict[bytes, list[_Seen]] = defaultdict(list)
    places: dict[str, int] = {}
    retries: list[tuple[bytes, _Seen, int | None]] = []
    talks: dict[tuple[str | None, bytes], int] = {}
    seen_lines: set[bytes] = set()
    for number, found in _exchanges(paths, names):
        if isinstance(found, str):
            plan.outcomes[number] = found
            continue
        seen, key = _summary(number, found), found.key
        same = xxhash.xxh3_128_digest(repr((key, seen.answer, seen.rating, seen.edited)).encode())
        if same in seen_lines and not found.edited:
            plan.outcomes[number] = "says what an earlier line says"
            continue
        seen_lines.add(same)
        prompts[key].append(seen)
        before = talks.get((found.conversation, key))
        if found.name is not None:
            places[found.name] = number
        if found.retry_of is not None:
            retries.append((key, seen, places.get(found.retry_of)))
        elif found.regenerated:
            retries.append((key, seen, before))
        talks[found.conversation, key] = number
    if to == "pairs":
        _plan_pairs(plan, prompts, retries, min_margin)
    elif to == "groups":
        _plan_groups(plan, prompts)
    else:
        _plan_labels(plan, prompts)
    outcomes = Counter(plan.outcomes.values())
    masker = masker or _Unmasked()
    return Made(_rows(paths, names, plan, masker), outcomes, masker.counts)


class _Unmasked(Masker):
    def __call__(self, value: Any) -> Any:
        return value


def _summary(number: int, found: Exchange) -> _Seen:
    answer = xxhash.xxh3_64_intdigest(_words(found.answer).encode())
    edited = found.edited is not None and said(found.edited) != said(found.answer)
    return _Seen(number, answer, found.rating, found.thumb, edited)


def _words(answer: list[dict[str, Any]]) -> str:
    parts = [[role, " ".join(text.split()), *calls] for role, text, *calls in said(answer)]
    return json.dumps(parts, sort_keys=True)


def _plan_pairs(
    plan: _Plan,
    prompts: Mapping[bytes, list[_Seen]],
    retries: Sequence[tuple[bytes, _Seen, int | None]],
    min_margin: float,
) -> None:
    for answers in prompts.values():
        for one in answers:
            if one.edited:
                plan.edits.append(one.number)
                plan.outcomes[one.number] = USED
        rated = [one for one in answers if one.rating is not None]
        if len(rated) >= 2:
            best = max(rated, key=lambda one: one.value)
            worst = min(rated, key=lambda one: one.value)
            margin = best.value - worst.value
            reason = None
            if margin <= 0:
                reason = "all answers to its prompt are rated alike"
            elif margin < min_margin:
                reason = f"ratings differ by less than {min_margin:g}"
            elif best.answer == worst.answer:
                reason = "best and worst answer are the same"
            else:
                plan.pairs.append((best.number, worst.number))
                plan.outcomes[best.number] = plan.outcomes[worst.number] = USED
            for one in rated:
                plan.outcomes.setdefault(one.number, reason or "neither the best nor the worst")
    used = {number for pair in plan.pairs for number in pair}
    for key, seen, before in retries:
        earlier = next((one for one in prompts[key] if one.number == before), None)
        if earlier is None or {seen.number, earlier.number} & used:
            continue
        if earlier.answer == seen.answer:
            plan.outcomes.setdefault(seen.number, "the retry gave the same answer")
        else:
            plan.pairs.append((seen.number, earlier.number))
            plan.outcomes[seen.number] = plan.outcomes[earlier.number] = USED
    _explain_rest(plan, prompts)


def _plan_groups(plan: _Plan, prompts: Mapping[bytes, list[_Seen]]) -> None:
    for answers in prompts.values():
        rated: dict[int, _Seen] = {}
        for one in answers:
            if one.rating is not None:
                rated.setdefault(one.answer, one)
        if len(rated) >= 2 and len({one.rating for one in rated.values()}) > 1:
            plan.groups.append([(one.number, one.value) for one in rated.values()])
            plan.outcomes |= dict.fromkeys((one.number for one in rated.values()), USED)
    _explain_rest(plan, prompts)


def _plan_labels(plan: _Plan, prompts: Mapping[bytes, list[_Seen]]) -> None:
    rated = [one for answers in prompts.values() for one in answers if one.rating is not None]
    numbers = [one.value for one in rated if not one.thumb]
    middle = (min(numbers) + max(numbers)) / 2 if numbers else 0.0
    for one in rated:
        limit = 0.5 if one.thumb else middle
        if one.value == limit:
            plan.outcomes[one.number] = "its rating is in the middle"
        else:
            plan.labels[one.number] = one.value > limit
            plan.outcomes[one.number] = USED
    _explain_rest(plan, prompts)


def _explain_rest(plan: _Plan, prompts: Mapping[bytes, list[_Seen]]) -> None:
    for answers in prompts.values():
        for one in answers:
            reason = "no rating" if one.rating is None else _SINGLE
            plan.outcomes.setdefault(one.number, reason)


def _rows(
    paths: Sequence[Path], names: Mapping[str, str], plan: _Plan, masker: Masker
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
    for number, found in _exchanges(paths, names):
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


def _exchanges(
    paths: Sequence[Path], names: Mapping[str, str]
) -> Iterator[tuple[int, Exchange | str]]:
    """Every line that is not empty, by its number over all files."""
    number = 0
    for path in paths:
        with _opened(path) as lines:
            for line in lines:
                if not line.strip():
                    continue
                number += 1
                try:
                    value = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    yield number, "no JSON"
                    continue
                is_object = isinstance(value, dict)
                yield number, read_exchange(value, names) if is_object else "no JSON object"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
