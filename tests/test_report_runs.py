"""The report of a run that goes on: when it is written, what it asks of the policy, and that the
run is the same without it.
"""

import json
from functools import partial

import pytest
import torch
from test_report import Document
from training import assert_same_weights, heard, metrics, run, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import TrainConfig, train
from fastdpo.data.groups import Group
from fastdpo.model.scorer import Scorer
from fastdpo.report import page
from fastdpo.report.page import write_report
from fastdpo.training import reporting, samples


@pytest.fixture
def go(tiny_model, pairs_file, monkeypatch):
    monkeypatch.setattr(samples, "NEW_TOKENS", 8)
    evaluated = {"do_eval": True, "eval_dataset_name": str(pairs_file)}
    return partial(run, tiny_model, pairs_file, **evaluated, report=True, report_samples=2)


def facts(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def assert_same_run(one, other):
    """Equal weights, and in every line of metrics the same numbers but for times and memory."""
    assert_same_weights(one, other)
    rates = {"tokens_per_second", "pairs_per_second", "peak_memory_mib", "tokens_saved_by_sharing"}
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        assert ours.keys() == theirs.keys()
        assert {k: ours[k] for k in ours.keys() - rates} == {
            k: theirs[k] for k in theirs.keys() - rates
        }


def text(folder):
    return Document((folder / "report.html").read_text(encoding="utf-8")).text


def test_a_run_leaves_a_report(go, tmp_path):
    go(tmp_path / "out", max_steps=3)
    found = facts(tmp_path / "out")
    assert found["total_steps"] == 3 and found["seconds"] > 0 and found["device"] == "CPU"
    assert found["lengths"]["of"] == 13 and found["lengths"]["counts"].keys() == {
        "prompt",
        "chosen",
        "rejected",
    }
    assert [row.keys() for row in found["samples"]] == [{"prompt", "chosen", "before", "after"}] * 2
    assert all(row["prompt"][0][1].startswith("question") for row in found["samples"])
    assert all(row["chosen"].endswith(" yes") for row in found["samples"])
    shown = text(tmp_path / "out")
    assert "finished: 3 steps" in shown and "Before training" in shown
    assert found["samples"][0]["chosen"] in shown
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    assert {"report.html", "report.json"} <= set(state["files"])


def test_samples_are_the_models_own_answers(go, tmp_path, tiny_model, monkeypatch):
    asked, answers = [], reporting.answers

    def watched(policy, tokenizer, prompts):
        asked[:] = prompts
        return answers(policy, tokenizer, prompts)

    monkeypatch.setattr(reporting, "answers", watched)
    go(tmp_path / "out", max_steps=4)
    assert len({len(prompt) for prompt in asked}) == 2, "one of them is padded"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for when, place in (("before", tiny_model), ("after", tmp_path / "out")):
        model = AutoModelForCausalLM.from_pretrained(place).eval()
        for prompt, row in zip(asked, facts(tmp_path / "out")["samples"], strict=True):
            ids = torch.tensor([prompt])
            answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
            expected = tokenizer.decode(answer, skip_special_tokens=True).strip()
            assert row[when].removesuffix(" …") == expected


def test_the_run_is_the_same_without(go, tmp_path):
    keys = {"use_peft": True, "lora_dropout": 0.1, "lora_target_modules": ["q_proj", "v_proj"]}
    for name, on in (("with", True), ("without", False)):
        torch.manual_seed(3)
        go(tmp_path / name, **keys, report=on)
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert "after" in facts(tmp_path / "with")["samples"][0]
    assert not list((tmp_path / "without").glob("report.*"))


def test_a_resumed_run_goes_on_with_its_report(go, tmp_path):
    out, go = tmp_path / "out", partial(go, lr_scheduler_type="constant")
    go(out, max_steps=2, save_strategy="steps", save_steps=2)
    first = facts(out)
    go(out, max_steps=5, resume_from_checkpoint=True)
    go(tmp_path / "whole", max_steps=5, report=False)
    assert_same_weights(out, tmp_path / "whole")
    found = facts(out)
    assert found["total_steps"] == 5 and found["seconds"] > first["seconds"]
    for row, earlier in zip(found["samples"], first["samples"], strict=True):
        assert row["before"] == earlier["before"] and "after" in row
    assert "finished: 5 steps" in text(out) and "at step 5" in text(out)


def test_it_is_written_while_training_and_seldom(go, tmp_path, monkeypatch):
    out, written = tmp_path / "out", []

    def counted(folder, live):
        written.append(len(metrics(folder)))
        path = write_report(folder, live=live)
        assert ("running: step" in text(folder)) == live
        return path

    monkeypatch.setattr(reporting, "write_report", counted)
    go(out, max_steps=6)
    assert written == [1, 7, 7], "at the first line, before and after the model is saved"
    monkeypatch.setattr(reporting, "SECONDS", 0.0)
    monkeypatch.setattr(reporting, "SHARE", 1e9)
    written.clear()
    go(out, max_steps=6, overwrite_output_dir=True)
    assert written == [1, 2, 3, 4, 5, 6, 7, 7, 7]


def test_a_slow_page_is_written_less_often(monkeypatch):
    clock = iter([0.0, 100.0, 102.0])
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(reporting, "write_report", lambda folder, live: None)
    monkeypatch.setattr(reporting.files, "write_text", lambda path, text: None)
    reporter = reporting.Reporter.__new__(reporting.Reporter)
    reporter.folder, reporter.facts, reporter._before = reporting.Path("."), {}, 7.0
    reporter._start = next(clock)
    reporter._write(live=True)
    assert reporter.facts["seconds"] == 107.0
    assert reporter._due == 102.0 + 2.0 / reporting.SHARE


def test_nothing_is_written_before_the_first_step(go, tmp_path, monkeypatch):
    def fails(*_):
        assert not list((tmp_path / "out").glob("report.*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdpo.training.loop.Trainer.gradients", fails)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_report_that_fails_is_said_once_and_stops_nothing(go, tmp_path, monkeypatch):
    def fails(folder, live):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "write_report", fails)
    monkeypatch.setattr(reporting, "SECONDS", 0.0)
    _, said = go(tmp_path / "out", max_steps=3)
    lines = [line for line in said if line.startswith("report:")]
    assert len(lines) == 1 and "No space left on device" in lines[0]
    assert len(metrics(tmp_path / "out")) == 4 and (tmp_path / "out" / "config.json").exists()


def test_a_model_that_cannot_generate_is_no_obstacle(go, tmp_path, monkeypatch):
    def fails(self, *_, **__):
        raise NotImplementedError("no cache of this kind")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", fails)
    _, said = go(tmp_path / "out", max_steps=1)
    assert [line for line in said if line.startswith("report:")] == [
        "report: no samples: no cache of this kind"
    ]
    assert "None: no cache of this kind." in text(tmp_path / "out")
    assert len(metrics(tmp_path / "out")) == 2


def test_who_is_not_asked(tmp_path):
    world, policy = reporting.World(), Scorer(None, None, None)
    reporter = reporting.Reporter(
        TrainConfig(torch_compile=True), tmp_path, policy, None, None, world, 3
    )
    assert reporter._obstacle() == "the layers are compiled"
    reporter.config = TrainConfig()
    policy.model = torch.nn.Linear(1, 1)
    policy.model.can_generate = lambda: False
    assert reporter._obstacle() == "the model cannot generate"
    policy.context = object()
    assert reporter._obstacle() == "each row is shared by several devices"


@pytest.mark.parametrize("keys", [{"do_eval": False}, {"report_samples": 0}])
def test_without_held_out_rows_there_are_no_samples(go, tmp_path, monkeypatch, keys):
    monkeypatch.setattr(reporting, "answers", None)
    _, said = go(tmp_path / "out", max_steps=1, **keys)
    assert not any("samples" in line for line in said)
    assert "Samples" not in text(tmp_path / "out")


def test_labelled_rows_have_a_report_too(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "NEW_TOKENS", 4)
    rows = [
        {"prompt": f"question {n}: ", "completion": f"one {n} {word}", "label": word == "yes"}
        for n in range(4)
        for word in ("yes", "no")
    ]
    keys = settings(tiny_model, tmp_path, tmp_path / "out", report=True, do_eval=True, max_steps=2)
    del keys["dataset_name"]
    with heard() as said:
        train(TrainConfig.from_dict(keys), rows, eval_rows=rows)
    assert not [line for line in said if line.startswith("report:")]
    assert "Response: median" in text(tmp_path / "out")
    assert all(row["chosen"].endswith("yes") for row in facts(tmp_path / "out")["samples"])


def test_prompts_are_shown_by_turns(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "user\nsees two lines"},
    ]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert samples.turns(ids, tokenizer) == [
        ["system", "Be brief."],
        ["user", "user\nsees two lines"],
    ]
    assert samples.turns(tokenizer("plain text")["input_ids"], tokenizer) == [["", "plain text"]]


def test_long_prompts_are_not_asked():
    def group(length):
        return Group(torch.zeros(length, dtype=torch.int32).numpy(), [])

    short, long = group(9), group(samples.LONGEST_PROMPT + 1)
    assert samples.choose_prompts([long, short, group(0)] * 3, 2) == [short, short]
    assert samples.choose_prompts([long], 2) == [] and samples.choose_prompts([], 2) == []
    assert page.RELOADS >= reporting.SECONDS, "what is read anew has been written anew"
