"""Groups, their agreement and the order of an epoch as they are defined: row by row."""

from collections import Counter
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset

from fastdpo.data.groups import Group, Unit


def plain_digest(prompt: np.ndarray, response: np.ndarray) -> bytes:
    length = np.int64(len(prompt)).tobytes()
    return xxhash.xxh3_128_digest(length + prompt.tobytes() + response.tobytes())


def plain_groups(
    dataset: Dataset,
    *,
    group_prompts: bool,
    unit: Unit,
    max_length: int | None = None,
    scale_rewards: str = "group",
    mismatch: int | None = None,
) -> list[Group]:
    """What `make_groups` makes of rows that all say the same kinds of things."""
    groups: list[Group] = []
    by_prompt: dict[Any, int] = {}
    labelled: list[tuple[Group, np.ndarray]] = []

    def place(group: Group, ids: np.ndarray) -> int:
        for number, other in enumerate(group.responses if group_prompts else ()):
            if np.array_equal(other, ids):
                return number
        group.responses.append(ids)
        return len(group.responses) - 1

    def cut(ids: np.ndarray, prompt: np.ndarray) -> np.ndarray:
        return ids if max_length is None else ids[: max_length - len(prompt)]

    for number, row in enumerate(dataset.with_format(None)):
        prompt = np.array(row["prompt_ids"], np.int32)
        key = prompt.tobytes() if group_prompts else number
        index = by_prompt.setdefault(key, len(groups))
        if index == len(groups):
            groups.append(Group(prompt, unit=unit))
        group = groups[index]
        responses = [np.array(ids, np.int32) for ids in row["response_ids"]]
        if row["labels"]:
            labelled.append((group, responses[0]))
            responses = [cut(responses[0], prompt)]
        places = [place(group, ids) for ids in responses]
        compared = list(zip(row["winners"], row["losers"], row["weights"], strict=True))
        group.comparisons += [(places[win], places[lose], weight) for win, lose, weight in compared]
        group.rows += [number] * len(compared if unit == "comparison" else places)
        if unit == "comparison":
            continue
        group.items += places
        for name, values in plain_constants(row, scale_rewards).items():
            group.given.setdefault(name, []).extend(values)
    for start in range(0, len(labelled), mismatch or 1) if mismatch else ():
        batch = labelled[start : start + (mismatch or 1)]
        for (group, _), (_, before) in zip(batch, [batch[-1], *batch[:-1]], strict=True):
            group.mismatched.append(place(group, cut(before, group.prompt)))
    return groups


def plain_constants(row: dict[str, Any], scale_rewards: str) -> dict[str, list[float]]:
    """The constants of a row's responses, by name."""
    found: dict[str, Any] = {}
    if row["labels"]:
        found["label"] = map(float, row["labels"])
    if scores := row["scores"]:
        array = np.array(scores)
        found["advantage"] = array - array.mean()
        if scale_rewards != "none":
            found["advantage"] = found["advantage"] / (array.std(ddof=1) + 1e-4)
        beaten = [sum((s > t) + (s == t) / 2 for t in scores) for s in scores]
        found["win_rate"] = [wins / len(scores) for wins in beaten]
    elif row["winners"]:
        won, lost = Counter[int](), Counter[int]()
        for win, lose, weight in zip(row["winners"], row["losers"], row["weights"], strict=True):
            won[win] += weight
            lost[lose] += weight
        found["win_rate"] = [
            won[r] / (won[r] + lost[r]) if won[r] + lost[r] else 0.5
            for r in range(len(row["response_ids"]))
        ]
    if row["ranks"]:
        found["rank"] = map(float, row["ranks"])
    if row["logps"]:
        found["logp"] = row["logps"]
    return {name: list(values) for name, values in found.items()}


def plain_agreement(groups: list[Group]) -> tuple[int, int]:
    """Comparisons that repeat another one, and pairs that are stated both ways round."""
    stated = [
        tuple(plain_digest(group.prompt, group.responses[r]) for r in pair)
        for group in groups
        for *pair, _ in group.comparisons
    ]
    stated = [(winner, loser) for winner, loser in stated if winner != loser]
    both = {frozenset(pair) for pair in stated if pair[::-1] in stated}
    return len(stated) - len(set(stated)), len(both)


def plain_order(groups: list[Group], seed: int | None, by_rows: bool) -> list[tuple[int, int]]:
    """The group and the number of each unit, as the first epoch takes them."""
    if seed is None and (by_rows or groups[0].unit != "comparison"):
        named = (
            (row, index, unit)
            for index, group in enumerate(groups)
            for unit, row in enumerate(group.rows_of_units())
        )
        return [(index, unit) for _, index, unit in sorted(named)]
    order = list(range(len(groups)))
    if seed is not None:
        order = np.random.default_rng([seed, 0]).permutation(len(groups)).tolist()
    return [(index, unit) for index in order for unit in range(groups[index].units)]


def plain_plan_digest(groups: list[Group], order: list[tuple[int, int]], size: int) -> str:
    content = xxhash.xxh3_128()
    for group in groups:
        for response in group.responses:
            content.update(plain_digest(group.prompt, response))
    for start in range(0, len(order), size):
        content.update(np.array(sorted(order[start : start + size]), np.int64).tobytes())
    return content.hexdigest()
