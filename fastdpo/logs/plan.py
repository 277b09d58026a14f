"""Which lines of a log become rows, by what is kept of each of them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .exchange import Exchange
from .rating import THUMB

USED = "used"
REPEATED = "says what an earlier line says"
_SINGLE = "nothing to compare it with"
_ALIKE = "all answers to its prompt are rated alike"
_OPPOSITE = "another rating or retry says the opposite"
_SCALES = ((0, 1), (1, 5), (0, 5), (1, 10), (0, 10), (0, 100))


@dataclass(frozen=True)
class Seen:
    """What is kept of a line.

    Attributes:
        number: of the line.
        key: names what was asked.
        answer: a hash of what was answered.
        rating: what a user gave it.
        kind: of the rating; only those of one kind are compared.
        edited: whether a user wrote a better answer.
    """

    number: int
    key: bytes
    answer: int
    rating: float | None
    kind: str
    edited: bool


@dataclass
class _Rated:
    """An answer to a prompt, with all its ratings of one kind: users may be of several minds."""

    first: Seen
    ratings: list[float] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.first.number

    @property
    def value(self) -> float:
        return sum(self.ratings) / len(self.ratings)


class Retries:
    """Which answers were asked for in the place of which others."""

    def __init__(self) -> None:
        self._named: dict[tuple[str, bytes], list[Seen]] = defaultdict(list)
        self._last: dict[tuple[str, bytes], Seen] = {}
        self._without_start: set[tuple[str, bytes]] = set()
        self._of: list[tuple[Seen, str]] = []
        self._again: list[tuple[Seen, tuple[str, bytes] | None, Seen | None]] = []

    def add(self, seen: Seen, found: Exchange) -> None:
        """Take up the next line."""
        if found.name is not None:
            self._named[found.name, seen.key].append(seen)
        talk = None if found.conversation is None else (found.conversation, seen.key)
        before = self._last.get(talk) if talk else None
        if found.retry_of is not None:
            self._of.append((seen, found.retry_of))
        elif found.regenerated:
            self._again.append((seen, talk, before))
            if talk and before is None:
                self._without_start.add(talk)
        if talk:
            self._last[talk] = seen

    def pairs(self) -> Iterator[tuple[Seen, Seen | None]]:
        """Each retry with what it retried; None where no line says so.

        A line names an answer to the same prompt, for which it may come too early in a log that
        begins with the newest. Where a talk begins with a retry, its lines may stand in that order
        too, and say nothing.
        """
        for seen, name in self._of:
            same = [one for one in self._named[name, seen.key] if one is not seen]
            earlier = [one for one in same if one.number < seen.number]
            yield seen, earlier[-1] if earlier else next(iter(same), None)
        for seen, talk, before in self._again:
            yield seen, None if talk in self._without_start else before


@dataclass
class Plan:
    """Rows to make: lines by their numbers, the better first; the answers that were edited."""

    pairs: list[tuple[int, int]] = field(default_factory=list)
    edits: list[int] = field(default_factory=list)
    groups: list[list[tuple[int, float]]] = field(default_factory=list)
    labels: dict[int, bool] = field(default_factory=dict)
    outcomes: dict[int, str] = field(default_factory=dict)
    _stated: set[tuple[bytes, int, int]] = field(default_factory=set)

    def plan_pairs(
        self, prompts: Mapping[bytes, Sequence[Seen]], retries: Retries, min_margin: float
    ) -> None:
        """An edited answer and what it was, the best and the worst one, a retry and its cause."""
        used = set()
        for answers in prompts.values():
            for one in answers:
                if one.edited:
                    self.edits.append(one.number)
                    self.outcomes[one.number] = USED
            for rated in self._rated(answers):
                best, worst = (most(rated, key=lambda one: one.value) for most in (max, min))
                margin = best.value - worst.value
                reason = _ALIKE if len(rated) > 1 else _SINGLE
                if margin > 0:
                    reason = f"ratings differ by less than {min_margin:g}"
                if margin > 0 and margin >= min_margin:
                    reason = "neither the best nor the worst"
                    used |= {(one.first.key, one.first.answer) for one in (best, worst)}
                    won = self._pair(best.first, worst.first)
                    self._settle([best, worst], USED if won else _OPPOSITE)
                self._settle(rated, reason)
        self._plan_retries(prompts, retries, used)
        self._explain_rest(prompts)

    def _plan_retries(
        self,
        prompts: Mapping[bytes, Sequence[Seen]],
        retries: Retries,
        used: set[tuple[bytes, int]],
    ) -> None:
        middles = _middles(prompts)
        for seen, earlier in retries.pairs():
            reason = None
            if earlier is None:
                reason = "the answer that it retries is not in the log"
            elif earlier.answer == seen.answer:
                reason = "the retry gave the same answer"
            elif used & {(seen.key, seen.answer), (seen.key, earlier.answer)}:
                reason = "ratings say more than the retry"
            elif seen.kind and seen.kind == earlier.kind:
                continue
            elif _is_good(seen, middles) is False or _is_good(earlier, middles):
                reason = "a rating speaks against the retry"
            if earlier and not reason and self._pair(seen, earlier):
                self.outcomes[seen.number] = self.outcomes[earlier.number] = USED
            self.outcomes.setdefault(seen.number, reason or _OPPOSITE)

    def _pair(self, better: Seen, worse: Seen) -> bool:
        """Make a pair, unless there is one that says the opposite."""
        if (better.key, worse.answer, better.answer) in self._stated:
            return False
        self._stated.add((better.key, better.answer, worse.answer))
        self.pairs.append((better.number, worse.number))
        return True

    def plan_groups(self, prompts: Mapping[bytes, Sequence[Seen]]) -> None:
        """All rated answers to a prompt."""
        for answers in prompts.values():
            for rated in self._rated(answers):
                if len({one.value for one in rated}) > 1:
                    self.groups.append([(one.number, one.value) for one in rated])
                    self._settle(rated, USED)
                self._settle(rated, _ALIKE if len(rated) > 1 else _SINGLE)
        self._explain_rest(prompts)

    def plan_labels(self, prompts: Mapping[bytes, Sequence[Seen]]) -> None:
        """Every rated answer by itself."""
        middles = _middles(prompts)
        for answers in prompts.values():
            for rated in self._rated(answers):
                for one in rated:
                    middle = middles[one.first.kind]
                    if middle is None:
                        self._settle([one], "its rating is on a scale that cannot be told")
                    elif one.value == middle:
                        self._settle([one], "its rating is in the middle")
                    else:
                        self.labels[one.number] = one.value > middle
                        self._settle([one], USED)
        self._explain_rest(prompts)

    def _rated(self, answers: Sequence[Seen]) -> Iterator[list[_Rated]]:
        """The rated answers to a prompt, those with ratings of one kind together."""
        kinds: dict[str, dict[int, _Rated]] = defaultdict(dict)
        for one in answers:
            if one.rating is None:
                continue
            rated = kinds[one.kind].setdefault(one.answer, _Rated(one))
            if one.rating in rated.ratings:
                self.outcomes.setdefault(one.number, REPEATED)
            else:
                rated.lines.append(one.number)
            rated.ratings.append(one.rating)
        for found in kinds.values():
            yield list(found.values())

    def _settle(self, rated: Sequence[_Rated], outcome: str) -> None:
        for one in rated:
            for number in one.lines:
                self.outcomes.setdefault(number, outcome)

    def _explain_rest(self, prompts: Mapping[bytes, Sequence[Seen]]) -> None:
        for answers in prompts.values():
            for one in answers:
                reason = "no rating" if one.rating is None else _SINGLE
                self.outcomes.setdefault(one.number, reason)


def _middles(prompts: Mapping[bytes, Sequence[Seen]]) -> dict[str, float | None]:
    """The middle of the scale of each kind of ratings; None where that cannot be told."""
    values: dict[str, set[float]] = defaultdict(set)
    for answers in prompts.values():
        for one in answers:
            if one.rating is not None:
                values[one.kind].add(one.rating)
    return {kind: _middle(kind, found) for kind, found in values.items()}


def _middle(kind: str, values: set[float]) -> float | None:
    low, high = min(values), max(values)
    if low < 0:
        return 0.0
    scales = _SCALES[1:] if kind == "stars" else _SCALES
    if values == {1.0} and kind not in ("stars", THUMB):
        return None
    return next(((a + b) / 2 for a, b in scales if a <= low and high <= b), None)


def _is_good(seen: Seen, middles: Mapping[str, float | None]) -> bool | None:
    """Whether a rating is above the middle of its scale; None where nothing is known."""
    middle = None if seen.rating is None else middles[seen.kind]
    if middle is None or seen.rating is None or seen.rating == middle:
        return None
    return seen.rating > middle
