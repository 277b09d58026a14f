"""`fastdpo score`: each response's log-probability, implicit reward and place in its row."""

import gzip
import json
import math
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import RewardModel, TrainConfig, score
from fastdpo.cli import main
from fastdpo.data import plan
from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.scoring.measures import label_accuracy
from fastdpo.scoring.responses import load_response_scorer
from fastdpo.scoring.rows import WINDOW, make_encoder, windows

KEYS = {"use_cpu": True, "bf16": False, "disable_tqdm": True}
GROUPS = [
    {"prompt": "the cat ", "responses": ["sat", "ran far", "sat"], "scores": [1.0, 0.0, 0.5]},
    {"prompt": "a dog ", "responses": ["ran"], "scores": [0.3]},
    {"prompt": "the cat ", "responses": ["slept"], "scores": [0.1]},
]


@pytest.fixture
def make_config(tiny_model):
    def make(**keys: Any) -> TrainConfig:
        return TrainConfig(**{"model_name_or_path": str(tiny_model), **KEYS, **keys})

    return make


@torch.no_grad()
def own_logp(model: Any, tokenizer: Any, prompt: str, response: str) -> tuple[float, int]:
    """By the model's own logits of one sequence, as TRL tokenises it."""
    full = tokenizer(prompt + response + tokenizer.eos_token)["input_ids"]
    start = next(
        (
            i
            for i, (a, b) in enumerate(zip(tokenizer(prompt)["input_ids"], full, strict=False))
            if a != b
        ),
        len(tokenizer(prompt)["input_ids"]),
    )
    logps = model(torch.tensor([full])).logits[0].double().log_softmax(-1)
    return sum(float(logps[i - 1, full[i]]) for i in range(start, len(full))), len(full) - start


def test_every_response_has_the_log_probability_that_the_model_gives_it(make_config, tiny_model):
    result = score(make_config(), GROUPS)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for row, logps, tokens, best in zip(
        GROUPS,
        result.columns["response_logps"],
        result.columns["response_tokens"],
        result.columns["best"],
        strict=True,
    ):
        expected = [own_logp(model, tokenizer, row["prompt"], r) for r in row["responses"]]
        assert logps == pytest.approx([logp for logp, _ in expected], rel=1e-5)
        assert tokens == [count for _, count in expected]
        assert best == max(range(len(logps)), key=lambda i: (logps[i], -i))
    assert result.rows.column_names[:3] == ["prompt", "responses", "scores"]
    assert result.summary["responses"] == 5
    assert result.summary["pairs"] == 3


def test_a_group_larger_than_a_row_of_training_is_not_split(make_config, monkeypatch):
    """Its prompt would be computed once more for each part; a budget that was given holds."""
    monkeypatch.setitem(plan.TOKENS_PER_ROW, "cpu", 128)
    row = {"prompt": "yes " * 40, "responses": ["no " * count for count in (5, 10, 15, 20, 25)]}
    found = {}
    for budget in (None, 128, 512):
        scorer = load_response_scorer(make_config(max_tokens_per_batch=budget))
        encoder = make_encoder(
            datasets.Dataset.from_list([row]), scorer.tokenizer, "rows", None, scorer.vocab_size
        )
        ((groups, _),) = windows(datasets.Dataset.from_list([row]), encoder)
        seen, compute = [], scorer.policy.response_logps
        with monkeypatch.context() as patch:
            patch.setattr(
                scorer.policy,
                "response_logps",
                lambda batch, seen=seen, compute=compute: (
                    seen.append(batch.input_ids.numel()) or compute(batch)
                ),
            )
            (scores,) = scorer(groups)
        found[budget] = (seen, scores.logps)
    whole = len(groups[0].prompt) + sum(map(len, groups[0].responses))
    assert found[None][0] == found[512][0] == [whole] and 128 < whole < 4 * 128
    assert len(found[128][0]) > 1
    assert found[None][1] == pytest.approx(found[128][1], rel=1e-5)


def test_rows_keep_their_place_over_windows_and_those_that_cannot_be_scored_say_why(make_config):
    rows = [
        {"prompt": f"{i} ", "chosen": "yes " * (i % 5 + 1), "rejected": "no", "id": i}
        for i in range(WINDOW + 7)
    ]
    rows[3]["prompt"] = "the cat sat on a mat " * 40
    rows[WINDOW + 2]["chosen"] = None
    result = score(make_config(max_length=64), rows)
    reasons = result.columns["unscored"]
    assert [i for i, reason in enumerate(reasons) if reason] == [3, WINDOW + 2]
    assert "max_length" in reasons[3] and "chosen" in reasons[WINDOW + 2]
    assert result.columns["chosen_logp"][3] is result.columns["margin"][3] is None
    assert result.rows["id"][:] == list(range(WINDOW + 7))
    last = score(make_config(max_length=64), rows[-1:])
    assert result.columns["margin"][-1] == pytest.approx(last.columns["margin"][0], rel=1e-5)
    assert result.summary["unscored"] == 2


def test_rewards_are_measured_from_a_reference_or_from_an_adapters_base(
    make_config, adapter, tiny_model
):
    pairs = [{"prompt": "the cat ", "chosen": "sat", "rejected": "ran far"}]
    base, own = score(make_config(), pairs), score(make_config(), pairs).columns
    assert "chosen_reward" not in base.columns
    tuned = score(make_config(model_name_or_path=str(adapter), beta=0.5), pairs).columns
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), adapter
    ).merge_and_unload()
    expected, _ = own_logp(merged, AutoTokenizer.from_pretrained(tiny_model), "the cat ", "sat")
    assert tuned["chosen_logp"][0] == pytest.approx(expected, rel=1e-5)
    assert tuned["chosen_ref_logp"] == pytest.approx(own["chosen_logp"], rel=1e-5)
    rewards = [
        0.5 * (tuned[f"{name}_logp"][0] - own[f"{name}_logp"][0]) for name in ("chosen", "rejected")
    ]
    assert abs(rewards[0]) > 1e-3
    assert [tuned["chosen_reward"][0], tuned["rejected_reward"][0]] == pytest.approx(
        rewards, rel=1e-3
    )
    assert tuned["margin"][0] == pytest.approx(rewards[0] - rewards[1], rel=1e-3)
    two = score(
        make_config(ref_model_name_or_path=str(adapter), beta=0.5), pairs
    ).columns  # the other way round
    assert two["margin"][0] == pytest.approx(-tuned["margin"][0], rel=1e-3)


def test_accuracies_are_those_of_the_pairs_and_of_a_columns_values(make_config):
    rows = [
        {"prompt": "the cat ", "chosen": a, "rejected": b, "kind": kind}
        for a, b, kind in (("sat", "sat on a mat", "x"), ("sat on a mat", "sat", "y"))
    ] + [{"prompt": "a dog ", "chosen": "ran", "rejected": "ran", "kind": "y"}]
    summary = score(make_config(), rows, by="kind").summary
    assert summary["accuracy"]["logp"] == pytest.approx(1.5 / 3)  # a tie is half right
    assert summary["by"]["x"]["pairs"] == 1 and summary["by"]["y"]["pairs"] == 2
    total = sum(part["pairs"] * part["logp"] for part in summary["by"].values())
    assert total == pytest.approx(1.5)
    with pytest.raises(DataError, match="no column sort; there are prompt, chosen, rejected, kind"):
        score(make_config(), rows, by="sort")


def test_labels_are_judged_by_the_area_under_the_curve():
    values = [{"logp": np.array([v])} for v in (-1.0, -2.0, -2.0, -3.0)]
    assert label_accuracy(values, [True, True, False, False])["logp"] == pytest.approx(3.5 / 4)
    assert label_accuracy(values, [False, False, True, True])["logp"] == pytest.approx(0.5 / 4)
    assert label_accuracy(values, [True] * 4) == {}


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([{"prompt": "a ", "completion": "b"}], {"response_logps", "response_tokens", "best"}),
        (
            [{"prompt": "a ", "responses": ["b", "c"]}],
            {"response_logps", "response_tokens", "best"},
        ),
        ([{"prompt": "a ", "completion": "b", "label": True}], {"logp", "tokens"}),
        (
            [{"chosen": "a b", "rejected": "a c"}],
            {*(f"{n}_{v}" for n in ("chosen", "rejected") for v in ("logp", "tokens")), "margin"},
        ),
    ],
)
def test_layouts_get_columns_of_their_own(make_config, rows, columns):
    result = score(make_config(), rows)
    assert result.columns.keys() == columns
    numbers = json.dumps(result.columns)
    assert "NaN" not in numbers and "null" not in numbers


def test_a_file_is_scored_into_another_with_every_column(make_config, tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "the cat ", "chosen": "sat", "rejected": "ran", "meta": {"a": [1, None]}},
        {"prompt": "a dog ", "chosen": "ran ü\u2028", "rejected": "sat", "meta": "text"},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = make_config()
    words = ["--model_name_or_path", str(config.model_name_or_path), "--dataset_name", str(source)]
    words += ["--use_cpu", "--no_bf16", "--disable_tqdm"]
    for name in ("out.jsonl", "out.jsonl.gz", "out.parquet"):
        assert main(["score", *words, "-o", str(tmp_path / name)]) == 0
    said = capsys.readouterr().out
    assert "2 pairs in the right order: log-probability" in said
    assert f"rows: {tmp_path / 'out.parquet'}" in said
    plain = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")
    zipped = gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).decode().split("\n")
    assert plain == zipped and plain.pop() == ""
    written = [json.loads(line) for line in plain]
    assert [{k: row[k] for k in rows[0]} for row in written] == rows
    parquet = datasets.load_dataset("parquet", data_files=str(tmp_path / "out.parquet"))["train"]
    assert parquet["margin"][:] == pytest.approx([row["margin"] for row in written])
    assert main(["score", *words, "--json", "--by", "prompt"]) == 0
    assert json.loads(capsys.readouterr().out)["by"].keys() == {"the cat ", "a dog "}
    # What was written is scored again, and its columns are replaced.
    again = [*words[:2], "--dataset_name", str(tmp_path / "out.jsonl"), *words[4:]]
    assert main(["score", *again, "-o", str(tmp_path / "again.jsonl")]) == 0
    lines = (tmp_path / "again.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == written


def test_columns_of_the_users_own_are_not_replaced(make_config, tmp_path, capsys):
    row = {"prompt": "the cat ", "chosen": "sat", "rejected": "ran"}
    own = {"margin": 7.0, "chosen_logp": "mine", "unscored": "mine"}
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps(row | own) + "\n")
    words = ["--model_name_or_path", str(make_config().model_name_or_path), "--use_cpu"]
    words += ["--dataset_name", str(data)]
    assert main(["score", *words, "-o", str(out)]) == 2
    error = capsys.readouterr().err
    assert "columns that fastdpo score writes: chosen_logp, margin, unscored;" in error
    assert not out.exists() and error.count("\n") == 1
    assert main(["score", *words]) == 0
    result = score(make_config(), [row | own])
    assert {key: result.rows[0][key] for key in own} == own
    assert result.columns["margin"] == score(make_config(), [row]).columns["margin"]


def test_what_an_earlier_score_wrote_is_gone(make_config, adapter):
    rows = [{"prompt": "the cat ", "chosen": "sat", "rejected": "ran", "id": 1}]
    first = score(make_config(model_name_or_path=str(adapter)), rows).rows
    assert "chosen_reward" in first.column_names
    second = score(make_config(), first).rows
    assert second.to_list() == score(make_config(), rows).rows.to_list()


def test_own_figures_beside_a_label_are_not_an_earlier_scores(make_config, tmp_path):
    row = {"prompt": "the cat ", "completion": "sat", "label": True}
    own = row | {"logp": -1.0, "tokens": 5, "reward": 3.0}
    with pytest.raises(DataError, match="has columns that fastdpo score writes: logp, tokens, rew"):
        score(make_config(), [own], output=tmp_path / "out.jsonl")


def test_every_layout_of_training_is_scored(make_config):
    said = [{"role": "user", "content": "the cat"}]
    sides = {"chosen": "sat", "rejected": "ran"}
    talk = {"conversations": [{"from": "human", "value": "the cat"}]}
    shared = {side: {"from": "gpt", "value": text} for side, text in sides.items()}
    plain = score(
        make_config(),
        [{"prompt": said} | {s: [{"role": "assistant", "content": t}] for s, t in sides.items()}],
    )
    for row in ({"instruction": "the cat", **sides}, {**talk, **shared}):
        found = score(make_config(), [row])
        assert found.columns["margin"] == pytest.approx(plain.columns["margin"], rel=1e-5)


def test_rows_of_pandas_are_scored(make_config, tmp_path):
    """Lists come out of Parquet as arrays of NumPy."""
    rows = [
        {"prompt": [{"role": "user", "content": "the cat"}], "n": number, "chosen": [
            {"role": "assistant", "content": "sat"}], "rejected": [
            {"role": "assistant", "content": "ran"}]}
        for number in (1, 2)
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = score(make_config(), pandas.read_parquet(tmp_path / "rows.parquet").to_dict("records"))
    assert found.columns == score(make_config(), rows).columns and found.summary["unscored"] == 0


def test_several_data_sets_are_scored_as_one(make_config, tmp_path):
    rows = [
        {"prompt": "the cat ", "chosen": "sat", "rejected": "ran", "id": 1},
        {"prompt": "a dog ", "chosen": "ran far", "rejected": "sat", "id": 2},
    ]
    entries = []
    for row in rows:
        file = tmp_path / f"{row['id']}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        entries.append({"path": str(file), "weight": 3.0})
    result = score(make_config(datasets=entries))
    assert result.rows["id"][:] == [1, 2]
    assert result.columns == score(make_config(), rows).columns


def test_rows_in_memory_need_not_agree_in_their_types(make_config):
    rows = [
        {"prompt": "the cat ", "responses": ["sat"], "meta": 1, "of": {"a": 1}},
        {"prompt": "a dog ", "responses": ["ran"], "meta": "x", "of": {"b": None}},
    ]
    result = score(make_config(), rows)
    assert [{key: row[key] for key in rows[0]} for row in result.rows] == rows


def test_what_is_wrong_is_one_line(make_config, tmp_path, capsys):
    model = str(make_config().model_name_or_path)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "a", "answer": "b"}\n')
    words = ["--model_name_or_path", model, "--dataset_name", str(data), "--use_cpu"]
    assert main(["score", *words]) == 2
    assert "missing columns: found answer, question" in capsys.readouterr().err
    assert main(["score", *words, "-o", "rows.txt"]) == 2
    error = "error: rows.txt: expected a file named .jsonl, .jsonl.gz or .parquet\n"
    assert capsys.readouterr().err == error
    assert main(["score", *words, "-o", str(data)]) == 2
    assert f"{data}: is read here" in capsys.readouterr().err
    assert main(["score", *words, "-o"]) == 2
    assert "--output: expected a file (fastdpo score --help)" in capsys.readouterr().err
    assert main(["score", *words, "--outptu", "rows.jsonl"]) == 2
    assert "the nearest known key is output\n" in capsys.readouterr().err
    assert main(["score", "--dataset_name", str(data)]) == 2
    assert "model_name_or_path" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="one device"):
        score(make_config(devices=2), [{"prompt": "a ", "completion": "b"}])
    with pytest.raises(DataError, match="expected a list of dicts"):
        score(make_config(), [])
    assert not (tmp_path / "rows.txt").exists() and "question" in data.read_text()


def test_the_policy_is_a_reward_function_of_trls_form(adapter, tiny_model, make_config):
    reward = RewardModel(str(adapter), beta=0.5, **KEYS)
    prompts, completions = ["the cat ", "a dog ", "the cat "], ["sat", "ran", "slept far"]
    rewards = reward(prompts=prompts, completions=completions, completion_ids=[[1]] * 3, answer=[0])
    rows = [{"prompt": p, "responses": [c]} for p, c in zip(prompts, completions, strict=True)]
    scored = score(make_config(model_name_or_path=str(adapter), beta=0.5), rows).columns
    assert rewards == pytest.approx([r for [r] in scored["response_rewards"]], rel=1e-4)
    assert all(isinstance(r, float) and math.isfinite(r) for r in rewards)
    assert reward.__name__ == "implicit_reward"
    with pytest.raises(DataError, match="completions, row 2"):
        reward(["a ", "b "], ["c", None])
    with pytest.raises(ConfigError, match="is no adapter"):
        RewardModel(str(tiny_model), **KEYS)
    with pytest.raises(ModelError):
        RewardModel(str(adapter / "nothing"), **KEYS)


def test_what_is_too_long_for_a_reward_does_not_end_a_run(adapter, caplog):
    reward = RewardModel(str(adapter), max_length=32, **KEYS)
    prompts = ["the cat " * 40, "the cat ", "the cat "]
    with caplog.at_level("WARNING", "fastdpo"):
        none, long, short = reward(prompts, ["sat", "ran far " * 40, "ran"])
        reward(prompts, ["sat", "ran far " * 40, "ran"])
    assert none is None and short == pytest.approx(reward(["the cat "], ["ran"])[0], rel=1e-4)
    assert long is not None and math.isfinite(long)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "implicit_reward: 1 prompts reach max_length, 32 tokens, and have no reward",
        "implicit_reward: 1 completions are cut at max_length, 32 tokens",
    ]
    assert reward([], []) == []
    with pytest.raises(DataError, match="as many completions as prompts, got 1 for 2"):
        reward(["a ", "b "], ["c"])


def test_a_chat_is_scored_as_its_template_writes_it(tiny_model):
    reward = RewardModel(str(tiny_model), str(tiny_model), **KEYS)
    prompt = [{"role": "user", "content": "hello"}]
    rewards = reward([prompt], [[{"role": "assistant", "content": "blue"}]])
    assert rewards == pytest.approx([0.0], abs=1e-6)
