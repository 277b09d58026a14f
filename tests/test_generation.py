"""`fastdpo sample`, `fastdpo chat` and `fastdpo merge`."""

import io
import json
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import TrainConfig, score
from fastdpo.cli import main
from fastdpo.data.load import Reader
from fastdpo.errors import ConfigError
from fastdpo.generation.chat import _harmless
from fastdpo.model.sampler import Sampler, Sampling

KEYS = ["--use_cpu", "--no_bf16", "--disable_tqdm"]


def sampler(path: Path) -> Sampler:
    return Sampler.load(TrainConfig(model_name_or_path=str(path), use_cpu=True))


def test_batches_of_any_size_give_the_likeliest_answers_of_the_model_alone(tiny_model):
    one, how = sampler(tiny_model), Sampling(max_new_tokens=6, temperature=0)
    prompts = ["the cat ", "a small dog saw the old hills and ", "one "]
    together = dict(one.sample([one.encode(p) for p in prompts], how, batch_size=3))
    apart = dict(one.sample([one.encode(p) for p in prompts], how, batch_size=1))
    assert together == apart
    ids = one.tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    for _ in range(6):
        logits = one.model(ids).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    expected = one.tokenizer.decode(ids[0, -6:], skip_special_tokens=True)
    assert together[0][0].text == expected


def test_the_seed_decides_what_is_drawn(tiny_model):
    one, how = sampler(tiny_model), Sampling(max_new_tokens=8)
    first = dict(one.sample([one.encode("the cat ")], how, 3, seed=1))
    assert dict(one.sample([one.encode("the cat ")], how, 3, seed=1)) == first
    assert dict(one.sample([one.encode("the cat ")], how, 3, seed=2)) != first
    assert len(set(first[0])) > 1


@pytest.mark.parametrize("window", [None, 4], ids=["cache", "window"])
def test_several_answers_are_those_of_the_prompt_alone(tiny_model, window):
    """With prompts of several lengths in a batch, each of which is computed once for its answers;
    layers with a window compute it for each.
    """
    one, how = sampler(tiny_model), Sampling(max_new_tokens=6, temperature=0)
    if window:
        one.model.config.sliding_window = window
        one.model.config.layer_types = ["sliding_attention"] * one.model.config.num_hidden_layers
    prompts = [one.encode(text) for text in ("the cat ", "a small dog saw the old hills and ", "a")]
    seen = []
    one.model.get_decoder().register_forward_pre_hook(
        lambda _, arguments, keys: seen.append(keys["input_ids"].numel()), with_kwargs=True
    )
    alone = one.generate(prompts, how, logps=True)
    for three, (answer,) in zip(one.generate(prompts, how, 3, logps=True), alone, strict=True):
        assert [each.ids for each in three] == [answer.ids] * 3
        for each in three:
            assert each.logps == pytest.approx(answer.logps, abs=1e-5)
    longest = max(map(len, prompts))
    computed_for_each = 3 * 3 * longest
    assert seen[0] == 3 * longest and (computed_for_each in seen) == bool(window)


def test_an_answer_ends_at_the_models_own_end(tiny_model):
    one = sampler(tiny_model)
    end = one.tokenizer.eos_token_id
    assert one._answer([5, end, 6]).complete and not one._answer([5, 6]).complete
    answer = one._answer([5, end, 6], [-1.0, -2.0, -3.0])
    assert answer.text == one.tokenizer.decode([5])
    assert (answer.ids, answer.logps) == ((5, end), (-1.0, -2.0))
    cut = one._answer([5, 6], [-1.0, -2.0])
    assert (cut.ids, cut.logps) == ((5, 6), (-1.0, -2.0))


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"top_k": -1}]
)
def test_numbers_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=f"--{next(iter(values))}"):
        Sampling(**values)


def test_samples_of_a_file_are_rows_that_can_be_scored(tiny_model, tmp_path, capsys):
    rows = [
        {"prompt": [{"role": "user", "content": "hello"}], "id": 1, "label": True},
        {"prompt": [{"role": "user", "content": "the cat sat on a mat"}], "id": 2, "label": False},
    ]
    source, out = tmp_path / "prompts.jsonl", tmp_path / "samples.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sample", str(tiny_model), "--dataset_name", str(source), "-n", "2", "-o", str(out)]
    assert main([*words, "--max_new_tokens", "4", *KEYS]) == 0
    assert f"2 rows, 2 answers each: {out}" in capsys.readouterr().out
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
    assert [row["id"] for row in written] == [1, 2] and "label" not in written[0]
    assert [len(row["responses"]) for row in written] == [2, 2]
    assert written[0]["responses"][0][0]["role"] == "assistant"
    config = TrainConfig(
        model_name_or_path=str(tiny_model), dataset_name=str(out), use_cpu=True, bf16=False
    )
    assert score(config).summary["responses"] + 4 * score(config).summary["unscored"] >= 4


def test_prompts_come_from_pairs_without_one_and_from_the_command_line(
    tiny_model, tmp_path, capsys
):
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"chosen": "the cat sat", "rejected": "the cat ran"}\n')
    words = ["sample", str(tiny_model), "--max_new_tokens", "3", "--temperature", "0", *KEYS]
    assert main([*words, "--dataset_name", str(source)]) == 0
    [row] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main([*words, "--prompt", row["prompt"]]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert isinstance(row["prompt"], str) and isinstance(row["responses"][0], str)
    assert asked["prompt"] == [{"role": "user", "content": row["prompt"]}]
    assert asked["responses"][0][0]["role"] == "assistant"


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_rows_that_differ_in_type_are_written_as_they_are(tiny_model, tmp_path, name):
    def called(**arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    user = {"role": "user", "content": "the cat"}
    rows = [
        {"prompt": "42", "meta": 1, "n": 1},
        {"prompt": [user, called(a=1), user], "meta": "7", "n": 2},
        {"prompt": [user, called(b=None, c=[]), user], "meta": {"k": 1}, "n": None},
    ]
    source, out = tmp_path / "prompts.jsonl", tmp_path / name
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sample", str(tiny_model), "--dataset_name", str(source), "-o", str(out)]
    assert main([*words, "--max_new_tokens", "2", *KEYS]) == 0
    found = Reader("train", all_columns=True).read(str(out)).with_format(None)
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    assert [type(row["responses"][0]) for row in found] == [str, list, list]
    if name == "out.jsonl":
        written = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    "rows",
    [
        [{"responses": ["a", "b"], "scores": [1, 2]}, {"responses": [], "scores": [1]},
         {"responses": ["a", None], "scores": [1, 2]}],
        [{"completion": "a", "label": True}, {"completion": "a", "label": None}],
        [{"chosen": "a", "rejected": "b"}, {"chosen": None, "rejected": "b"}],
    ],
)  # fmt: skip
def test_faults_of_what_a_sample_replaces_stop_nothing(tiny_model, tmp_path, capsys, rows):
    source = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"the cat {i} ", **row} for i, row in enumerate(rows)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sample", str(tiny_model), "--dataset_name", str(source), "--max_new_tokens", "2"]
    assert main([*words, *KEYS]) == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
    assert all({*row} == {"prompt", "responses", "complete"} for row in written)
    source.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1] | {"prompt": None}) + "\n")
    assert main([*words, *KEYS]) == 2
    assert "row 2: prompt: expected text" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["sample", "--prompt", "a"], ["chat"], ["merge", "-o", "x"]])
def test_a_hub_that_cannot_be_reached_is_asked_once(words, monkeypatch, capsys, caplog):
    asked = []

    def refuse():
        asked.append(1)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("fastdpo.hub.get_session", refuse)
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", refuse)
    assert main([words[0], "nobody/no-such-model", *words[1:]]) == 2
    assert "hub: https://huggingface.co cannot be reached (no network)" in caplog.text
    assert "nobody/no-such-model" in capsys.readouterr().err and len(asked) == 1


def test_a_chat_goes_on_from_what_was_said(tiny_model, capsys, monkeypatch):
    lines = "hello\nand now\n/reset\nhello\n/exit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    asked = []
    encode = Sampler.encode
    monkeypatch.setattr(
        Sampler, "encode", lambda self, prompt: asked.append(list(prompt)) or encode(self, prompt)
    )
    words = ["chat", str(tiny_model), "--system", "be brief", "--base", str(tiny_model)]
    assert main([*words, "--temperature", "0", "--max_new_tokens", "3", "--use_cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("[before]") == said.count("[after]") == 3
    roles = [[message["role"] for message in prompt] for prompt in asked]
    first = ["system", "user"]
    assert roles == [first] * 2 + [[*first, "assistant", "user"]] * 2 + [first] * 2
    assert "never" not in json.dumps(asked)


def test_what_a_terminal_would_obey_is_not_printed():
    assert _harmless("a\x1b[2Jb\x07\n\tü") == "a[2Jb\n\tü"


def test_a_merged_adapter_is_a_model_with_its_numbers(adapter, tiny_model, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(adapter), "-o", str(out), "--max_shard_size", "20KB"]) == 0
    assert f"merged into {tiny_model}, float32: {out}" in capsys.readouterr().out
    assert len(list(out.glob("*.safetensors"))) > 1
    ids = torch.arange(5, 17)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = base(ids).logits
    expected = PeftModel.from_pretrained(base, adapter)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert (merged - plain).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(out)("the cat")["input_ids"]
    half = tmp_path / "half"
    assert main(["merge", str(adapter), "--dtype", "bfloat16", "-o", str(half)]) == 0
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["merge", "{model}", "-o", "{tmp}/x"], "is no adapter"),
        (["merge", "{adapter}"], "--output: expected a directory"),
        (["merge", "{adapter}", "-o", "{tmp}"], "is there already"),
        (["merge"], "expected a model: fastdpo merge MODEL"),
        (["merge", "{adapter}", "-o", "{tmp}/x", "--max_shard_size", "big"], "--max_shard_size"),
        (["sample", "{model}"], "expected one of --prompt and --dataset_name"),
        (["sample", "{model}", "--prompt", "a", "-n", "two"], "--number: expected a whole number"),
        (["sample", "{model}", "--prompt", "a", "-n", "0"], "--number: expected at least 1"),
        (["sample", "{model}", "--prompt", "a", "--temperature", "hot"], "--temperature"),
        (["sample", "{tmp}/none", "--prompt", "a"], "none"),
        (["chat", "{model}", "--betta", "1"], "betta"),
        (["chat", "{model}", "--sistem", "x"], "the nearest known key is system"),
        (["sample", "{model}", "--temprature", "0"], "the nearest known key is temperature"),
        (["merge", "{model}", "--max_shards", "1"], "the nearest known key is max_shard_size"),
        (
            ["sample", "{model}", "--dataset_name", "{tmp}/data.jsonl", "-o", "{tmp}/data.jsonl"],
            "data.jsonl: is read here; expected another file to write to",
        ),
        (
            ["sample", "{model}", "--dataset_name", "{tmp}", "-o", "{tmp}/data.jsonl"],
            "is read here",
        ),
    ],
)
def test_what_is_wrong_is_one_line(words, error, tiny_model, adapter, tmp_path, capsys):
    (tmp_path / "something").write_text("kept")
    (tmp_path / "data.jsonl").write_text('{"prompt": "kept"}\n')
    words = [w.format(model=tiny_model, adapter=adapter, tmp=tmp_path) for w in words]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and error in said and said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "something"]
    assert (tmp_path / "data.jsonl").read_text() == '{"prompt": "kept"}\n'
