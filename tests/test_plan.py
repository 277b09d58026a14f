"""The plan covers every comparison once and packs well; a batch scores the same tokens in every
layout.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.config import TrainConfig
from fastdpo.data.batch import make_batch
from fastdpo.data.groups import Group, count_units
from fastdpo.data.packing import LAYOUTS, Part, balance, best_fit_decreasing, part_tokens
from fastdpo.data.plan import epoch_plan, make_plan, plan_digest, reference_rows


def random_groups(count: int, seed: int = 0, longest: int = 40) -> list[Group]:
    """Groups of one to five responses and one to six comparisons, some prompts empty."""
    rng = np.random.default_rng(seed)

    def tokens(low: int) -> np.ndarray:
        return rng.integers(5, 90, rng.integers(low, longest)).astype(np.int32)

    groups = []
    for _ in range(count):
        group = Group(tokens(0), [tokens(1) for _ in range(rng.integers(2, 6))])
        for _ in range(rng.integers(1, 7)):
            win, lose = rng.choice(len(group.responses), 2, replace=False).tolist()
            group.comparisons.append((win, lose, 1.0))
        groups.append(group)
    return groups


def named(plan):
    """Every (group, comparison) of a plan, step by step."""
    return [
        [(p.group, c) for rank in step.ranks for row in rank for p in row for c in p.units]
        for step in plan
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(1, 400),
    st.sampled_from(LAYOUTS),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_a_plan_holds_every_comparison_once_within_the_budget(
    count, size, budget, layout, world, seed
):
    groups = random_groups(count, seed)
    plan = make_plan(
        groups,
        units_per_step=size,
        max_tokens=budget,
        layout=layout,
        seed=seed,
        world_size=world,
    )
    steps = named(plan)
    everything = [(g, c) for g, group in enumerate(groups) for c in range(len(group.comparisons))]
    assert sorted(itertools.chain.from_iterable(steps)) == everything
    assert [len(s) for s in steps[:-1]] == [size] * (len(steps) - 1)
    assert [step.units for step in plan] == [len(s) for s in steps]
    for step in plan:
        assert len({len(rank) for rank in step.ranks}) == 1
        for row in (row for rank in step.ranks for row in rank):
            total = sum(part_tokens(groups[p.group], p.responses, layout) for p in row)
            if layout == "padded" and row:
                longest = max(
                    len(groups[p.group].prompt) + len(groups[p.group].responses[r])
                    for p in row
                    for r in p.responses
                )
                total = longest * sum(len(p.responses) for p in row)
            assert total <= budget or len(row) == len(row[0].units) == 1
            for p in row:
                used = {r for c in p.units for r in groups[p.group].comparisons[c][:2]}
                assert used == set(p.responses) and len(used) == len(p.responses)


def test_a_plan_is_reproducible_and_differs_by_epoch_and_seed():
    groups = random_groups(40)

    def plan(seed, epoch, budget=200):
        return make_plan(groups, units_per_step=4, max_tokens=budget, seed=seed, epoch=epoch)

    assert plan(1, 0) == plan(1, 0)
    assert len({plan_digest(groups, plan(s, e)) for s in (1, 2) for e in (0, 1)}) == 4
    assert plan_digest(groups, plan(1, 0)) == plan_digest(groups, plan(1, 0, budget=60))


def test_without_a_seed_the_order_of_the_data_is_kept():
    groups = random_groups(20)
    plan = make_plan(groups, units_per_step=5, max_tokens=10**6, seed=None)
    flat = list(itertools.chain.from_iterable(sorted(step) for step in named(plan)))
    assert flat == sorted(flat)


def lognormal_pairs(count: int) -> list[int]:
    rng = np.random.default_rng(0)
    return np.clip(rng.lognormal(6.3, 0.7, count), 30, 8192).astype(int).tolist()


def test_best_fit_in_windows_needs_no_more_rows_than_the_tokens_do():
    costs, capacity, window = lognormal_pairs(8192), 32768, 2048
    for start in range(0, len(costs), window):
        part = costs[start : start + window]
        bins = best_fit_decreasing(part, capacity)
        assert sorted(i for b in bins for i in b) == list(range(window))
        assert max(sum(part[i] for i in b) for b in bins) <= capacity
        assert len(bins) == -(-sum(part) // capacity)


def test_balanced_rows_carry_equal_work():
    costs = lognormal_pairs(256)
    work = [c + c * c / 8192 for c in costs]
    bins = balance(costs, work, 8, capacity=10**9)
    loads = [sum(work[i] for i in b) for b in bins]
    assert max(loads) / (sum(loads) / 8) < 1.012
    assert balance([5, 5, 5], [1.0, 1.0, 1.0], 2, capacity=5) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_rows_compute_every_wanted_response_once(layout):
    groups = random_groups(30)
    wanted = [(g, r) for g, group in enumerate(groups) for r in range(len(group.responses))][::2]
    rows = [
        row
        for window in reference_rows(groups, wanted, max_tokens=120, layout=layout, window=7)
        for row in window
    ]
    assert sorted((p.group, r) for row in rows for p in row for r in p.responses) == wanted


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 999))
def test_every_layout_scores_the_same_tokens_from_the_right_place(count, seed):
    groups = random_groups(count, seed)
    (step,) = make_plan(groups, units_per_step=10**6, max_tokens=10**6, seed=None)
    (row,) = step.ranks[0]
    shared, packed, padded = (make_batch(groups, row, layout) for layout in LAYOUTS)
    for batch in (shared, packed, padded):
        for name in ("targets", "response_ids", "units", "weights", "response_lengths"):
            assert torch.equal(getattr(batch, name), getattr(shared, name)), name
        ids = batch.input_ids.flatten()
        if batch.position_ids is None:
            positions = torch.arange(batch.input_ids.shape[1]).repeat(len(batch.input_ids))
        else:
            positions = batch.position_ids.flatten()
        owners = [(groups[p.group], r) for p in row for r in p.responses]
        expected, before = [], []
        for group, r in owners:
            sequence = np.concatenate([group.prompt, group.responses[r]])
            first = max(len(group.prompt), 1)
            expected += sequence[first:].tolist()
            before += list(
                zip(
                    sequence[first - 1 : -1].tolist(),
                    range(first - 1, len(sequence) - 1),
                    strict=True,
                )
            )
        assert batch.targets.tolist() == expected
        found = zip(
            ids[batch.score_index].tolist(), positions[batch.score_index].tolist(), strict=True
        )
        assert list(found) == before
    assert shared.computed_tokens == sum(
        part_tokens(groups[p.group], p.responses, "shared") for p in row
    )
    assert shared.segments is not None and shared.segments.length == shared.computed_tokens


def test_pair_tokens_count_two_sequences_per_comparison():
    group = Group(
        np.arange(5, dtype=np.int32),
        [np.arange(n, dtype=np.int32) for n in (2, 3, 4)],
        [(0, 1, 1.0), (2, 1, 0.5), (0, 2, 1.0)],
    )
    batch = make_batch([group], (Part(0, (0, 1, 2), (0, 1, 2)),), "shared")
    assert batch.pair_tokens == 6 * 5 + 2 * (2 + 3 + 4)
    assert batch.computed_tokens == 5 + 2 + 3 + 4
    assert batch.weights.tolist() == [1.0, 0.5, 1.0]
    assert batch.ref_logps is None
    assert count_units([group]) == 3


def test_a_runs_plan_follows_its_configuration():
    groups = random_groups(40)

    def plan(**keys):
        config = TrainConfig(per_device_train_batch_size=3, gradient_accumulation_steps=2, **keys)
        return epoch_plan(config, groups, layout="packed", max_tokens=90, epoch=1)

    def expected(seed):
        keys = {"units_per_step": 6, "max_tokens": 90, "layout": "packed", "epoch": 1}
        return make_plan(groups, seed=seed, **keys)

    assert plan() == expected(42) != expected(7)
    assert plan(seed=7) == plan(data_seed=7) == plan(seed=3, data_seed=7) == expected(7)
    assert plan(shuffle=False) == plan(shuffle=False, data_seed=7) == expected(None)
