"""Groups in columns are what rows are, one after the other: equal to `plain_groups` bit for bit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from plain_groups import (
    plain_agreement,
    plain_digest,
    plain_groups,
    plain_order,
    plain_plan_digest,
)
from transformers import PreTrainedTokenizerBase

from bench import data
from fastdpo.data.grouping import check_agreement, make_groups
from fastdpo.data.groups import Group, Groups, Unit, count_units
from fastdpo.data.needs import Known, Needs
from fastdpo.data.packing import LAYOUTS, longest_unit, part_of, part_tokens
from fastdpo.data.plan import make_plan, plan_digest
from fastdpo.data.ragged import Lists
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.errors import DataError

pytestmark = pytest.mark.usefixtures("datasets_cache")

_WORDS = ("Blue", "Green", "red", "fox", "dog", "Spain", "rain", "42", "lazy", "where the", "jumps")


def made_rows(kind: str, count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with few prompts and few responses, so that many are equal."""
    rng = np.random.default_rng(seed)

    def text(words: int) -> str:
        return " ".join(rng.choice(_WORDS, words))

    prompts = [text(n) for n in (1, 2, 4, 9, 9)]
    answers = [text(n) for n in (1, 1, 2, 3, 5, 8, 13, 14, 15, 16, 20, 30)]

    def row() -> dict[str, Any]:
        prompt = str(rng.choice(prompts))
        if kind == "label":
            completion = str(rng.choice(answers))
            return {"prompt": prompt, "completion": completion, "label": bool(rng.integers(2))}
        responses = rng.choice(answers, rng.integers(2, 12), replace=False).tolist()
        if kind == "pair":
            return {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}
        found = {"prompt": prompt, "responses": responses}
        each = len(responses)
        if kind == "scores":
            scores = rng.normal(0, 3, each).round(1)
            return found | {"scores": scores.tolist(), "logps": (-rng.random(each)).tolist()}
        if kind == "rankings":
            return found | {"rankings": (rng.permutation(each) + 1).tolist()}
        pairs = [rng.choice(each, 2, replace=False).tolist() for _ in range(rng.integers(1, 6))]
        return found | {"comparisons": [[*pair, float(rng.random())] for pair in pairs]}

    return [row() for _ in range(count)]


def assert_same(found: Sequence[Group], expected: list[Group]) -> None:
    """Every field, bit for bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.prompt.tobytes() == other.prompt.tobytes() and one.prompt.dtype == np.int32
        assert [r.tobytes() for r in one.responses] == [r.tobytes() for r in other.responses]
        for name in ("comparisons", "unit", "items", "rows", "mismatched", "given"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.units == other.units and one.rows_of_units() == other.rows_of_units()


KINDS: list[tuple[str, Known, Unit, dict[str, Any]]] = [
    ("pair", "comparisons", "comparison", {}),
    ("comparisons", "comparisons", "comparison", {}),
    ("scores", "comparisons", "comparison", {}),
    ("label", "label", "response", {"max_length": 20}),
    ("label", "label", "response", {"max_length": 20, "mismatch": 7}),
    ("scores", "scores", "response", {}),
    ("scores", "scores", "response", {"scale_rewards": "none"}),
    ("comparisons", "comparisons", "response", {}),
    ("rankings", "ranks", "group", {}),
    ("scores", "ranks", "group", {}),
]


@pytest.mark.parametrize("group_prompts", [True, False])
@pytest.mark.parametrize(("kind", "known", "unit", "keys"), KINDS)
def test_columns_are_the_rows(
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    known: Known,
    unit: Unit,
    keys: dict[str, Any],
    group_prompts: bool,
) -> None:
    rows = Dataset.from_list(made_rows(kind))
    limit = keys.get("max_length", 24)
    tokens, _ = tokenize_dataset(rows, tokenizer, max_length=limit, needs=Needs((known,)))
    options = {"group_prompts": group_prompts, "unit": unit, **keys}
    groups, expected = make_groups(tokens, **options), plain_groups(tokens, **options)
    assert len(expected) < 10 if group_prompts else len(expected) > 50
    assert_same(groups, expected)
    assert_same(Groups.of(expected), expected)
    assert_same(
        make_groups(tokens.select(range(7, 31)), **options),
        plain_groups(tokens.select(range(7, 31)), **options),
    )
    named = [plain_digest(g.prompt, response) for g in expected for response in g.responses]
    assert groups.digests.tobytes() == Groups.of(expected).digests.tobytes() == b"".join(named)
    assert [g.digest(r) for g in groups for r in range(len(g.responses))] == named
    agreed = check_agreement(groups)
    assert (agreed.repeated, agreed.contradicted) == plain_agreement(expected)
    assert count_units(groups) == count_units(expected) == sum(g.units for g in expected)
    lengths = [len(g.prompt) + len(response) for g in expected for response in g.responses]
    assert groups.sequence_lengths().tolist() == lengths


@pytest.mark.parametrize(("kind", "known", "unit", "keys"), KINDS)
def test_an_epoch_takes_units_in_the_same_order_and_names_them_the_same(
    tokenizer: PreTrainedTokenizerBase, kind: str, known: Known, unit: Unit, keys: dict[str, Any]
) -> None:
    rows = Dataset.from_list(made_rows(kind))
    limit = keys.get("max_length", 24)
    tokens, _ = tokenize_dataset(rows, tokenizer, max_length=limit, needs=Needs((known,)))
    groups = make_groups(tokens, unit=unit, **keys)
    expected = plain_groups(tokens, group_prompts=True, unit=unit, **keys)
    for seed, by_rows in ((0, True), (3, False), (None, True), (None, False)):
        order = plain_order(expected, seed, by_rows)
        for size in (1, 7, 1000):
            options = {"units_per_step": size, "max_tokens": 90, "seed": seed, "by_rows": by_rows}
            plan = make_plan(groups, **options)
            assert [unit for step in plan for unit in step.placed()] == order
            assert plan_digest(groups, plan) == plain_plan_digest(expected, order, size)
            assert plan == make_plan(expected, **options) and len(plan) == len(list(plan))
            assert plan[-1] == list(plan)[-1] and plan[:2] == list(plan)[:2]
    assert plan_digest(groups) == plain_plan_digest(expected, [], 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kind", "known", "unit", "keys"), KINDS)
def test_the_longest_unit_is_the_longest_of_all(
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    known: Known,
    unit: Unit,
    keys: dict[str, Any],
    layout: str,
) -> None:
    rows = Dataset.from_list(made_rows(kind))
    limit = keys.get("max_length", 24)
    tokens, _ = tokenize_dataset(rows, tokenizer, max_length=limit, needs=Needs((known,)))
    groups = make_groups(tokens, unit=unit, **keys)
    longest = max(
        part_tokens(group, part_of(0, group, [(number, 0)], mismatched).responses, layout)
        for group in groups
        for mismatched in ((False, True) if group.mismatched else (False,))
        for number in range(group.units)
    )
    assert longest_unit(groups, layout) == longest_unit(list(groups), layout) == longest


def test_rows_of_which_some_have_logps_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = made_rows("scores", 9)
    rows[4]["logps"] = None
    needs = Needs(("scores",))
    tokens, _ = tokenize_dataset(Dataset.from_list(rows), tokenizer, max_length=99, needs=needs)
    with pytest.raises(DataError, match="8 of 9 rows have logps; expected them in every row"):
        make_groups(tokens, unit="response")


def test_references_are_those_of_the_responses(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens, _ = tokenize_dataset(Dataset.from_list(made_rows("pair")), tokenizer, max_length=24)
    one, other = make_groups(tokens), make_groups(tokens.select([3, 1, 8]))
    both = one + other
    assert_same(both, [*one, *other])
    assert both.digests.tobytes() == one.digests.tobytes() + other.digests.tobytes()
    count = len(both.responses)
    both.set_references(Lists(np.arange(count) / 7, np.arange(count + 1)))
    both.hand_references(one, other)
    sums = [value for group in [*one, *other] for value in group.ref_logps.tolist()]
    assert sums == [i / 7 for i in range(count)]
    ends = np.cumsum([0, *both.responses.lengths])
    both.set_references(Lists(np.arange(ends[-1]) / 7, ends), by_tokens=True)
    both.hand_references(one, other)
    each = [values for group in [*one, *other] for values in group.ref_token_logps]
    assert [len(values) for values in each] == both.responses.lengths.tolist()
    assert np.concatenate(each).tolist() == (np.arange(ends[-1]) / 7).tolist()
    again = Groups.of(list(other))
    assert again[2].ref_token_logps[1].tolist() == other[2].ref_token_logps[1].tolist()


def test_real_rows(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    pairs, groups = data.gsm8k_pairs(), data.gsm8k_groups()
    if pairs is None or groups is None:
        pytest.skip("the GSM8K rows are not here")
    for rows, needs, unit in (
        (pairs[:400], Needs(), "comparison"),
        (groups[:90], Needs(("scores",)), "response"),
    ):
        rows = Dataset.from_list(rows)
        tokens, _ = tokenize_dataset(rows, smollm2_tokenizer, max_length=160, needs=needs)
        for group_prompts in (True, False):
            options: dict[str, Any] = {"group_prompts": group_prompts, "unit": unit}
            assert_same(make_groups(tokens, **options), plain_groups(tokens, **options))
