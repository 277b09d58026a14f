"""Groups of N responses: their boundary, their comparisons, and which of these are kept."""

from typing import Any

import pytest
from data_samples import (
    assistant,
    chat,
    tokenize_rows,
    user,
)
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdpo.data.grouping import check_agreement, make_groups
from fastdpo.data.tokenize import tokenize_dataset

pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_the_boundary_is_the_smallest_over_the_group(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {
        "prompt": "The quick bro",
        "responses": ["!", "wn fox", "ke"],
        "comparisons": [[0, 1], [2, 1]],
    }
    (made,) = tokenize_rows([row], tokenizer)
    assert tokenizer.decode(made["prompt_ids"]) == "The quick"
    texts = [tokenizer.decode(ids) for ids in made["response_ids"]]
    assert texts == [" bro!</s>", " brown fox</s>", " broke</s>"]


def test_messages_in_groups(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["Blue.", "Green.", "Red."]
    row = {
        "prompt": [user("What color is the sky?")],
        "responses": [[assistant(text)] for text in texts],
        "scores": [1.0, 0.5, 0.5],
    }
    (made,) = tokenize_rows([row], tokenizer)
    assert (made["winners"], made["losers"]) == ([0, 0], [1, 2])
    for i in (1, 2):
        (pair,) = tokenize_rows([chat(row["prompt"], texts[0], texts[i])], tokenizer)
        assert pair["prompt_ids"] == made["prompt_ids"]
        assert pair["response_ids"] == [made["response_ids"][0], made["response_ids"][i]]


@pytest.mark.parametrize(
    ("comparisons", "expected"),
    [
        ([[0, 1], [2, 1]], ([0, 2], [1, 1], [1.0, 1.0])),
        ([[0, 1], [2, 1, 0.25]], ([0, 2], [1, 1], [1.0, 0.25])),
        (
            [{"winner": 2, "loser": 0, "weight": 2.0}, {"winner": 1, "loser": 0}],
            ([2, 1], [0, 0], [2.0, 1.0]),
        ),
    ],
)
def test_comparisons(
    tokenizer: PreTrainedTokenizerBase, comparisons: Any, expected: tuple[list[Any], ...]
) -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c"], "comparisons": comparisons}
    (made,) = tokenize_rows([row], tokenizer)
    assert (made["winners"], made["losers"], made["weights"]) == expected


def test_scores_give_every_pair_that_differs(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 1, 0]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]},
    ]
    dataset, report = tokenize_dataset(Dataset.from_list(rows), tokenizer, max_length=None)
    pairs = set(zip(dataset[0]["winners"], dataset[0]["losers"], strict=True))
    assert pairs == {(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)}
    assert (report.rows_out, report.dropped_no_comparison, report.skipped) == (1, 1, 0)


def test_sampled_comparisons_depend_on_seed_and_content(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"prompt": f"p{i}", "responses": list("abcdefg"), "scores": list(range(7))}
        for i in range(8)
    ]

    def sampled(rows: list[dict[str, Any]], seed: int) -> list[Any]:
        made = tokenize_rows(rows, tokenizer, max_comparisons_per_group=5, seed=seed)
        return [list(zip(row["winners"], row["losers"], strict=True)) for row in made]

    first = sampled(rows, 0)
    assert all(len(set(pairs)) == 5 for pairs in first)
    assert all(winner > loser for pairs in first for winner, loser in pairs)
    assert len({tuple(pairs) for pairs in first}) > 1
    assert sampled(rows[::-1], 0) == first[::-1]
    assert sampled(rows, 1) != first


@pytest.mark.parametrize("group_prompts", [True, False])
def test_comparisons_that_repeat_and_contradict_others(
    tokenizer: PreTrainedTokenizerBase, group_prompts: bool
) -> None:
    long = "The quick brown fox " * 9

    def agreement(pairs: list[tuple[str, str, str]]) -> tuple[int, int, str]:
        rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
        made, _ = tokenize_dataset(Dataset.from_list(rows), tokenizer, max_length=24)
        found = check_agreement(make_groups(made, group_prompts=group_prompts))
        return found.repeated, found.contradicted, str(found)

    assert agreement([("p", "a", "b"), ("q", "b", "a"), ("p", "b", "c")]) == (0, 0, "")
    several = [
        ("p", "a", "b"),
        ("p", "a", "b"),
        ("p", "b", "a</s>"),
        ("p", "b", "a"),
        ("q", "a", "b"),
    ]
    line = "; 2 comparisons repeat another one; 1 pairs are stated both ways round"
    assert agreement(several) == (2, 1, line)
    # What is cut off may be the difference: between two rows, or within one.
    assert agreement([("p", long + "a", "b"), ("p", "b", long + "c")]) == (0, 1, line[34:])
    assert agreement([("p", long + "a", long + "b")] * 2) == (0, 0, "")
