"""Judges of rounds, what is made of their scores, and what is watched."""

import json
import shutil
import sys
import threading
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from endpoint_stand_in import endpoint_stand_in
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from fastdpo.config.rounds import RoundsConfig
from fastdpo.data.write import writer_of
from fastdpo.errors import ConfigError, DataError, FastDPOError
from fastdpo.rounds import endpoint
from fastdpo.rounds.endpoint import Endpoint
from fastdpo.rounds.judges import Implicit, Question, RewardModel, exact, from_file, same_value
from fastdpo.rounds.pairing import Scored, check_loss, make_rows
from fastdpo.rounds.watch import repetition, watched

ASKED = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It is 42.", "42"),
        ("1,234.5 apples", "1234.5"),
        ("12 of them, so \\boxed{7} remain of 9", 7),
        ("\\boxed{3\\frac{1}{2}}", "3.5"),
        ("First 3, then 4.\n#### 7\n", "It took 3 and 4.\n#### 7"),
        ("minus: -8", -8),
        ("5-3", "2"),
        ("$1,000", "1000"),
        ("\\boxed{2^{10}}", 1024),
        ("25%", "0.25"),
        ("0", 0),
    ],
)
def test_values_are_compared_however_they_are_written(answer, expected):
    judge = same_value("gold")
    assert judge([Question(ASKED, [answer, "3", "who knows"], {"gold": expected})]) == [[1, 0, 0]]


def test_answers_are_compared_with_the_rows_own(monkeypatch):
    assert exact("answer")([Question("q", [" Yes \n", "no"], {"answer": "yes"})]) == [[1, 0]]
    with pytest.raises(DataError, match="holds no value to compare"):
        same_value("answer")([Question(ASKED, ["4"], {"answer": "who knows"})])
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match="pip install math-verify"):
        same_value("answer")


@pytest.mark.parametrize(
    ("returned", "score", "failure"),
    [
        ("np.float32(0.5)", 0.5, None),
        ("torch.tensor([2.0])", 2.0, None),
        ("True", 1.0, None),
        ("decimal.Decimal('0.25')", 0.25, None),
        ("None", None, "score returned None for a score"),
        ("'0.5'", None, "score returned a str for a score"),
        ("[1, 2]", None, "score returned a list for a score"),
        ("torch.zeros(2)", None, "score returned a Tensor for a score"),
        ("float('nan')", None, "score returned no finite number"),
        ("10**400", None, "score returned no finite number"),
    ],
)
def test_what_a_function_may_return(tmp_path, returned, score, failure):
    """From a file whose dataclass looks up its own module."""
    (tmp_path / "judge.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses, decimal, torch, numpy as np\n"
        "@dataclasses.dataclass\nclass Asked:\n    text: str\n"
        f"def score(prompt, response, row):\n    return {returned}\n"
    )
    judge = from_file(f"{tmp_path}/judge.py:score")
    assert judge([Question("q", ["a", "b"], {})]) == [[score, score]]
    assert judge.failures == ({failure: 2} if failure else {})


def test_a_reward_model_scores_each_answer_as_alone(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, num_labels=1, pad_token_id=0, **sizes
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = RewardModel(str(tmp_path), RoundsConfigStub, batch_size=3)
    answers = ["yes", "no no no no", "big yes big no big", "small", "yes no"]
    found = judge([Question("one two", answers[:4], {}), Question("far", answers[4:], {})])
    texts = [f"one two{answer}" for answer in answers[:4]] + [f"far{answers[4]}"]
    with torch.no_grad():
        alone = [
            float(model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0])
            for text in texts
        ]
    assert [value for row in found for value in row] == pytest.approx(alone, rel=1e-4)
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 3 labels; expected a reward model"):
        RewardModel(str(tmp_path), RoundsConfigStub)


RoundsConfigStub: Any = SimpleNamespace(use_cpu=True)


@pytest.fixture
def with_template(tiny_model, tied_model, tokenizer, tmp_path):
    """Judges of models whose chat template begins with a text: a classifier, and the policy."""

    def make(name: str, begin: str) -> tuple[RewardModel, Implicit]:
        changed = AutoTokenizer.from_pretrained(tiny_model)
        without_tools = changed.chat_template.partition("{% endif %}")[2]
        changed.chat_template = begin + without_tools
        policy = shutil.copytree(tied_model, tmp_path / name / "policy")
        classifier = tmp_path / name / "classifier"
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), num_attention_heads=2, num_labels=1, **sizes
        )
        LlamaForSequenceClassification(config).save_pretrained(classifier)
        for folder in (policy, classifier):
            changed.save_pretrained(folder)
        keys = {"dtype": "float32", "use_cpu": True, "bf16": False, "max_length": 512, "beta": 0.5}
        names = {"model_name_or_path": policy, "judge_model": str(tiny_model)}
        return RewardModel(str(classifier), RoundsConfigStub), Implicit(
            SimpleNamespace(**keys, **names)
        )

    return make


def test_judges_that_are_models_have_what_the_chat_template_is_given(with_template):
    tools = [{"type": "function", "function": {"name": "look"}}]
    given = {"tools": tools, "loud": True}
    judges = with_template("asked", "{% if tools and loud %}big small {% endif %}")
    always = with_template("always", "big small ")
    long = Question([{"role": "user", "content": "yes " * 600}], ["no", "yes"], {})
    implicit = judges[1]
    assert implicit([long, Question("q", ["", "42"], {})])[0] == [None, None]
    assert implicit.failures == {"the prompt reaches max_length": 2}
    for judge, other in zip(judges, always, strict=True):
        plain = [Question(ASKED, ["yes", "no no"], {})]
        found = judge([Question(ASKED, ["yes", "no no"], {}, given), *plain])
        assert found[0] == pytest.approx(other(plain)[0], rel=1e-5)
        assert found[1] != pytest.approx(found[0], rel=1e-3)


# An endpoint


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "_WAIT", 0.01)
    with endpoint_stand_in() as made:
        yield made


def judge(server, folder, **keys):
    fixed = {"judge": server.url, "judge_model": "m", "judge_mode": "absolute"}
    fixed |= {"judge_rubric": None, "judge_max_tokens": None}
    return Endpoint(SimpleNamespace(**fixed | keys), folder)


def test_scores_are_read_kept_and_not_asked_for_twice(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answers = lambda text: (
        "Good.\n**Score: 7/10**" if "[Answer]\nyes" in text else "Score: 2.5"
    )
    question = Question(ASKED, ["yes", "no"], {})
    assert judge(server, tmp_path)([question, question]) == [[0.7, 0.25]] * 2
    assert len(server.seen) == 2 and server.seen[0]["authorization"] == "Bearer secret"
    assert server.seen[0]["model"] == "m" and server.seen[0]["temperature"] == 0
    assert "What is 12 + 30?" in server.seen[0]["messages"][0]["content"]
    again = judge(server, tmp_path)
    assert again([question]) == [[0.7, 0.25]] and len(server.seen) == 2 and again.spent == 20
    with (tmp_path / "judge.jsonl").open("a") as file:
        file.write('{"key": "cut o')
    assert judge(server, tmp_path)([question]) == [[0.7, 0.25]]
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()


def test_pairs_are_asked_about_in_both_orders(server, tmp_path):
    """The judge likes "good", and the first one of two others."""

    def better(text: str) -> str:
        first = text.partition("[Answer A]\n")[2].partition("\n")[0]
        second = text.partition("[Answer B]\n")[2].partition("\n")[0]
        if "good" in (first, second):
            return f"Better: {'A' if first == 'good' else 'B'}"
        return "Better: A"

    server.answers = better
    made = judge(server, tmp_path, judge_mode="pairwise")
    assert made([Question("q", ["bad", "good", "worse"], {})]) == [[0.25, 1.0, 0.25]]
    assert made.comparisons == {"comparisons": 3, "orders disagree": 1} and len(server.seen) == 6
    server.answers = lambda text: "Better: tie"
    assert made([Question("other", ["a", "b"], {})]) == [[0.5, 0.5]]
    assert made.comparisons["ties"] == 1


def test_refusals_and_answers_without_a_verdict_are_counted(server, tmp_path):
    said = {"a": "I like it.", "b": "Score: 11", "d": "Score: -3", "e": "Score: 6 out of 10"}
    server.answers = lambda text: said.get(text.partition("[Answer]\n")[2][0])
    made = judge(server, tmp_path)
    assert made([Question("q", list(said), {})]) == [[None, None, None, 0.6]]
    assert made.failures == {
        "the endpoint's answer holds no verdict": 1,
        "the endpoint's score is not from 0 to 10": 2,
    }
    server.refuse = True
    assert made([Question("q", ["c"], {})]) == [[None]]
    assert made.failures["the endpoint refused"] == 1
    server.refuse = False
    again = judge(server, tmp_path)
    assert again([Question("q", ["c"], {})]) == [[None]] and again.spent == 50


def test_an_endpoint_that_fails_for_a_while_is_asked_again(server, tmp_path):
    server.status = [503, 429, 500]
    assert judge(server, tmp_path)([Question("q", ["a"], {})]) == [[0.5]]
    assert len(server.seen) == 4
    null = json.dumps({"choices": [{"message": None}]}).encode()
    server.raw = [(null, len(null)), (null, len(null) + 9), (b"<html>", 6), (b"[]", 2)]
    assert judge(server, tmp_path)([Question("q", ["b"], {})]) == [[0.5]]
    server.raw = [(b"[]", 2)] * 5
    with pytest.raises(FastDPOError, match="no answer in the form of OpenAI's"):
        judge(server, tmp_path)([Question("q", ["c"], {})])


def test_an_endpoint_that_is_down_is_one_line_and_keeps_what_was_said(server, tmp_path):
    made = judge(server, tmp_path)
    made([Question("q", ["a"], {})])
    server.status = [401]
    with pytest.raises(FastDPOError, match="401 Unauthorized; what was judged is kept"):
        made([Question("q", ["b"], {})])
    server.status = [503] * 9
    with pytest.raises(FastDPOError, match="503 Service Unavailable"):
        made([Question("q", ["b"], {})])
    assert judge(server, tmp_path).spent == 10


def test_after_a_failure_nothing_more_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_AT_ONCE", 1)
    server.status = [401]
    with pytest.raises(FastDPOError, match="401"):
        judge(server, tmp_path)([Question("q", list("abcdefgh"), {})])
    assert len(server.seen) <= 2  # the next one may have begun meanwhile


def test_one_failing_request_loses_none_of_those_beside_it(server, tmp_path):
    server.status, together = [401], threading.Barrier(5)
    server.answers = lambda text: f"Score: {5 + 0 * together.wait()}"
    with pytest.raises(FastDPOError, match="401"):
        judge(server, tmp_path)([Question("q", ["b", "c", "d", "e", "f"], {})])
    server.answers = lambda text: "Score: 5"
    kept = judge(server, tmp_path)
    assert len(kept.known) == 4 and kept.spent == 40
    (tmp_path / "judge.jsonl").write_text((tmp_path / "judge.jsonl").read_text().rstrip()[:-5])
    made = judge(server, tmp_path)
    assert made([Question("q", ["b", "c", "d", "e", "f"], {})]) == [[0.5] * 5]
    assert judge(server, tmp_path).known == made.known


def test_tokens_have_a_limit(server, tmp_path):
    made = judge(server, tmp_path, judge_max_tokens=10)
    made([Question("q", ["a"], {})])
    with pytest.raises(FastDPOError, match="10 tokens were used, judge_max_tokens is 10; raise it"):
        made([Question("q", ["b"], {})])


# Rows


def scored(answers, scores, complete=None, **more) -> Scored:
    return Scored(ASKED, answers, scores, complete or [True] * len(answers), **more)


def config(**keys: Any) -> RoundsConfig:
    fixed = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "judge": "exact"}
    return RoundsConfig(**fixed | keys)


def test_the_best_answer_against_the_worst():
    made = make_rows(config(), [scored(["a", "b", "c", "d"], [1, 3, None, 2])])
    (row,) = made.rows
    assert row["chosen"][0]["content"] == "b" and row["rejected"][0]["content"] == "a"


def test_what_cannot_be_learnt_from_is_counted():
    cases = [
        scored(["a", "b"], [1, 1]),
        scored(["a", "b"], [1, None]),
        scored(["a", "b", "c"], [3, 2, 1], [False, True, True]),
        scored(["a", " ", "c"], [3, 0, 1]),
    ]
    made = make_rows(config(), cases)
    assert [row["chosen"][0]["content"] for row in made.rows] == ["b", "a"]
    assert made.left_out == {
        "whose answers all have the same score": 1,
        "with fewer than two answers that are whole and scored": 1,
    }
    kept = make_rows(config(mask_truncated_completions=False), cases[2:3])
    assert kept.rows[0]["chosen"][0]["content"] == "a"
    twice = scored(["a", "a"], [1, 2])
    none = make_rows(config(), [cases[0], twice])
    assert not none.rows and none.left_out == {
        "whose answers all have the same score": 1,
        "whose best and worst answers are the same text": 1,
    }
    with pytest.raises(DataError, match="no answer of the round has a score: 2 answers: x"):
        make_rows(config(), [scored(["a", "b"], [None, None])], {"x": 2})


def test_losses_of_scores_have_all_answers_equal_ones_too():
    for loss in ("grpo", "sppo", "listwise"):
        same, other = scored(["a", "b", "b"], [1, 1, 1]), scored(["a", "b"], [1, 2])
        made = make_rows(config(loss_type=[loss]), [same, other])
        assert made.rows[0]["scores"] == [1, 1, 1] and len(made.rows[0]["responses"]) == 3
        assert not made.left_out and len(made.rows) == 2
        none = make_rows(config(loss_type=[loss]), [same])
        assert not none.rows and none.left_out == {"whose answers all have the same score": 1}


def test_spin_sets_the_rows_own_answer_against_every_other():
    own = [{"role": "assistant", "content": "mine"}]
    cases = [
        scored(["a", "mine", "a", "b"], [None] * 4, own=own),
        scored(["mine"], [None], own=own),
    ]
    made = make_rows(config(judge="row", loss_type=["spin"]), cases)
    assert [row["rejected"][0]["content"] for row in made.rows] == ["a", "a", "b"]
    assert all(row["chosen"] == own for row in made.rows)
    assert made.left_out == {"whose answers are all cut off, or the row's own": 1}
    for loss in ("grpo", "sppo"):
        with pytest.raises(ConfigError, match=f"{loss} reads scores of answers; expected"):
            check_loss(config(judge="row", loss_type=[loss]))


def test_losses_of_labels_have_the_best_and_the_worst_answer_with_one():
    made = make_rows(config(loss_type=["kto"]), [scored(["a", "b", "c"], [1, 3, 2])])
    assert [(row["completion"][0]["content"], row["label"]) for row in made.rows] == [
        ("b", True),
        ("a", False),
    ]


def test_what_the_chat_template_is_given_stays_with_a_row(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": {}}}}]
    template = {"tools": tools, "enable_thinking": False}
    made = make_rows(
        config(), [scored(["a", "b"], [1, 2], template=template), scored("ab", [1, 2])]
    )
    writer_of(tmp_path / "train.parquet")(made.rows)
    first, second = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"))
    assert first["tools"] == tools and first["chat_template_kwargs"] == {"enable_thinking": False}
    assert first["chosen"] == [{"role": "assistant", "content": "b"}] and second["tools"] is None


def test_what_is_watched():
    found = watched(
        ["a b c d a b c d", "x"],
        [True, False],
        [1.0, None],
        [0.0, 5.0],
        [8, 2],
        [-2.0, -4.0],
        [-4.0, -3.0],
        [-2.4, None],
        [(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (None, 1.0)],
    )
    assert found.as_dict() == {
        "score": 1.0,
        "win_rate": 1.0,
        "tokens": 5.0,
        "complete": 0.5,
        "repetition": pytest.approx(0.1),
        "kl": pytest.approx(0.1),
        "engine_difference": pytest.approx(0.05),
        "unscored": 1,
        "judge_accuracy": 0.625,
    }
    assert repetition("a b c d e") == 0 and repetition("") == 0
