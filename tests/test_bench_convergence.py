"""Whole runs of both trainers end at the same held-out figures, and the bench notices if not."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from bench.convergence import held_out
from bench.convergence import run as convergence
from bench.convergence.first_model import FirstModel
from bench.jsonl import read_rows, write_rows
from bench.report import record
from fastdpo.data.grouping import make_groups
from fastdpo.data.tokenize import tokenize_dataset

CPU = torch.device("cpu")
TEXTS = [[5, 6, 7, 8, 9, 10], [5, 6, 11, 12], [13, 14, 15, 16, 17]]
TINY = FirstModel(layers=1, width=16, steps=12, texts_per_step=2, learning_rate=1e-2)
STEPS = {"steps": 8, "every": 2, "pairs_per_step": 3, "eval_pairs": 6, "max_length": 128}


@pytest.fixture(scope="module")
def tokenizer_path(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def options(pairs_file: Path, tokenizer_path: Path) -> argparse.Namespace:
    sizes = {**STEPS, "layers": 2, "width": 32, "first_steps": 30, "learning_rate": 1e-3}
    flags = [word for k, v in sizes.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    where = ["--data", str(pairs_file), "--tokenizer", str(tokenizer_path)]
    return convergence.parse([*flags, *where])


@dataclasses.dataclass
class Run:
    """One call of the command: its rows, what it printed, and what it started from."""

    rows: list[dict[str, Any]]
    printed: str
    split: held_out.Split
    model: Path

    def curve(self, provider: str) -> convergence.Curve:
        return {row["step"]: row["eval"] for row in self.rows if row["provider"] == provider}


@pytest.fixture(scope="module")
def run(
    options: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    folder, said = tmp_path_factory.mktemp("run"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDPO_RESULTS", str(folder))
        patch.setattr(convergence, "parse", lambda arguments: options)
        patch.setattr("builtins.print", lambda *words, **kw: said.append(" ".join(map(str, words))))
        convergence.main([])
    rows = read_rows(folder / "convergence-cpu.jsonl")
    split = held_out.split_pairs(held_out.read_pairs(options.data), tokenizer, options)
    first = FirstModel(options.layers, options.width, options.first_steps)
    first.save(folder / "model", split.texts, tokenizer, CPU)
    return Run(rows, "\n".join(said), split, folder / "model")


def differences(ours: convergence.Curve, theirs: convergence.Curve) -> dict[str, float]:
    """The largest of every figure over all steps; of the accuracy, without step 0."""
    assert ours.keys() == theirs.keys()
    return {
        name: max(
            abs(ours[step][name] - theirs[step][name])
            for step in ours
            if step or name != "accuracy"
        )
        for name in convergence.FIGURES
    }


def test_rows_are_as_the_schema_says(run: Run, options: argparse.Namespace) -> None:
    assert [(row["provider"], row["step"]) for row in run.rows] == [
        (provider, step) for provider in ("trl", "fastdpo") for step in (0, 2, 4, 6, 8)
    ]
    case = {"model": "llama-2x32", "data": options.data, "steps": 8, "pairs_per_step": 3}
    case |= {"learning_rate": 1e-3, "beta": 0.1, "seed": 0, "eval_pairs": 6}
    for row in run.rows:
        assert row["case"] == case
        assert set(row["eval"]) == {"accuracy", "margin", "loss", "chosen", "rejected"}
        assert {"commit", "versions", "command", "device", "options"} < set(row)
        figures = row["eval"]
        assert figures["margin"] == pytest.approx(figures["chosen"] - figures["rejected"], abs=1e-6)
    for provider in ("trl", "fastdpo"):
        curve = run.curve(provider)
        assert curve[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert curve[8]["loss"] != pytest.approx(curve[0]["loss"], abs=1e-2)
    assert "| 8 |" in run.printed and "6 held-out pairs" in run.printed


def test_both_trainers_end_at_the_same_figures(run: Run, options: argparse.Namespace) -> None:
    """As near as TRL is to itself when it batches otherwise, where only rounding differs."""
    trl = run.curve("trl")
    batched = argparse.Namespace(**{**vars(options), "trl_batch": 3})
    rounding = differences(convergence.run_trl(run.split, run.model, batched), trl)
    apart = differences(run.curve("fastdpo"), trl)
    # A reward is beta times a sum over some ten tokens of some five nats.
    floor = 0.1 * 50 * 8 * torch.finfo(torch.float32).eps
    for name in convergence.FIGURES:
        assert apart[name] <= 8 * rounding[name] + floor
    other = argparse.Namespace(**{**vars(options), "learning_rate": 1.01e-3})
    moved = differences(convergence.run_fastdpo(run.split, run.model, other), trl)
    assert moved["margin"] > 8 * rounding["margin"] + floor


def test_no_prompt_is_on_both_sides(
    tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> None:
    pairs = held_out.read_pairs(options.data)
    split = held_out.split_pairs(pairs, tokenizer, options)
    prompts = [pair["prompt"] for pair in split.train]
    assert len(split.held_out) == 6 == len({pair["prompt"] for pair in split.held_out})
    assert len(prompts) == 6 and not {pair["prompt"] for pair in split.held_out} & set(prompts)
    texts = {pair["prompt"] + pair["chosen"] for pair in split.train}
    assert {tokenizer.decode(text).removesuffix("</s>") for text in split.texts} == texts
    again = held_out.split_pairs(pairs[::-1], tokenizer, options)
    assert len(again.train) == len(split.train)
    moved = argparse.Namespace(**{**vars(options), "seed": 1})
    assert held_out.split_pairs(pairs, tokenizer, moved).held_out != split.held_out


def test_both_trainers_see_the_pairs_in_one_order(
    tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> None:
    """fastdpo groups by tokens; here the last space of most prompts merges with the answers."""
    many = argparse.Namespace(**{**vars(options), "eval_pairs": 1})
    train = held_out.split_pairs(held_out.read_pairs(options.data), tokenizer, many).train
    tokens, _ = tokenize_dataset(Dataset.from_list(train), tokenizer, max_length=128)
    grouped = [
        (list(group.prompt), list(group.responses[win]), list(group.responses[lose]))
        for group in make_groups(tokens)
        for win, lose, _ in group.comparisons
    ]
    rows = [(ids["prompt_ids"], *ids["response_ids"]) for ids in tokens]
    assert len(rows) == 21 and len(make_groups(tokens)) > len({row["prompt"] for row in train})
    assert grouped == rows


def test_pairs_that_would_say_nothing_are_left_out(
    tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace, tmp_path: Path
) -> None:
    few = argparse.Namespace(**{**vars(options), "eval_pairs": 1, "max_length": 16})
    same = "one two three four five six seven eight nine ten "
    rows = [
        {"prompt": "the quick brown fox " * 9, "chosen": "yes", "rejected": "no"},
        {"prompt": "a", "chosen": same + "yes", "rejected": same + "no"},
        {"prompt": "b", "chosen": "yes", "rejected": "yes"},
        *({"prompt": word, "chosen": "yes", "rejected": "no"} for word in "cdef"),
    ]
    file = tmp_path / "rows.jsonl"
    write_rows(file, rows)
    split = held_out.split_pairs(held_out.read_pairs(str(file)), tokenizer, few)
    assert {pair["prompt"] for pair in [*split.train, *split.held_out]} == set("cdef")
    assert len(split.train) == 3
    many = argparse.Namespace(**{**vars(few), "eval_pairs": 4})
    with pytest.raises(SystemExit, match="too few"):
        held_out.split_pairs(held_out.read_pairs(str(file)), tokenizer, many)


def test_the_first_model_learns_its_texts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    taught, losses = TINY.teach(TEXTS, tokenizer, CPU)
    assert losses[-1] < losses[0] - 1
    TINY.save(tmp_path, TEXTS, tokenizer, CPU)
    saved = LlamaForCausalLM.from_pretrained(tmp_path)
    for name, weight in taught.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name])
    other, _ = dataclasses.replace(TINY, seed=1).teach(TEXTS, tokenizer, CPU)
    assert not torch.equal(other.lm_head.weight, taught.lm_head.weight)


def test_padding_teaches_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """The loss of a padded batch is that of its texts apart, weighted by their tokens."""
    once = dataclasses.replace(TINY, steps=1, texts_per_step=2)
    _, (loss,) = once.teach(TEXTS[:2], tokenizer, CPU)
    model = once.make(tokenizer)
    with torch.no_grad():
        apart = [
            model(torch.tensor([t]), labels=torch.tensor([t])).loss * (len(t) - 1)
            for t in TEXTS[:2]
        ]
    assert loss == pytest.approx((sum(apart) / 8).item(), rel=1e-6)


def example_curve(accuracy: float, margin: float) -> convergence.Curve:
    def figures(accuracy: float, margin: float) -> dict[str, float]:
        return {"accuracy": accuracy, "margin": margin, "loss": 0.5, "chosen": 1, "rejected": 0}

    return {0: figures(0.25, 0.0), 10: figures(accuracy, margin)}


def test_verdicts() -> None:
    learnt = convergence.verdict("fastdpo", example_curve(0.75, 0.5), 16)
    assert learnt.startswith("fastdpo: accuracy 0.750 of 16 held-out pairs")
    assert learnt.endswith(": learnt")
    text = convergence.verdict("trl", example_curve(0.625, 0.25), 16)
    assert "NOT clearly learnt (an accuracy of 0.750 would be)" in text
    assert "NOT clearly" in convergence.verdict("fastdpo", example_curve(0.75, -0.1), 16)


def test_quick_rows_are_kept_only_on_demand(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = example_curve(0.5, 0.1)
    providers = dict.fromkeys(convergence.PROVIDERS, lambda *arguments: curve)
    monkeypatch.setattr(convergence, "PROVIDERS", providers)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "kept")
    flags = ["--data", options.data, "--tokenizer", options.tokenizer]
    monkeypatch.delenv("FASTDPO_RESULTS", raising=False)
    convergence.main([*flags, "--quick"])
    assert not (tmp_path / "kept").exists()
    monkeypatch.setenv("FASTDPO_RESULTS", str(tmp_path / "named"))
    convergence.main([*flags, "--quick"])
    rows = read_rows(tmp_path / "named" / "convergence-cpu.jsonl")
    assert [row["step"] for row in rows] == [0, 10, 0, 10]


@pytest.mark.parametrize(
    "wrong",
    [["--steps", "25"], ["--trl-batch", "3"], ["--trl-batch", "4", "--eval-pairs", "6"]],
)
def test_sizes_that_would_bend_the_means(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        convergence.parse(wrong)
