"""Groups: one prompt, its responses, and what is said about them. The unit of everything that
follows.

A plain pair is a group of two responses and one comparison. Rows that share a prompt, token for
token, become one group in which the prompt and every distinct response are computed once, however
many comparisons, labels or scores name them.

A loss gives one number a unit, and a step holds so many units: comparisons, single responses (with
a label or a score), or all responses of a row.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xxhash

from ..errors import DataError
from .given import constants_of_row

Unit = Literal["comparison", "response", "group"]


@dataclass
class Group:
    """One prompt (P,) with R responses, each (n_r,) completion tokens; ids are int32.

    Attributes:
        comparisons: (winner, loser, weight), responses by their numbers.
        ref_logps: (R,) fp64, nats.
        ref_token_logps: of each response, its scored tokens', fp32, nats.
        unit: what the loss has one number for.
        items: the response of each labelled or scored one; one that was given twice is there twice.
        given: constants of each item, by name.
        rows: the row that each item, or each comparison, stood in.
        mismatched: of each item, the response that the row before it had to its own prompt (KTO);
            empty where the loss asks for none.
    """

    prompt: np.ndarray
    responses: list[np.ndarray] = field(default_factory=list)
    comparisons: list[tuple[int, int, float]] = field(default_factory=list)
    ref_logps: np.ndarray | None = None
    ref_token_logps: list[np.ndarray] | None = None
    unit: Unit = "comparison"
    items: list[int] = field(default_factory=list)
    given: dict[str, list[float]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    mismatched: list[int] = field(default_factory=list)

    @property
    def units(self) -> int:
        """How many units there are."""
        if self.unit == "comparison":
            return len(self.comparisons)
        return len(self.items) if self.unit == "response" else len(self.lists)

    @property
    def lists(self) -> list[list[int]]:
        """The items of each row."""
        found: dict[int, list[int]] = {}
        for item, row in enumerate(self.rows):
            found.setdefault(row, []).append(item)
        return list(found.values())

    def responses_of(self, unit: int, mismatched: bool = False) -> tuple[int, ...]:
        """The responses that a unit consists of."""
        if self.unit == "comparison":
            return self.comparisons[unit][:2]
        if self.unit == "response":
            return ((self.mismatched if mismatched else self.items)[unit],)
        return tuple(self.items[item] for item in self.lists[unit])

    def rows_of_units(self) -> list[int]:
        """The row that each unit stood in; 0 where no rows are known."""
        rows = self.rows or [0] * self.units
        return list(dict.fromkeys(rows)) if self.unit == "group" else rows

    def weight(self, unit: int) -> float:
        """What a unit counts in the loss."""
        return self.comparisons[unit][2] if self.unit == "comparison" else 1.0

    def scored_tokens(self, response: int) -> int:
        """Tokens of a response that something precedes."""
        return len(self.responses[response]) - (0 if len(self.prompt) else 1)

    def digest(self, response: int) -> bytes:
        """16 bytes that name the prompt and one response: what its reference log-probability
        depends on.
        """
        content = xxhash.xxh3_128(np.int64(len(self.prompt)).tobytes())
        content.update(np.ascontiguousarray(self.prompt, np.int32).tobytes())
        content.update(np.ascontiguousarray(self.responses[response], np.int32).tobytes())
        return content.digest()


class _Builder:
    """Collects rows into groups."""

    def __init__(self, unit: Unit, group_prompts: bool) -> None:
        self.unit, self.group_prompts = unit, group_prompts
        self.groups: list[Group] = []
        self._by_prompt: dict[bytes, int] = {}
        self._known: list[dict[bytes, int]] = []

    def group_of(self, prompt: np.ndarray) -> int:
        """The number of the group of a prompt, a new one where there is none."""
        key = prompt.tobytes()
        index = self._by_prompt.get(key) if self.group_prompts else None
        if index is None:
            index = self._by_prompt[key] = len(self.groups)
            self.groups.append(Group(prompt, unit=self.unit))
            self._known.append({})
        return index

    def place(self, index: int, ids: np.ndarray) -> int:
        """The number of a response in a group, added where it is not there yet."""
        group, seen = self.groups[index], self._known[index]
        place = len(group.responses)
        if self.group_prompts:
            place = seen.setdefault(ids.tobytes(), place)
        if place == len(group.responses):
            group.responses.append(ids)
        return place


def make_groups(
    dataset: Any,
    *,
    group_prompts: bool = True,
    source: str = "dataset",
    unit: Unit = "comparison",
    max_length: int | None = None,
    scale_rewards: str = "group",
    mismatch: int | None = None,
) -> list[Group]:
    """Groups of a tokenised dataset (the columns of `fastdpo.data.tokenize`).

    With `group_prompts`, rows with equal prompt tokens are merged and equal responses within a
    group are kept once; groups stand in the order of their first row, units in the order of the
    rows.

    Args:
        unit: what the loss has one number for.
        max_length: tokens of a prompt and a response, to which labelled ones are still to be cut.
        scale_rewards: whether advantages are divided by their standard deviation ("group").
        mismatch: rows of a batch; each prompt of a batch also gets the completion of the row
            before it in the batch, the first one that of the last (KTO).

    Raises:
        DataError: no rows, or some with logps and others without.
    """
    if len(dataset) == 0:
        raise DataError(f"{source}: has no rows left to train on")
    builder, said = _Builder(unit, group_prompts), Counter[str]()
    labelled: list[tuple[int, np.ndarray]] = []
    # numpy alone would round scores to fp32.
    ids = ["prompt_ids", "response_ids", "winners", "losers"]
    rows = dataset.with_format("numpy", columns=ids, output_all_columns=True)
    for number, row in enumerate(rows):
        prompt = np.asarray(row["prompt_ids"], np.int32)
        index = builder.group_of(prompt)
        group = builder.groups[index]
        responses = [np.asarray(response, np.int32) for response in row["response_ids"]]
        if len(row["labels"]):
            labelled.append((index, responses[0]))
            responses = [_cut(responses[0], prompt, max_length)]
        places = [builder.place(index, ids) for ids in responses]
        for win, lose, weight in zip(row["winners"], row["losers"], row["weights"], strict=True):
            group.comparisons.append((places[win], places[lose], float(weight)))
        if unit == "comparison":
            group.rows += [number] * len(row["winners"])
        else:
            group.items += places
            group.rows += [number] * len(places)
            constants = constants_of_row(row, scale_rewards)
            said.update(constants.keys())
            for name, values in constants.items():
                group.given.setdefault(name, []).extend(values)
    _keep_common(builder.groups, said, len(dataset), source)
    if mismatch is not None:
        _add_mismatched(builder, labelled, mismatch, max_length)
    return builder.groups


def _keep_common(groups: list[Group], said: Counter[str], count: int, source: str) -> None:
    """Keep the constants that all of the `count` rows have; `said` tells how many have each."""
    if 0 < said["logp"] < count:
        raise DataError(
            f"{source}: {said['logp']} of {count} rows have logps; expected them in every row, or "
            "in none"
        )
    for group in groups:
        group.given = {name: v for name, v in group.given.items() if said[name] == count}


def _cut(response: np.ndarray, prompt: np.ndarray, max_length: int | None) -> np.ndarray:
    return response if max_length is None else response[: max_length - len(prompt)]


def _add_mismatched(
    builder: _Builder, rows: list[tuple[int, np.ndarray]], size: int, max_length: int | None
) -> None:
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        for (index, _), (_, before) in zip(batch, [batch[-1], *batch[:-1]], strict=True):
            group = builder.groups[index]
            cut = _cut(before, group.prompt, max_length)
            group.mismatched.append(builder.place(index, cut))


def count_units(groups: Sequence[Group]) -> int:
    """Number of units in all groups."""
    return sum(group.units for group in groups)


def describe_units(groups: Sequence[Group]) -> str:
    """How many units of which kind: "24 comparisons"."""
    return f"{count_units(groups)} {groups[0].unit}s"


def step_constants(
    groups: Sequence[Group], units: Sequence[tuple[int, int]], batch: int
) -> Mapping[str, np.ndarray]:
    """What the units (group, unit) of a step are given of the batches of `batch` units that they
    stand in, each (U,) fp64: how many tokens a mean over tokens is over, averaged over the units.
    """
    if groups[units[0][0]].unit == "group":
        return {}
    lengths, prompts = [], []
    for index, unit in units:
        group = groups[index]
        lengths.append(group.scored_tokens(group.responses_of(unit)[0]))
        prompts.append(max(0, len(group.prompt) - 1))
    tokens, sequences = np.array(lengths, np.float64), np.array(lengths, np.float64) + prompts
    if groups[units[0][0]].unit == "response":
        whole = np.full_like(tokens, max(1.0, tokens.mean()))
        return {"batch_tokens": _batch_means(tokens, batch), "step_tokens": whole}
    return {
        "batch_chosen_tokens": _batch_means(tokens, batch),
        "batch_sequence_tokens": _batch_means(sequences, batch),
    }


def _batch_means(values: np.ndarray, batch: int) -> np.ndarray:
    means = np.empty_like(values)
    for start in range(0, len(values), batch):
        part = slice(start, start + batch)
        means[part] = max(1.0, values[part].mean())
    return means


@dataclass(frozen=True)
class Agreement:
    """What comparisons say about each other, token for token.

    Attributes:
        repeated: comparisons that state again what another one has stated.
        contradicted: pairs of responses to one prompt of which each wins somewhere.
    """

    repeated: int
    contradicted: int

    def __str__(self) -> str:
        """What is to be added to a line that counts the comparisons: nothing where all is well."""
        repeated = f"; {self.repeated} comparisons repeat another one" if self.repeated else ""
        both = (
            f"; {self.contradicted} pairs are stated both ways round" if self.contradicted else ""
        )
        return repeated + both


def check_agreement(groups: Sequence[Group]) -> Agreement:
    """Count comparisons that are stated again, and those that are stated the other way round.

    Responses that are equal once they are cut to `max_length` say nothing about each other.
    """
    stated = Counter[tuple[bytes, bytes]]()
    for group in groups:
        digests = [group.digest(response) for response in range(len(group.responses))]
        for winner, loser, _ in group.comparisons:
            if digests[winner] != digests[loser]:
                stated[digests[winner], digests[loser]] += 1
    both = sum((loser, winner) in stated for winner, loser in stated)
    return Agreement(stated.total() - len(stated), both // 2)
