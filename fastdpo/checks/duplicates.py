"""Rows that say the same, and rows that contradict each other."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from .findings import Finding, of_rows
from .near import clusters
from .texts import Texts, words_alone


def exact_duplicates(texts: Texts) -> Iterator[Finding]:
    """Rows that repeat an earlier one, and what it says of its responses, but for white space and
    case.
    """
    first: dict[bytes, int] = {}
    found = []
    for place, row in enumerate(texts.rows):
        earlier = first.setdefault(_digest([*row_texts(texts, place), texts.verdict(place)]), row)
        if earlier != row:
            found.append((row, f"as row {earlier}: {texts.prompts[place]}"))
    yield from of_rows(
        "exact_duplicate", "warning", found, len(texts.rows), "rows repeat an earlier one"
    )


def near_duplicates(texts: Texts) -> Iterator[Finding]:
    """Rows that share four fifths of their three-word phrases with an earlier one."""
    seen: set[bytes] = set()
    places = []
    for place in range(len(texts.rows)):
        digest = _digest(row_texts(texts, place))
        if digest not in seen:
            seen.add(digest)
            places.append(place)
    joined = clusters(["\n".join(row_texts(texts, place)) for place in places])
    first: dict[int, int] = {}
    found = []
    for place, cluster in zip(places, joined.tolist(), strict=True):
        earlier = first.setdefault(cluster, place)
        if earlier != place:
            found.append((texts.rows[place], f"like row {texts.rows[earlier]}: "
                          f"{texts.prompts[place]}"))  # fmt: skip
    text = "rows are nearly the same as an earlier one"
    yield from of_rows("near_duplicate", "note", found, len(texts.rows), text)


def contradictions(texts: Texts) -> Iterator[Finding]:
    """Pairs of one prompt that are stated both ways round, punctuation and case aside; responses
    with both labels, white space and case aside.
    """
    both = _Stated()
    prompts = [words_alone(prompt) for prompt in texts.prompts]
    asked = Counter(prompts[row] for row, _, _ in texts.pairs.tolist())
    for row, winner, loser in texts.pairs.tolist():
        if asked[prompts[row]] == 1:
            continue
        won, lost = (words_alone(texts.responses[i]) for i in (winner, loser))
        if won != lost:
            both.add([prompts[row], *sorted((won, lost))], won < lost, row)
    for response in np.flatnonzero(texts.labels >= 0).tolist():
        row = texts.place_of(response)
        parts = [texts.plain_prompts[row], texts.plain_responses[response]]
        both.add(parts, bool(texts.labels[response]), row)
    found = [
        (texts.rows[row], f"against row {texts.rows[other]}: {texts.prompts[row]}")
        for row, other in both.contradicted().items()
    ]
    what = "response with the other label"
    if len(texts.pairs):
        what = "two responses the other way round"
    text = f"rows contradict another one: of one prompt, the same {what}"
    yield from of_rows("contradiction", "error", found, len(texts.rows), text)


class _Stated:
    """Statements, each with the places of the rows that make it one way or the other."""

    def __init__(self) -> None:
        self.rows: dict[bytes, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))

    def add(self, parts: Sequence[str], way: bool, row: int) -> None:
        self.rows[_digest(parts)][way].append(row)

    def contradicted(self) -> dict[int, int]:
        """The rows of statements made both ways, those of a statement together, and of each the
        first that makes it the other way.
        """
        found: dict[int, int] = {}
        for one, other in self.rows.values():
            if one and other:
                against = dict.fromkeys(one, other[0]) | dict.fromkeys(other, one[0])
                for row in sorted(against):
                    found.setdefault(row, against[row])
        return found


def repeated_responses(texts: Texts) -> Iterator[Finding]:
    """Better responses that answer many different prompts."""
    better, _ = texts.compared
    prompts: dict[str, set[int]] = defaultdict(set)
    for place in better.tolist():
        prompts[texts.plain_responses[place]].add(texts.row_of(place))
    found = [
        (min(rows), f"{len(rows)} times: {text}")
        for text, rows in prompts.items()
        if len(rows) >= max(5, len(texts.rows) // 200) and len(text) > 20
    ]
    found.sort(key=lambda one: one[0])
    text = "better responses answer many rows alike"
    yield from of_rows("repeated_response", "note", found, len(texts.rows), text)


def row_texts(texts: Texts, place: int) -> list[str]:
    """A row's prompt and responses, without case and white space."""
    responses = texts.plain_responses[texts.first[place] : texts.first[place + 1]]
    return [texts.plain_prompts[place], *responses]


def _digest(parts: Sequence[str]) -> bytes:
    return xxhash.xxh3_128_digest("\x00".join(parts).encode("utf-8", "surrogatepass"))
