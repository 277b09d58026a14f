"""The demo: its data is what it says, and its run changes the model."""

import itertools
import json
import re
from collections import Counter
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastdpo.demo
from fastdpo.demo.__main__ import answer, demo_config, held_out_accuracies, main, open_page, summary
from fastdpo.demo.model import demo_model_path
from fastdpo.demo.rounds import rounds_config
from fastdpo.demo.score import score

HERE = Path(fastdpo.demo.__file__).parent
FILLER = frozenset(
    {
        *(
            "a",
            "an",
            "and",
            "are",
            "can",
            "do",
            "does",
            "for",
            "how",
            "i",
            "in",
            "is",
            "it",
            "me",
            "my",
        ),
        *("of", "on", "or", "should", "that", "the", "to", "what", "when", "where", "which", "who"),
        *("why", "with", "you", "your"),
    }
)


def read_pairs(name: str) -> list[dict[str, Any]]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def texts(name: str, field: str) -> list[str]:
    return [row[field][0]["content"] for row in read_pairs(name)]


def words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text.lower())


# Data


@pytest.mark.parametrize(("name", "least"), [("train.jsonl", 170), ("test.jsonl", 48)])
def test_pairs_are_one_question_and_two_answers(name: str, least: int) -> None:
    rows = read_pairs(name)
    assert len(rows) >= least
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    for row in rows:
        assert list(row) == list(roles)
        for field, role in roles.items():
            (message,) = row[field]
            assert list(message) == ["role", "content"]
            assert message["role"] == role
            assert message["content"] == message["content"].strip() != ""


def test_no_text_is_there_twice() -> None:
    for field in ("prompt", "chosen", "rejected"):
        both = [
            text.lower() for name in ("train.jsonl", "test.jsonl") for text in texts(name, field)
        ]
        assert len(set(both)) == len(both)


def test_held_out_questions_are_not_reworded_training_questions() -> None:
    def content(text: str) -> set[str]:
        return set(words(text)) - FILLER

    for held_out, trained in itertools.product(
        texts("test.jsonl", "prompt"), texts("train.jsonl", "prompt")
    ):
        one, other = content(held_out), content(trained)
        assert len(one & other) <= 0.6 * len(one | other), (held_out, trained)


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_chosen_is_brief_and_rejected_is_padded(name: str) -> None:
    for chosen, rejected in zip(texts(name, "chosen"), texts(name, "rejected"), strict=True):
        assert 4 <= len(words(chosen)) <= 40, chosen
        assert 25 <= len(words(rejected)) <= 55, rejected


def test_rejected_answers_have_no_template() -> None:
    rejected = texts("train.jsonl", "rejected") + texts("test.jsonl", "rejected")
    openings = Counter(tuple(words(text)[:4]) for text in rejected)
    assert openings.most_common(1)[0][1] == 1
    phrases = Counter(
        phrase
        for said in map(words, rejected)
        for phrase in {tuple(said[i : i + 5]) for i in range(len(said) - 4)}
    )
    assert phrases.most_common(1)[0][1] <= 4


# Run


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_tokenizer: Any) -> str:
    """An untrained two-layer Llama with the demo's tokenizer, and an empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(smollm2_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    path = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    smollm2_tokenizer.save_pretrained(path)
    return str(path)


def test_flags_win_over_the_demos_configuration() -> None:
    shipped = demo_config(["--model_name_or_path", "m"])
    assert (shipped.learning_rate, shipped.output_dir) == (1e-5, "outputs/demo")
    assert shipped.dataset_name == str(HERE / "train.jsonl")
    assert shipped.eval_dataset_name == str(HERE / "test.jsonl")
    given = demo_config(["--model_name_or_path", "m", "--beta", "0.3", "--dataset_name", "x.jsonl"])
    assert (given.beta, given.dataset_name) == (0.3, "x.jsonl")


def test_a_wrong_flag_is_one_line_and_fetches_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["--max_step", "3"]) == 2
    assert not (tmp_path / "cache").exists()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: --max_step: unknown key max_step; the nearest known key is max_steps\n"


def test_the_demo_runs_to_its_end(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--model_name_or_path", tiny_model, "--output_dir", str(output)]
    assert main([*arguments, "--max_steps", "2"]) == 0
    printed = capsys.readouterr().out
    first, last = held_out_accuracies(output)
    assert first == pytest.approx(0.5, abs=0.2)  # policy and reference differ by rounding alone
    assert f"Held-out reward accuracy: {first:.2f} -> {last:.2f}" in printed
    assert printed.index("Before:") < printed.index("After:") < printed.index(str(output) + "\n")
    assert AutoModelForCausalLM.from_pretrained(output).config.hidden_size == 32
    assert printed.endswith(f"Report: {output / 'report.html'}\n")
    page = (output / "report.html").read_text(encoding="utf-8")
    held_out = [escape(text) for text in texts("test.jsonl", "prompt")]
    assert sum(prompt in page for prompt in held_out) == 4


def test_the_rounds_run_to_their_end(tiny_model, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--rounds", "--model_name_or_path", tiny_model, "--output_dir", str(output)]
    fewer = ["--rounds=1", "--prompts_per_round=2", "--eval_prompts=2", "--num_generations=2"]
    judge = tmp_path / "judge.py"
    judge.write_text("def score(prompt, response, row):\n    return len(response)\n")
    assert main([*arguments, *fewer, f"--judge={judge}:score", "--max_completion_length=4"]) == 0
    printed = capsys.readouterr().out
    line = json.loads((output / "rounds.jsonl").read_text().splitlines()[1])
    assert f" -> {line['score']:.2f}\n" in printed and "Tokens an answer: 4 -> 4" in printed
    assert printed.endswith(f"Report: {output / 'report.html'}\n")
    assert "capital of" in (output / "report.html").read_text(encoding="utf-8")


def test_a_capital_alone_has_the_full_score():
    rows = read_pairs("capitals.jsonl")
    assert len(rows) == len({row["answer"] for row in rows}) == 100
    for row in rows:
        (asked,) = row["prompt"]
        assert re.fullmatch(r"What is the capital of [\w ]+\?", asked["content"])
        capital = row["answer"]
        assert score(row["prompt"], f"{capital}", row) == 1
        sentence = f"The capital is {capital}."
        assert score(row["prompt"], sentence, row) == pytest.approx(0.7)
        assert score(row["prompt"], "I do not know.", row) == 0
        assert score(row["prompt"], capital + " far" * 20, row) == 0
    config = rounds_config(["--rounds", "--rounds", "5", "--model_name_or_path", "m", "--beta=1"])
    assert (config.rounds, config.beta, config.prompts_per_round) == (5, 1.0, 48)


@pytest.mark.parametrize(
    ("environment", "terminal", "opened"),
    [({"DISPLAY": ":0"}, True, True), ({"DISPLAY": ":0"}, False, False), ({}, True, False)],
)
def test_a_browser_opens_where_somebody_looks_at_a_desktop(
    environment, terminal, opened, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    seen: list[str] = []
    monkeypatch.setattr("webbrowser.open", seen.append)
    open_page(tmp_path / "report.html")
    assert seen == ([(tmp_path / "report.html").as_uri()] if opened else [])


def test_the_summary_stands_without_evaluations() -> None:
    text = summary("one\ntwo", "three", [], 1.0, Path("out"))
    assert "    one\n    two\n  After:\n    three" in text
    assert "Held-out reward accuracy: not evaluated" in text


@pytest.mark.slow
def test_two_steps_teach_the_real_model_what_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(demo_model_path())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("fastdpo.demo.__main__.answer", partial(answer, max_new_tokens=2))
    for name, count in (("train.jsonl", 8), ("test.jsonl", 4)):
        lines = (HERE / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:count]), encoding="utf-8")
    flags = {
        "model_name_or_path": model,
        "dataset_name": tmp_path / "train.jsonl",
        "eval_dataset_name": tmp_path / "test.jsonl",
        "output_dir": tmp_path / "out",
        "warmup_steps": 0,
        "per_device_train_batch_size": 4,
        "report_samples": 0,
    }
    assert main([word for key, value in flags.items() for word in (f"--{key}", str(value))]) == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "eval_rewards/margins" in row]
    first, last = (row["eval_rewards/margins"] for row in rows)
    assert first == pytest.approx(0, abs=1e-4)
    assert last > 0.05
    assert rows[-1]["eval_rewards/accuracies"] >= 0.8
