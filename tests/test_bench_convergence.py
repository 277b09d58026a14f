"""Whole runs of both trainers end at the same held-out figures, and the bench notices if not."""

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bench import convergence, held_out
from bench.first_model import FirstModel
from fastdpo.data.groups import make_groups
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
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(convergence, "parse", lambda arguments: options)
        patch.setattr("builtins.print", lambda *words, **kw: said.append(" ".join(map(str, words))))
        assert convergence.main([]) == 0
    lines = (folder / "convergence-cpu.jsonl").read_text(encoding="utf-8").splitlines()
    split = held_out.split_pairs(held_out.read_pairs(options.data), tokenizer, options)
    (model,) = (folder / "cache" / "fastdpo" / "models").iterdir()
    return Run([json.loads(line) for line in lines], "\n".join(said), split, model)


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
    rounding = convergence.differences(convergence.run_trl(run.split, run.model, batched), trl)
    apart = convergence.differences(run.curve("fastdpo"), trl)
    # A reward is beta times a sum over some ten tokens of some five nats.
    floor = 0.1 * 50 * 8 * torch.finfo(torch.float32).eps
    for name in convergence.FIGURES:
        assert apart[name] <= 8 * rounding[name] + floor
    other = argparse.Namespace(**{**vars(options), "learning_rate": 1.01e-3})
    moved = convergence.differences(convergence.run_fastdpo(run.split, run.model, other), trl)
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
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    split = held_out.split_pairs(held_out.read_pairs(str(file)), tokenizer, few)
    assert {pair["prompt"] for pair in [*split.train, *split.held_out]} == set("cdef")
    assert len(split.train) == 3
    many = argparse.Namespace(**{**vars(few), "eval_pairs": 4})
    with pytest.raises(SystemExit, match="too few"):
        held_out.split_pairs(held_out.read_pairs(str(file)), tokenizer, many)


def test_the_key_covers_what_the_first_model_depends_on(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = TINY.key(TEXTS, tokenizer, CPU)
    assert key == TINY.key([list(text) for text in TEXTS], copy.deepcopy(tokenizer), CPU)
    changes = {field.name: getattr(TINY, field.name) * 2 or 1 for field in dataclasses.fields(TINY)}
    keys = [
        dataclasses.replace(TINY, **{k: v}).key(TEXTS, tokenizer, CPU) for k, v in changes.items()
    ]
    keys += [TINY.key(texts, tokenizer, CPU) for texts in (TEXTS[:2], TEXTS[::-1])]
    keys.append(TINY.key(TEXTS, tokenizer, torch.device("cuda")))
    other = copy.deepcopy(tokenizer)
    other.chat_template += " "
    keys.append(TINY.key(TEXTS, other, CPU))
    for library in (torch, transformers):
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "0")
            keys.append(TINY.key(TEXTS, tokenizer, CPU))
    assert len({key, *keys}) == 1 + len(keys)


def test_the_first_model_is_taught_once(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    taught, losses = TINY.teach(TEXTS, tokenizer, CPU)
    assert losses[-1] < losses[0] - 1
    path = TINY.path(TEXTS, tokenizer, CPU)
    saved = transformers.LlamaForCausalLM.from_pretrained(path)
    for name, weight in taught.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name])
    monkeypatch.setattr(FirstModel, "teach", lambda *arguments: pytest.fail("taught again"))
    assert TINY.path(TEXTS, tokenizer, CPU) == path
    with pytest.raises(pytest.fail.Exception, match="taught again"):
        dataclasses.replace(TINY, seed=1).path(TEXTS, tokenizer, CPU)


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


def test_report() -> None:
    ours, theirs = example_curve(0.75, 0.5), example_curve(0.625, 0.25)
    ours[0]["accuracy"] = 0.5
    assert convergence.differences(ours, theirs)["accuracy"] == 0.125
    text = convergence.report({"trl": theirs, "fastdpo": ours}, 16)
    assert "| 10 | 0.6250 | 0.7500 | 0.2500 | 0.5000 |" in text
    assert "margin 0.25, loss 0" in text
    assert "fastdpo: accuracy 0.750 of 16 held-out pairs" in text
    ends = {line.split(":")[0]: line for line in text.splitlines()[-2:]}
    assert ends["fastdpo"].endswith(": learnt")
    assert "NOT clearly learnt (an accuracy of 0.750 would be)" in ends["trl"]
    shrunk = convergence.report({"trl": theirs, "fastdpo": example_curve(0.75, -0.1)}, 16)
    assert shrunk.count("NOT clearly learnt") == 2
    with pytest.raises(ValueError, match="other steps"):
        convergence.differences({0: ours[0]}, theirs)


def test_quick_rows_are_kept_only_on_demand(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = example_curve(0.5, 0.1)
    providers = dict.fromkeys(convergence.PROVIDERS, lambda *arguments: curve)
    monkeypatch.setattr(convergence, "PROVIDERS", providers)
    monkeypatch.setattr(convergence.record, "RESULTS", tmp_path / "kept")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ["--data", options.data, "--tokenizer", options.tokenizer]
    monkeypatch.delenv("FASTDPO_RESULTS", raising=False)
    assert convergence.main([*flags, "--quick"]) == 0
    assert not (tmp_path / "kept").exists()
    monkeypatch.setenv("FASTDPO_RESULTS", str(tmp_path / "named"))
    assert convergence.main([*flags, "--quick"]) == 0
    rows = (tmp_path / "named" / "convergence-cpu.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 10, 0, 10]


@pytest.mark.parametrize(
    "wrong",
    [["--steps", "25"], ["--trl-batch", "3"], ["--trl-batch", "4", "--eval-pairs", "6"]],
)
def test_sizes_that_would_bend_the_means(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        convergence.parse(wrong)
