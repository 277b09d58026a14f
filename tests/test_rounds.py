"""Rounds: sample, judge, train, again."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from endpoint_stand_in import endpoint_stand_in
from rounds_settings import JUDGE, rounds_settings
from training import assert_same_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import files
from fastdpo.cli import main
from fastdpo.config.rounds import RoundsConfig
from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.model.sampler import Answer
from fastdpo.rounds import stages
from fastdpo.rounds.loop import LOG, rounds
from fastdpo.rounds.prompts import load_prompts

PROMPTS = [{"prompt": f"yes no {'big ' * (i % 3)}", "answer": str(i)} for i in range(10)]
SIDES = ("chosen", "rejected")


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    keys = {"rounds": 2, "num_generations": 3, "generation_batch_size": 3, "eval_prompts": 3}
    return rounds_settings(tiny_model, tmp_path, PROMPTS) | keys


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return list(datasets.Dataset.from_parquet(str(file)))


def test_each_round_trains_the_model_of_the_one_before(settings, tmp_path):
    result = rounds(RoundsConfig(**settings))
    out = tmp_path / "out"
    assert result.model == str(out / "round-2" / "model")
    assert [line["round"] for line in result.rounds] == [0, 1, 2] and lines(out) == result.rounds
    for number, before in ((1, settings["model_name_or_path"]), (2, str(out / "round-1/model"))):
        folder = out / f"round-{number}"
        config = json.loads(json.dumps((folder / "model/training_config.yaml").read_text()))
        assert f"model_name_or_path: {before}" in config
        reference = "null" if number == 1 else settings["model_name_or_path"]
        assert f"ref_model_name_or_path: {reference}" in config
        scored = rows_of(folder / "scored.parquet")
        assert len(scored) == 7 and all(len(row["responses"]) == 3 for row in scored)
        assert all(row["scores"] == [-len(text) for text in row["responses"]] for row in scored)
        for row in rows_of(folder / "train.parquet"):
            assert len(row["chosen"]) < len(row["rejected"])
        line = result.rounds[number]
        assert line["taken"] and set(line["seconds"]) == {
            "sampling", "scoring", "training", "watching",
        }  # fmt: skip
    held_out = {row["row"] for row in rows_of(out / "round-0" / "held-out.parquet")}
    trained = {row["row"] for row in rows_of(out / "round-1" / "scored.parquet")}
    assert held_out.isdisjoint(trained) and len(held_out | trained) == 10


@pytest.mark.parametrize(
    ("changes", "columns"),
    [
        ({"loss_type": ["sppo"]}, {"prompt", "responses", "scores"}),
        ({"loss_type": ["grpo"], "reference": "previous"}, {"prompt", "responses", "scores"}),
        ({"judge": "row", "num_generations": 1}, {"prompt", "chosen", "rejected"}),
        ({"loss_type": ["listwise"]}, {"prompt", "responses", "scores"}),
    ],
    ids=["sppo", "grpo", "spin", "listwise"],
)
def test_rows_are_those_that_the_loss_needs(settings, tmp_path, changes, columns):
    result = rounds(RoundsConfig(**settings | {"rounds": 1} | changes))
    made = rows_of(tmp_path / "out" / "round-1" / "train.parquet")
    assert set(made[0]) == columns
    if changes.get("judge") == "row":
        assert {row["chosen"] for row in made} <= {row["answer"] for row in PROMPTS}
        assert result.rounds[1]["score"] is None
    if changes.get("reference") == "previous":
        config = (tmp_path / "out/round-1/model/training_config.yaml").read_text()
        assert "ref_model_name_or_path: null" in config


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("reference", ["start", "previous"])
def test_the_reference_is_the_start_or_the_round_before(settings, tmp_path, peft, reference):
    """Of adapters too: a policy that is its reference has a loss of ln 2 in the first step."""
    keys = {"reference": reference, "use_peft": peft, "lora_dropout": 0.0, "max_steps": 1}
    rounds(RoundsConfig(**settings | keys | {"logging_steps": 1, "learning_rate": 1e-2}))
    metrics = (tmp_path / "out/round-2/model/metrics.jsonl").read_text().splitlines()
    apart = abs(json.loads(metrics[0])["loss"] - math.log(2))
    assert apart > 1e-3 if reference == "start" else apart < 1e-6


def test_losses_without_a_reference_are_given_none(settings, tmp_path):
    result = rounds(RoundsConfig(**settings | {"loss_type": ["simpo"]}))
    assert [line["taken"] for line in result.rounds] == [False, True, True]


def test_files_that_change_between_starts(settings, tmp_path, caplog):
    """Other prompts would be given the answers of the first ones; the rest may have been mended."""
    raising = "def score(prompt, response, row):\n    return row['missing']\n"
    file, judge = tmp_path / "prompts.jsonl", tmp_path / "judge.py"
    written = file.read_text()
    judge.write_text(raising)
    config = RoundsConfig(**settings | {"rounds": 1})
    with pytest.raises(FastDPOError, match="KeyError"):
        rounds(config)
    for changed in (written.replace("big", "small"), written[: written.rindex('{"')]):
        file.write_text(changed)
        with pytest.raises(ConfigError, match="dataset_name: these are not the prompts that the"):
            rounds(config)
    file.write_text("".join(json.dumps(row | {"missing": 1}) + "\n" for row in PROMPTS))
    judge.write_text(JUDGE)
    before = (tmp_path / "out/round-0/held-out-samples.parquet").read_bytes()
    with caplog.at_level("WARNING"):
        rounds(config)
    assert "columns beside the prompts have changed since the last start" in caplog.text
    assert f"{judge} has changed since the last start: scores of earlier rounds" in caplog.text
    assert (tmp_path / "out/round-0/held-out-samples.parquet").read_bytes() == before
    caplog.clear()
    rounds(config)
    assert "changed" not in caplog.text


def test_an_answer_that_is_labelled_bad_is_not_the_better_one(settings, tmp_path):
    rows = [{"prompt": f"yes {i}", "completion": "no", "label": i != 3} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"judge": "row", "num_generations": 1, "rounds": 1, "eval_prompts": 1}
    with pytest.raises(FastDPOError, match=r"row 4: no answer of its own.*label false"):
        rounds(RoundsConfig(**settings | keys))


@pytest.mark.parametrize("first", [0, 1])
def test_prompts_of_text_and_of_messages_in_one_file(settings, tied_model, tmp_path, first):
    """Whichever comes first; the policy as its own judge reads both, too."""
    rows = [
        {"prompt": [{"role": "user", "content": f"yes {i}"}] if (i + first) % 2 else f"yes {i}"}
        for i in range(8)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"judge": "self", "judge_model": str(tied_model), "rounds": 1, "eval_prompts": 1}
    result = rounds(RoundsConfig(**settings | keys))
    assert result.rounds[1]["taken"]
    made = rows_of(tmp_path / "out/round-1/train.parquet")
    assert {type(row["prompt"]) for row in made} == {str, list}
    assert all(type(row["chosen"]) is type(row["prompt"]) for row in made)


def test_the_same_command_goes_on_where_the_last_one_ended(settings, tmp_path, monkeypatch):
    """Broken off at every batch and every stage, the rounds end as undisturbed ones."""
    whole = rounds(RoundsConfig(**settings | {"output_dir": str(tmp_path / "whole")}))
    true, left = files.write_text, {"count": 0}

    def broken(path: Path, text: str) -> None:
        left["count"] -= "model" not in path.parts
        if left["count"] < 0:
            raise KeyboardInterrupt
        true(path, text)

    for count in range(60):
        left["count"] = 3 + count % 2
        with monkeypatch.context() as patched:
            patched.setattr(files, "write_text", broken)
            try:
                again = rounds(RoundsConfig(**settings))
                break
            except KeyboardInterrupt:
                continue
    timed = ("seconds",)
    for one, other in zip(whole.rounds, again.rounds, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }
    assert count > 3
    assert_same_weights(tmp_path / "whole/round-2/model", tmp_path / "out/round-2/model")


def test_a_killed_process_goes_on(settings, tmp_path):
    """As a shell would start it, killed while it samples the second round."""
    (tmp_path / "judge.py").write_text(
        "import os, pathlib, signal\n"
        f"out = pathlib.Path({str(tmp_path / 'out')!r})\n"
        "def score(prompt, response, row):\n"
        "    if (out / 'round-1/model').exists() and not (out / '../killed').exists():\n"
        "        (out / '../killed').write_text('')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return -len(response)\n"
    )
    words = [sys.executable, "-m", "fastdpo", "rounds"]
    for name, value in settings.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    killed = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"model: {tmp_path}/out/round-2/model"
    whole = rounds(
        RoundsConfig(
            **settings
            | {"output_dir": str(tmp_path / "whole"), "judge": f"{tmp_path}/judge.py:score"}
        )
    )
    assert [line["score"] for line in whole.rounds] == [
        line["score"] for line in lines(tmp_path / "out")
    ]


def test_a_round_that_is_worse_is_named_and_if_asked_not_taken(settings, tmp_path):
    (tmp_path / "judge.py").write_text(
        "import pathlib\n"
        f"out = pathlib.Path({str(tmp_path / 'out')!r})\n"
        "def score(prompt, response, row):\n"
        "    trained = len(list(out.glob('round-*/model/model.safetensors')))\n"
        "    return -len(response) - 1000 * trained\n"
    )
    result = rounds(RoundsConfig(**settings | {"take_worse_rounds": False}))
    assert result.model == settings["model_name_or_path"]
    for line in result.rounds[1:]:
        assert not line["taken"] and line["said"][-1] == "not taken"
        assert line["said"][0].startswith("held-out score fell from ")
    kept = settings | {"output_dir": str(tmp_path / "out2"), "rounds": 1}
    assert rounds(RoundsConfig(**kept)).rounds[1]["taken"]


def test_a_round_too_far_from_the_start_is_the_last(settings):
    keys = {"max_kl": 1e-9, "learning_rate": 0.05, "rounds": 3}
    result = rounds(RoundsConfig(**settings | keys))
    assert (
        len(result.rounds) == 2 and "above max_kl: the last round" in result.rounds[1]["said"][-1]
    )


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("def score(p, r, row):\n    return 1 / 0\n", "judge: score raised ZeroDivisionError"),
        ("raise OSError('no')\n", "judge.py: OSError: no"),
        ("scores = 1\n", "judge.py has no function score"),
        (
            "def score(p, r, row):\n    return float('nan')\n",
            "no answer of the round has a score: 21 answers: score returned no finite number",
        ),
    ],
)
def test_a_judge_that_fails_is_one_line_and_costs_no_sample(settings, tmp_path, judge, said):
    (tmp_path / "judge.py").write_text(judge)
    with pytest.raises(FastDPOError) as caught:
        rounds(RoundsConfig(**settings))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "judge.py").write_text(JUDGE)
    if "nan" not in judge:
        assert len(rounds(RoundsConfig(**settings)).rounds) == 3


def test_a_round_without_anything_to_learn_from_is_passed_over(settings, tmp_path):
    """All answers of the first round have the same score."""
    (tmp_path / "judge.py").write_text(
        "import pathlib\n"
        f"out = pathlib.Path({str(tmp_path / 'out')!r})\n"
        "def score(prompt, response, row):\n"
        "    return -len(response) if (out / 'round-2').exists() else 1\n"
    )
    result = rounds(RoundsConfig(**settings))
    first, second = result.rounds[1:]
    assert first["model"] is None and not first["taken"] and first["rows"] == 0
    assert first["said"] == ["nothing to train on"] and first["score"] == result.rounds[0]["score"]
    assert first["left_out"] == {"whose answers all have the same score": 7}
    assert second["taken"] and result.model == str(tmp_path / "out/round-2/model")
    config = (tmp_path / "out/round-2/model/training_config.yaml").read_text()
    assert f"model_name_or_path: {settings['model_name_or_path']}" in config


def test_scores_that_are_no_numbers_are_counted(settings, tmp_path):
    (tmp_path / "judge.py").write_text(
        "def score(p, r, row):\n    return None if int(row['answer']) % 3 else -len(r)\n"
    )
    line = rounds(RoundsConfig(**settings | {"rounds": 1})).rounds[1]
    assert line["failures"].keys() == {"score returned None for a score"}
    assert line["left_out"].keys() == {"with fewer than two answers that are whole and scored"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"judge": "nobody"},
            "judge: expected FILE.py:FUNCTION, exact, math, row, self, model:PATH",
        ),
        ({"judge": "none.py:score"}, "judge: no file none.py"),
        ({"num_generations": 1}, "num_generations: expected at least 2"),
        ({"do_eval": True}, "do_eval: fastdpo rounds sets it in each round (eval_prompts)"),
        ({"engine": "magic"}, "engine: expected one of transformers, continuous, vllm, sglang"),
        ({"top_p": 0.0}, "top_p: expected above 0, at most 1"),
        ({"eval_prompts": 0}, "eval_prompts: expected a whole number of at least 1"),
        ({"temperature": 0.0}, "temperature: 0 gives the same answer 3 times (num_generations)"),
        ({"judge": "self"}, "judge_model: expected the model that the policy was before"),
        ({"judge": "http://host/v1"}, "judge_model: expected the name of a model at the endpoint"),
        ({"judge": "http://[bad", "judge_model": "m"}, "judge: expected a URL such as http://host"),
        ({"datasets": [{"path": "a"}]}, "datasets: fastdpo rounds sets it in each round; expected"),
    ],
)
def test_wrong_keys_cost_one_line(settings, changes, said):
    with pytest.raises(ConfigError) as caught:
        RoundsConfig.from_dict(settings | changes, "rounds.yaml")
    assert said in str(caught.value)


def test_other_faults_before_the_first_answer(settings, tmp_path, capsys):
    """A start that samples nothing does not claim its directory."""
    for changes, said in (
        ({"max_length": 2}, "no room for an answer: the shortest of 10 prompts has 7 tokens"),
        ({"engine": "vllm"}, "pip install vllm"),
        ({"dataset_name": "none.jsonl"}, "none.jsonl"),
        ({"judge": "http://h/v1", "judge_model": "m", "judge_rubric": "none.txt"}, "judge_rubric:"),
        ({"judge": "model:nobody/nothing"}, "judge: nobody/nothing: cannot be loaded"),
        ({"judge": "self", "judge_model": "nobody/nothing"}, "nobody/nothing"),
        ({"judge": "exact", "judge_answer": "gold"}, "row 2: no column gold to compare with"),
        ({"judge": "row", "loss_type": ["sppo"]}, "loss_type: sppo reads scores of answers"),
        ({"model_name_or_path": str(tmp_path / "none")}, "none"),
    ):
        with pytest.raises(FastDPOError) as caught:
            rounds(RoundsConfig(**settings | changes))
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert len(rounds(RoundsConfig(**settings | {"rounds": 1})).rounds) == 2
    for name, value in {"beta": 0.7, "global_batch_size": 4}.items():
        with pytest.raises(ConfigError, match=f"{name}: differs from the rounds in"):
            rounds(RoundsConfig(**settings | {name: value}))
    more = {"judge_max_tokens": 5, "logging_steps": 3, "max_tokens_per_batch": 4096}
    assert len(rounds(RoundsConfig(**settings | more)).rounds) == 3
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        rounds(RoundsConfig(**settings | {"output_dir": str(tmp_path / "full")}))
    assert main(["rounds", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--num_generations" in shown and "--judge " in shown


def test_an_endpoint_judges_and_goes_on_when_its_limit_is_raised(settings, tmp_path):
    with endpoint_stand_in() as server:
        server.answers = lambda text: f"Score: {len(text) % 10}"
        keys = {"judge": server.url, "judge_model": "m", "rounds": 1, "judge_max_tokens": 60}
        with pytest.raises(FastDPOError, match="judge_max_tokens is 60; raise it"):
            rounds(RoundsConfig(**settings | keys))
        asked = len(server.seen)
        line = rounds(RoundsConfig(**settings | keys | {"judge_max_tokens": 10**6})).rounds[1]
    kept = [json.loads(text) for text in (tmp_path / "out/judge.jsonl").read_text().splitlines()]
    assert len(kept) == len(server.seen) > asked
    assert line["score"] is not None and line["failures"] == {}


def test_prompts_without_room_are_left_out(settings, tmp_path, caplog):
    long = {"prompt": "yes " * 40, "answer": "3"}
    lines = [json.dumps(row) + "\n" for row in (*PROMPTS[:5], long, *PROMPTS[5:])]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    rounds(RoundsConfig(**settings | {"rounds": 1, "max_length": 30}))
    assert "left out 1 prompts of max_length (30) tokens or more" in caplog.text
    out = tmp_path / "out"
    rows = [*rows_of(out / "round-1/scored.parquet"), *rows_of(out / "round-0/held-out.parquet")]
    assert sorted(row["row"] for row in rows) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]


def test_own_answers_of_pairs_without_a_prompt(settings, tmp_path):
    """SPIN on rows whose prompt is what chosen and rejected begin with; numbers are answers too."""
    talk = [{"role": "user", "content": "yes no"}]
    rows = [
        {side: [*talk, {"role": "assistant", "content": f"{side} {i}"}] for side in SIDES}
        for i in range(4)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"judge": "row", "num_generations": 1, "rounds": 1, "eval_prompts": 1}
    rounds(RoundsConfig(**settings | keys))
    made = rows_of(tmp_path / "out/round-1/train.parquet")
    assert [row["prompt"] for row in made] == [talk] * 3
    assert [row["chosen"][0]["content"] for row in made] == ["chosen 1", "chosen 2", "chosen 3"]
    numbers = [{"prompt": f"yes {i}", "answer": i} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers))
    rounds(RoundsConfig(**settings | keys | {"output_dir": str(tmp_path / "numbers")}))
    made = rows_of(tmp_path / "numbers/round-1/train.parquet")
    assert [row["chosen"] for row in made] == ["1", "2", "3"]


def test_the_judge_is_watched_on_held_out_pairs(settings, tied_model, tmp_path, caplog):
    """How often it prefers the chosen answer: once, each round where the policy is the judge."""
    rows = [
        {"prompt": f"yes {i}", "chosen": "no", "rejected": "no no" if i % 4 else "no"}
        for i in range(16)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"rounds": 1, "eval_prompts": 4}
    with caplog.at_level("INFO"):
        found = rounds(RoundsConfig(**settings | keys)).rounds
    assert [line["judge_accuracy"] for line in found] == [0.5, 0.5]  # rows 0, 4, 8 and 12
    assert "the judge prefers the chosen answer in 50% of pairs" in caplog.text
    (pair, *_) = rows_of(tmp_path / "out/round-0/held-out-pairs.parquet")
    assert (pair["responses"], pair["scores"]) == (["no", "no"], [-2.0, -2.0])
    assert not (tmp_path / "out/round-1/held-out-pairs.parquet").exists()

    out = str(tmp_path / "self")
    of_self = {"judge": "self", "judge_model": str(tied_model), "output_dir": out}
    found = rounds(RoundsConfig(**settings | keys | of_self | {"eval_prompts": 5})).rounds
    scores = [
        rows_of(tmp_path / f"self/round-{number}/held-out-pairs.parquet") for number in (0, 1)
    ]
    assert scores[0] != scores[1]
    for line, pairs in zip(found, scores, strict=True):
        wins = [(a > b) + (a == b) / 2 for a, b in (pair["scores"] for pair in pairs)]
        assert line["judge_accuracy"] == sum(wins) / 5


def test_what_stands_beside_a_prompt_goes_to_the_chat_template(settings, tmp_path):
    """In sampling and in the rows that are trained on."""
    tools = [{"type": "function", "function": {"name": "look"}}]
    rows = [
        {"prompt": f"yes {i}", "system": "Be brief.", "tools": tools, "gold": i} for i in range(6)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = shutil.copytree(settings["model_name_or_path"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% if tools %}big small {% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    keys = {"rounds": 1, "eval_prompts": 1, "model_name_or_path": str(model)}
    config = RoundsConfig(**settings | keys)
    loaded = load_prompts(config)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "yes 1"}]
    assert loaded.all[0].text == asked and loaded.all[0].template == {"tools": tools}
    assert loaded.all[0].row["gold"] == 1
    rendered, plain = (
        tokenizer.apply_chat_template(
            asked, tools=given, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for given in (tools, None)
    )
    assert loaded.tokens[0] == rendered != plain
    rounds(config)
    (row, *_) = rows_of(tmp_path / "out/round-1/train.parquet")
    assert row["prompt"] == asked and row["tools"] == tools


def test_every_batch_of_every_round_has_a_seed_of_its_own(settings, tmp_path, monkeypatch):
    seeds = []

    class Engine:
        def answer(self, prompts, number, seed):
            seeds.append(seed)
            return [[Answer("yes", True, (1,), (0.0,))] * number for _ in prompts]

    monkeypatch.setattr(stages, "load_engine", lambda config: Engine())
    config = RoundsConfig(**settings)
    prompts = load_prompts(config)
    again = config.choose("test", seed=7)
    for folder, keys, number in (("1", config, 1), ("2", config, 2), ("other", again, 1)):
        for name in ("samples", "held-out-samples"):
            stages.sample(keys, tmp_path / folder / f"{name}.parquet", prompts, 2, number)
    assert len(seeds) == len(set(seeds)) == 3 * 2 * 3
    seeds.clear()
    stages.sample(config, tmp_path / "3" / "samples.parquet", prompts, 2, 1)
    first = list(seeds)
    stages.sample(config, tmp_path / "4" / "samples.parquet", prompts, 2, 1)
    assert seeds == first * 2


def test_log_probabilities_are_of_the_tokens_that_were_drawn(settings, tmp_path):
    """The engine's are the model's, whatever is drawn from; a cut off answer has no end token."""
    result = rounds(RoundsConfig(**settings | {"rounds": 1, "temperature": 0.5, "top_p": 0.9}))
    scored = rows_of(tmp_path / "out/round-0/held-out.parquet")
    found = json.loads((tmp_path / "out/round-0/held-out-logps.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"]).eval()
    prompts = load_prompts(RoundsConfig(**settings)).held_out
    for ids, row, (mine,) in zip(prompts.tokens, scored, found["policy"], strict=True):
        (drawn,) = row["tokens"]
        assert len(drawn) <= 6 and row["complete"] == [drawn[-1] == 2]
        with torch.no_grad():
            logits = model(torch.tensor([ids + drawn])).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(drawn)[:, None]).sum()
        assert mine == pytest.approx(float(expected), abs=1e-4)
        assert sum(row["engine_logps"][0]) == pytest.approx(float(expected), abs=1e-4)
    assert result.rounds[1]["engine_difference"] < 1e-5
    assert result.rounds[1]["tokens"] <= 6
