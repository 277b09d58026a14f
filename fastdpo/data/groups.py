"""Groups: one prompt, its responses, and the comparisons among them. The unit of everything that
follows.

A plain pair is a group of two responses and one comparison. Rows that share a prompt, token for
token, become one group in which the prompt and every distinct response are computed once, however
many comparisons name them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from ..errors import DataError


@dataclass
class Group:
    """One prompt (P,) with R responses, each (n_r,) completion tokens, and C comparisons; ids are
    int32.
    """

    prompt: np.ndarray
    responses: list[np.ndarray] = field(default_factory=list)
    comparisons: list[tuple[int, int, float]] = field(default_factory=list)  # winner, loser, weight
    ref_logps: np.ndarray | None = None  # (R,) fp64, nats

    def digest(self, response: int) -> bytes:
        """16 bytes that name the prompt and one response: what its reference log-probability
        depends on.
        """
        content = xxhash.xxh3_128(np.int64(len(self.prompt)).tobytes())
        content.update(np.ascontiguousarray(self.prompt, np.int32).tobytes())
        content.update(np.ascontiguousarray(self.responses[response], np.int32).tobytes())
        return content.digest()


def make_groups(dataset, *, group_prompts: bool = True, source: str = "dataset") -> list[Group]:
    """Groups of a tokenised dataset (columns prompt_ids, response_ids, winners, losers, weights,
    labels).

    With `group_prompts`, rows with equal prompt tokens are merged and equal responses within a
    group are kept once; groups stand in the order of their first row, comparisons in the order of
    the rows.

    Raises:
        DataError: no rows, or rows without a comparison (KTO's), which no available loss can train
            on.
    """
    if len(dataset) == 0:
        raise DataError(f"{source}: has no rows left to train on")
    groups: list[Group] = []
    by_prompt: dict[bytes, int] = {}
    known: list[dict[bytes, int]] = []
    for number, row in enumerate(dataset.with_format("numpy")):
        if len(row["winners"]) == 0:
            raise DataError(
                f"{source}, row {number + 1}: no comparison (labels need a KTO loss, "
                "which is not available)"
            )
        prompt = np.asarray(row["prompt_ids"], np.int32)
        key = prompt.tobytes()
        index = by_prompt.get(key) if group_prompts else None
        if index is None:
            index = by_prompt[key] = len(groups)
            groups.append(Group(prompt))
            known.append({})
        group, seen = groups[index], known[index]
        places = []
        for response in row["response_ids"]:
            ids = np.asarray(response, np.int32)
            if group_prompts:
                place = seen.setdefault(ids.tobytes(), len(group.responses))
            else:
                place = len(group.responses)
            if place == len(group.responses):
                group.responses.append(ids)
            places.append(place)
        for win, lose, weight in zip(row["winners"], row["losers"], row["weights"], strict=True):
            group.comparisons.append((places[win], places[lose], float(weight)))
    return groups


def count_comparisons(groups: Sequence[Group]) -> int:
    """Number of comparisons in all groups."""
    return sum(len(group.comparisons) for group in groups)


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
