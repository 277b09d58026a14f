"""Tokenising: token for token what TRL 1.16 makes of the same rows, and what bad rows get."""

import json
from typing import Any

import pytest
from data_samples import (
    CHATML,
    CHATS,
    LABELS,
    TEXT_ROWS,
    TEXTS,
    THINKING,
    TURNS,
    assistant,
    chat,
    make_tokenizer,
    tokenize_rows,
    user,
)
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from like_trl import assert_like_trl, trl_pairs, trl_rows
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import KTOTrainer
from trl.data_utils import extract_prompt

from bench.data import gsm8k_groups, gsm8k_pairs, shared_file
from fastdpo.data.rows import parse_row
from fastdpo.data.tokenize import tokenize_dataset

pytestmark = pytest.mark.usefixtures("datasets_cache")
needs_gsm8k = pytest.mark.skipif(
    shared_file("gsm8k_pairs.jsonl") is None, reason="the GSM8K rows lie beside the repository"
)


@pytest.fixture(scope="session", params=["chatml", "thinking", "smollm2"])
def chat_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2_tokenizer")
    return make_tokenizer(CHATML if request.param == "chatml" else THINKING)


@pytest.fixture(scope="session", params=["plain", "bos", "smollm2"])
def text_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2_tokenizer")
    return make_tokenizer(bos=request.param == "bos")


def test_messages_like_trl(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    assert_like_trl(CHATS, chat_tokenizer)


@pytest.mark.parametrize("encoded", [False, True], ids=["list", "json"])
def test_tools_like_trl(encoded: bool) -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "Add numbers."}}]
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    prompt = [
        user("What is 1 + 1?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    given_tools: Any = json.dumps(tools) if encoded else tools
    rows = [chat(prompt, "2", "3", tools=given_tools), chat([user("Hi")], "a", "b", tools=None)]
    made = assert_like_trl(rows, make_tokenizer(CHATML))
    text = make_tokenizer(CHATML).decode(made[0]["prompt_ids"])
    assert "Add numbers." in text
    assert "arguments" in text


def test_chat_template_kwargs_like_trl() -> None:
    rows = [
        chat([user("Hi")], "a", "b", chat_template_kwargs={"enable_thinking": thinking})
        for thinking in (True, False)
    ]
    made = assert_like_trl(rows, make_tokenizer(THINKING))
    # The generation prompt is no prefix of any answer; where they part, the responses begin.
    assert made[0]["prompt_ids"] == made[1]["prompt_ids"]
    tokenizer = make_tokenizer(THINKING)
    assert tokenizer.decode(made[0]["response_ids"][0]) == "a</s>"


class OwnTemplate(PreTrainedTokenizerFast):
    """Tokenises messages by a way of its own, as Mistral's do, so their text must not be used."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        assert kwargs.pop("tokenize"), "rendered to text"
        ids = [len(conversation)]
        for message in conversation:
            ids += self(message["content"])["input_ids"]
        return {"input_ids": ids}


def test_a_tokenizer_with_its_own_template_like_trl(tokenizer: PreTrainedTokenizerBase) -> None:
    names = tokenizer.special_tokens_map
    own = OwnTemplate(tokenizer_object=tokenizer.backend_tokenizer, **names)
    made = assert_like_trl(CHATS, own)
    assert made[0]["prompt_ids"] == [], "the first token counts the messages"


def test_text_like_trl(text_tokenizer: PreTrainedTokenizerBase) -> None:
    made = assert_like_trl(TEXT_ROWS, text_tokenizer)
    if text_tokenizer.bos_token == "<s>":
        merged = made[2]
        assert text_tokenizer.decode(merged["prompt_ids"]).endswith("The quick")
        assert text_tokenizer.decode(merged["response_ids"][0]) == " brown fox</s>"


def test_an_empty_prompt_has_no_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    (row,) = tokenize_rows(
        [{"prompt": "", "chosen": "a", "rejected": "b"}], tokenizer, max_length=8
    )
    assert row["prompt_ids"] == []
    assert [tokenizer.decode(ids) for ids in row["response_ids"]] == ["a</s>", "b</s>"]


IMPLICIT_TEXT = [
    ("The sky is blue.", "The sky is green."),
    ("The sky is blue", "The sky is blue and wide"),
    ("The sky is the same twice", "The sky is the same once"),
    ("Different from", "the first"),
    ("a", "ab"),
]


def test_implicit_prompts_like_trl(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in IMPLICIT_TEXT]
    assert_like_trl(rows, chat_tokenizer)
    talks = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        for row in CHATS
    ]
    talks.append({"chosen": TURNS[:2], "rejected": [*TURNS, assistant("42")]})
    assert_like_trl(talks, chat_tokenizer)


@given(first=st.sampled_from("ab "), one=st.text("ab "), other=st.text("ab "))
def test_implicit_prompts_split_like_trl(first: str, one: str, other: str) -> None:
    chosen, rejected = first + one, first + other
    row = parse_row({"chosen": chosen, "rejected": rejected}, "pair")
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert (row.prompt, *row.responses) == tuple(theirs.values())


def test_an_implicit_prompt_may_be_empty(tokenizer: PreTrainedTokenizerBase) -> None:
    """TRL takes all of chosen but its last space for the prompt here; nothing is shared."""
    (row,) = tokenize_rows([{"chosen": "yes ", "rejected": "no"}], tokenizer)
    assert row["prompt_ids"] == []
    assert [tokenizer.decode(ids) for ids in row["response_ids"]] == ["yes </s>", "no</s>"]


def test_max_length_like_trl(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*CHATS[:3], CHATS[7]]
    full = tokenize_rows(rows, tokenizer)
    prompts = [len(row["prompt_ids"]) for row in full]
    lengths = {
        n + len(ids) for n, row in zip(prompts, full, strict=True) for ids in row["response_ids"]
    }
    limits = {length + more for length in lengths | set(prompts) for more in (-1, 0, 1)}
    kept = {
        limit: len(assert_like_trl(rows, tokenizer, limit))
        for limit in limits
        if limit > min(prompts)
    }
    assert kept[min(prompts) + 1] == prompts.count(min(prompts))
    assert kept[max(limits)] == len(rows)


def test_dpo_en_demo_like_trl(
    dpo_en_demo: list[dict[str, Any]], smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    made = assert_like_trl(dpo_en_demo, smollm2_tokenizer, 1024)
    assert len(made) > 250


@needs_gsm8k
def test_gsm8k_pairs_like_trl(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = (gsm8k_pairs() or [])[:400]
    assert len(assert_like_trl(rows, smollm2_tokenizer, 256)) == 400


@needs_gsm8k
def test_gsm8k_groups_are_their_pairs(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    """Every comparison of a group has the very tokens that TRL gives the pair."""
    groups = (gsm8k_groups() or [])[:60]
    made, report = tokenize_dataset(
        Dataset.from_list(groups), smollm2_tokenizer, max_length=1024, skip_bad_rows=True
    )
    assert report.rows_out + report.dropped_no_comparison + report.skipped == len(groups)
    pairs, tokens = [], []
    by_prompt = {row["prompt"]: row for row in groups}
    assert len(by_prompt) == len(groups)
    for row in made.to_list():
        text = smollm2_tokenizer.decode(row["prompt_ids"])
        source = next(value for prompt, value in by_prompt.items() if prompt.startswith(text))
        for winner, loser in zip(row["winners"], row["losers"], strict=True):
            chosen, rejected = source["responses"][winner], source["responses"][loser]
            assert source["scores"][winner] > source["scores"][loser]
            pairs.append({"prompt": source["prompt"], "chosen": chosen, "rejected": rejected})
            both = [row["response_ids"][i] for i in (winner, loser)]
            tokens.append({"prompt_ids": row["prompt_ids"], "response_ids": both})
    assert tokens == trl_pairs(Dataset.from_list(pairs), smollm2_tokenizer, 1024)


def test_labels_like_trl(tokenizer: PreTrainedTokenizerBase) -> None:
    text = [
        {"prompt": p, "completion": c, "label": i % 2 == 0} for i, (p, c, _) in enumerate(TEXTS)
    ]
    talks = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in CHATS]
    for rows in (text, talks):
        made = tokenize_rows(rows, tokenizer, needs=LABELS)
        expected = trl_rows(Dataset.from_list(rows), tokenizer, None, KTOTrainer)
        for row, theirs in zip(made, expected, strict=True):
            assert row["prompt_ids"] == theirs["prompt_ids"]
            assert row["response_ids"] == [theirs["completion_ids"]]
            assert row["labels"] == [theirs["label"]]
            assert row["winners"] == row["losers"] == row["weights"] == []


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(max_size=12),
    chosen=st.text(max_size=12),
    rejected=st.text(max_size=12),
    as_messages=st.booleans(),
)
def test_any_text_like_trl(prompt: str, chosen: str, rejected: str, as_messages: bool) -> None:
    tokenizer = PROPERTY_TOKENIZER
    row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if as_messages:
        row = chat([user(prompt)], chosen, rejected)
    other = CHATS[0] if as_messages else TEXT_ROWS[0]
    _, report = tokenize_dataset(
        Dataset.from_list([row, other]), tokenizer, max_length=None, skip_bad_rows=True
    )
    if report.skipped:
        assert report.identical_pairs == 1
    else:
        assert_like_trl([row, other], tokenizer)


PROPERTY_TOKENIZER = make_tokenizer(CHATML)
