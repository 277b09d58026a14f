"""Scores, rankings, labels and log-probabilities: how they are stored, and which rows are of no use
to a loss that needs them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import (
    LABELS,
    PAIR,
    RANKS,
    SCORES,
    TEXT_ROWS,
    WIN_RATES,
    error_of,
    report_of,
    tokenize,
    tokenize_rows,
)
from datasets import Dataset
from test_tokenize_cache import Untouchable
from transformers import PreTrainedTokenizerBase

from fastdpo.data.load import load_rows
from fastdpo.data.needs import COMPARISONS, Needs
from fastdpo.data.notes import TRUNCATED
from fastdpo.data.tokenize import tokenize_dataset

pytestmark = pytest.mark.usefixtures("datasets_cache")

GROUP = {"prompt": "p", "responses": ["a", "b", "c", "d"]}
LABELLED = {"prompt": "p", "completion": " a", "label": True}


def pairs_of(row: dict[str, Any]) -> list[tuple[int, int]]:
    return list(zip(row["winners"], row["losers"], strict=True))


def test_scores_are_kept_and_imply_ranks(tokenizer: PreTrainedTokenizerBase) -> None:
    (made,) = tokenize_rows([GROUP | {"scores": [0.1, 3, 0.1, -7]}], tokenizer)
    assert made["scores"] == [0.1, 3.0, 0.1, -7.0]
    assert made["ranks"] == [1, 0, 1, 2]
    assert made["logps"] == made["labels"] == []


@pytest.mark.parametrize(
    ("rankings", "ranks"),
    [
        ([2, 1, 4, 3], [1, 0, 3, 2]),
        ([2, 1, 2, 4], [1, 0, 1, 2]),
        ([2, 1, 2, 3], [1, 0, 1, 2]),
        ([1.0, 1.0, 3.0, 3.0], [0, 0, 1, 1]),
    ],
    ids=["no ties", "competition ranks", "dense ranks", "floats"],
)
def test_rankings(
    tokenizer: PreTrainedTokenizerBase, rankings: list[Any], ranks: list[int]
) -> None:
    """Whichever way ties are numbered, a better rank wins, as a higher score does."""
    (made,) = tokenize_rows([GROUP | {"rankings": rankings}], tokenizer)
    assert made["ranks"] == ranks
    assert made["scores"] == []
    (scored,) = tokenize_rows([GROUP | {"scores": [-rank for rank in rankings]}], tokenizer)
    assert pairs_of(made) == pairs_of(scored)
    assert set(pairs_of(made)) == {
        (i, j) for i in range(4) for j in range(4) if rankings[i] < rankings[j]
    }


def test_what_is_stated_goes_before_what_is_implied(tokenizer: PreTrainedTokenizerBase) -> None:
    row = GROUP | {"scores": [1, 2, 3, 4], "rankings": [1, 2, 3, 4]}
    (made,) = tokenize_rows([row], tokenizer)
    assert (made["scores"], made["ranks"]) == ([1, 2, 3, 4], [0, 1, 2, 3])
    assert (0, 3) in pairs_of(made)
    (made,) = tokenize_rows([row | {"comparisons": [[2, 0]]}], tokenizer)
    assert pairs_of(made) == [(2, 0)]
    assert (made["scores"], made["ranks"]) == ([1, 2, 3, 4], [0, 1, 2, 3])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_logps_of_another_policy(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    logps = [-1.25, -300.0, 0.0, 1e-4]
    rows = [GROUP | {"scores": [1, 2, 3, 4], "logps": logps}, GROUP | {"scores": [1, 2, 3, 4]}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        cells = 'p,"[""a"",""b"",""c"",""d""]","[1,2,3,4]",'
        path.write_text(f'prompt,responses,scores,logps\n{cells}"{logps}"\n{cells}\n')
    else:
        Dataset.from_list(rows).to_parquet(path)
    made = tokenize_rows(load_rows(str(path), "train"), tokenizer, needs=SCORES)
    assert [row["logps"] for row in made] == [logps, []]


def test_a_labelled_response_is_not_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    long = LABELLED | {"completion": " fox jumps" * 40}
    rows, report = tokenize([LABELLED, long], tokenizer, 16, needs=LABELS)
    assert report.noted[TRUNCATED] == 1
    (whole,) = tokenize_rows([long], tokenizer, None, needs=LABELS)
    assert rows[1] == whole
    assert len(whole["response_ids"][0]) > 16
    assert [row["labels"] for row in rows] == [[True], [True]]
    assert all(row["scores"] == row["ranks"] == row["winners"] == [] for row in rows)


EQUAL = GROUP | {"scores": [2, 2, 2, 2]}
LONE = {"prompt": "p", "responses": ["a"], "scores": [1]}
GOOD = GROUP | {"scores": [1, 2, 2, 2]}


@pytest.mark.parametrize(
    ("needs", "row", "count", "phrase"),
    [
        (COMPARISONS, EQUAL, "no_comparison", "dropped without a comparison"),
        (COMPARISONS, LONE, "no_comparison", "dropped without a comparison"),
        (SCORES, LONE, "one_response", "dropped, one response only"),
        (WIN_RATES, LONE, "one_response", "dropped, one response only"),
        (RANKS, EQUAL, "same_ranks", "dropped, all ranks equal"),
        (RANKS, LONE, "one_response", "dropped, one response only"),
        (RANKS, GROUP | {"rankings": [1, 1, 1, 1]}, "same_ranks", "dropped, all ranks equal"),
    ],
)
def test_rows_that_teach_nothing_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerBase, needs: Needs, row: dict[str, Any], count: str, phrase: str
) -> None:
    good = GOOD | {"rankings": None}
    made, report = tokenize([good, {"scores": None} | row], tokenizer, needs=needs)
    assert [one["ranks"] for one in made] == [[1, 0, 0, 0]]
    assert getattr(report, f"dropped_{count}") == 1
    assert (report.rows_out, report.skipped) == (1, 0)
    assert f"1 of 2 rows kept; 1 {phrase}" in str(report)
    message = error_of([row, row], tokenizer, needs=needs)
    assert message == f"dataset: 0 of 2 rows kept; 2 {phrase}; expected at least one"


@pytest.mark.parametrize("needs", [SCORES, WIN_RATES])
def test_rows_of_equal_scores_count_in_the_means_of_a_loss(
    tokenizer: PreTrainedTokenizerBase, needs: Needs
) -> None:
    """As in TRL: their advantages are 0, and their pull to the reference is not."""
    made, report = tokenize([GOOD, EQUAL], tokenizer, needs=needs)
    assert [row["scores"] for row in made] == [GOOD["scores"], EQUAL["scores"]]
    assert "2 of 2 rows kept; 1 whose scores are all equal" in str(report)
    assert error_of([EQUAL, EQUAL], tokenizer, needs=needs) == (
        "dataset: 2 of 2 rows kept; 2 whose scores are all equal; expected some whose responses "
        "have different ones"
    )


def test_win_rates_may_be_stated_where_scores_are_equal(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = [
        EQUAL | {"comparisons": [[0, 1]]},
        GROUP | {"scores": None, "comparisons": [[1, 2]]},
        GROUP | {"scores": None, "comparisons": []},
    ]
    made, report = tokenize(rows, tokenizer, needs=WIN_RATES)
    assert [pairs_of(row) for row in made] == [[(0, 1)], [(1, 2)]]
    assert report.dropped_no_comparison == 1
    assert pairs_of(tokenize_rows([PAIR], tokenizer, needs=WIN_RATES)[0]) == [(0, 1)]


def test_the_same_answer_twice_may_have_two_scores(tokenizer: PreTrainedTokenizerBase) -> None:
    """Sampling repeats itself and a scorer need not; as a comparison, that would be nonsense."""
    row = {"prompt": "p", "responses": ["a", "a", "b"], "scores": [1, 2, 3]}
    (made,) = tokenize_rows([row], tokenizer, needs=SCORES)
    assert made["scores"] == [1, 2, 3]
    assert "responses[1] and responses[0]: are identical" in error_of([row], tokenizer)


@pytest.mark.parametrize(
    ("needs", "row", "message"),
    [
        (
            LABELS,
            PAIR,
            "kto needs rows of prompt, completion, label; found prompt, chosen, rejected; "
            "convert: unpair makes them",
        ),
        (
            LABELS,
            {"chosen": "ab", "rejected": "ac"},
            "kto needs rows of prompt, completion, label; found chosen, rejected; "
            "convert: unpair makes them",
        ),
        (
            LABELS,
            EQUAL,
            "kto needs rows of prompt, completion, label; found prompt, responses, scores",
        ),
        (
            Needs(loss="sigmoid"),
            LABELLED,
            "sigmoid needs rows of prompt, chosen, rejected, or of prompt, responses and "
            "comparisons, scores or rankings; found prompt, completion, label; "
            "convert: pair makes them",
        ),
        (
            SCORES,
            PAIR,
            "grpo needs rows of prompt, responses, scores; found prompt, chosen, rejected",
        ),
        (
            SCORES,
            LABELLED,
            "grpo needs rows of prompt, responses, scores; found prompt, completion, label",
        ),
        (
            SCORES,
            GROUP | {"comparisons": [[0, 1]], "rankings": [1, 2, 3, 4]},
            "grpo needs rows of prompt, responses, scores; found prompt, responses, comparisons, "
            "rankings",
        ),
        (
            WIN_RATES,
            LABELLED,
            "sppo needs rows of prompt, responses and scores or comparisons; found prompt, "
            "completion, label; convert: pair makes them",
        ),
        (
            RANKS,
            GROUP | {"comparisons": [[0, 1]]},
            "listwise needs rows of prompt, responses and rankings or scores; found prompt, "
            "responses, comparisons",
        ),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_rows_of_another_layout_than_the_loss_needs(
    tokenizer: PreTrainedTokenizerBase,
    needs: Needs,
    row: dict[str, Any],
    message: str,
    skip: bool,
) -> None:
    found = error_of([row, row], tokenizer, needs=needs, skip_bad_rows=skip, source="rows.jsonl")
    assert found == f"rows.jsonl: {message}"


@pytest.mark.parametrize(
    ("needs", "row", "message"),
    [
        (SCORES, {"scores": None, "comparisons": [[0, 1]]}, "scores: expected a list of 4 numbers"),
        (
            RANKS,
            {"scores": None, "comparisons": [[0, 1]]},
            "rankings: expected a list of 4 numbers",
        ),
    ],
)
def test_one_row_without_what_the_loss_needs(
    tokenizer: PreTrainedTokenizerBase, needs: Needs, row: dict[str, Any], message: str
) -> None:
    rows = [GOOD | {"comparisons": None}, GROUP | row]
    assert error_of(rows, tokenizer, needs=needs).startswith(f"dataset, row 2: {message}")
    assert report_of(rows, tokenizer, needs=needs, skip_bad_rows=True).skipped == 1


def test_of_two_layouts_the_one_that_the_loss_needs_is_read(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    both = PAIR | {"completion": " c", "label": False}
    (pair,) = tokenize_rows([both], tokenizer)
    assert pair == tokenize_rows([PAIR], tokenizer)[0]
    (labelled,) = tokenize_rows([both], tokenizer, needs=LABELS)
    assert labelled["labels"] == [False]
    (scored,) = tokenize_rows([GOOD | PAIR], tokenizer, needs=SCORES)
    assert scored["scores"] == GOOD["scores"]


def test_what_a_loss_needs_is_part_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, EQUAL)))
    watched = Untouchable(
        tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map
    )

    def run(needs: Needs) -> list[Any]:
        rows = load_rows(str(path), "train")
        return tokenize_dataset(rows, watched, max_length=64, needs=needs)[0].to_list()

    first = run(SCORES)
    monkeypatch.setattr(Untouchable, "closed", True)
    assert run(Needs(("scores",), "dapo")) == first
    with pytest.raises(AssertionError, match="tokenised again"):
        run(COMPARISONS)
    monkeypatch.setattr(Untouchable, "closed", False)
    both = run(WIN_RATES)
    monkeypatch.setattr(Untouchable, "closed", True)
    assert run(Needs(("comparisons", "scores"))) == both


def test_pairs_have_no_scores(tokenizer: PreTrainedTokenizerBase) -> None:
    """A column of that name beside a pair says how the pair came about."""
    rows = [row | {"scores": [1], "logps": "high", "rankings": 3} for row in TEXT_ROWS[:2]]
    assert tokenize_rows(rows, tokenizer) == tokenize_rows(TEXT_ROWS[:2], tokenizer)
