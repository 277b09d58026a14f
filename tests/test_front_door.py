"""`from fastdpo import TrainConfig, train`: what is in memory trains as what is on disk does."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from training import assert_same_weights, heard, metrics, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import TrainConfig, train
from fastdpo.errors import ConfigError, DataError, ModelError

PAIR = {"prompt": "the cat ", "chosen": "sat", "rejected": "ran"}


@pytest.fixture
def rows(pairs_file) -> list[dict[str, Any]]:
    return [json.loads(line) for line in pairs_file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def config(tiny_model, pairs_file, tmp_path):
    """A configuration without the keys that are None, its output in a folder of that name."""

    def make(name: str, **keys: Any) -> TrainConfig:
        values = settings(tiny_model, pairs_file, tmp_path / name, **keys)
        return TrainConfig.from_dict({k: v for k, v in values.items() if v is not None})

    return make


def load(path: Path) -> dict[str, Any]:
    return {
        "model": AutoModelForCausalLM.from_pretrained(path),
        "tokenizer": AutoTokenizer.from_pretrained(path),
    }


def test_importing_it_is_light() -> None:
    code = (
        "import sys, fastdpo; print(fastdpo.__version__, dir(fastdpo)); "
        "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError, match="nothing_such"):
        from fastdpo import nothing_such  # noqa: F401


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_rows_in_memory_train_as_their_file_does(config, rows, make, tmp_path):
    keys = {"eval_strategy": "steps", "eval_steps": 2}
    whole = train(config("file", eval_dataset_name=None, **keys, dataset_test_split="train"))
    given = train(config("rows", dataset_name=None, **keys), make(rows), make(rows))
    assert (given.step, given.output_dir) == (4, tmp_path / "rows")
    assert given.metrics["loss"] == whole.metrics["loss"]
    assert given.metrics["eval_loss"] == whole.metrics["eval_loss"]
    assert_same_weights(tmp_path / "rows", tmp_path / "file")


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"precompute_ref_log_probs": False},
        {"use_peft": True, "lora_dropout": 0.0},
        {"use_peft": True, "precompute_ref_log_probs": False, "lora_dropout": 0.0},
        {"memory": "auto"},
    ],
)
def test_a_model_in_memory_trains_as_its_directory_does(config, tiny_model, tmp_path, keys):
    """Its dropout is off while training, as in TRL, and saved as it was."""
    train(config("disk", **keys))
    loaded = load(tiny_model)
    result = train(config("memory", model_name_or_path=None, **keys), **loaded)
    assert_same_weights(tmp_path / "memory", tmp_path / "disk")
    if "use_peft" in keys:
        assert type(result.model).__name__ == "PeftModelForCausalLM"
        return
    assert result.model is loaded["model"]
    saved = json.loads((tmp_path / "memory" / "config.json").read_text())
    assert saved["attention_dropout"] == 0.1
    card = (tmp_path / "memory" / "README.md").read_text(encoding="utf-8")
    assert f"# {tiny_model.name}, tuned with DPO" in card


@pytest.mark.parametrize("keys", [{}, {"use_peft": True, "lora_dropout": 0.0}])
def test_the_model_can_be_used_afterwards(config, tiny_model, keys):
    loaded = load(tiny_model)
    loaded["model"].set_attn_implementation("eager")
    prompt = loaded["tokenizer"]("the cat", return_tensors="pt")
    results = train(config("a", **keys), **loaded), train(config("b", **keys))
    texts = [result.model.generate(**prompt, max_new_tokens=4).tolist() for result in results]
    assert texts[0] == texts[1] and len(texts[0][0]) > prompt["input_ids"].shape[1]
    assert loaded["model"].config._attn_implementation == "eager"


def test_a_model_can_be_used_after_a_run_that_failed(config, tiny_model, tokenizer):
    def stop(step: int, found: dict[str, float]) -> None:
        raise KeyboardInterrupt

    loaded = load(tiny_model)
    with pytest.raises(KeyboardInterrupt):
        train(config("out"), **loaded, on_step=stop)
    loaded["model"](**tokenizer("the cat", return_tensors="pt"))


def test_a_run_in_memory_is_resumed(config, tiny_model, rows, tmp_path):
    def go(name: str, **keys: Any) -> Any:
        keys = {"model_name_or_path": None, "dataset_name": None, **keys}
        return train(config(name, **keys), rows, **load(tiny_model))

    go("whole")
    go("parts", max_steps=4, save_strategy="steps", save_steps=2)
    for path in (tmp_path / "parts" / "checkpoint-4").iterdir():
        path.unlink()
    (tmp_path / "parts" / "checkpoint-4").rmdir()
    result = go("parts", resume_from_checkpoint=True)
    assert result.step == 4
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_other_rows_are_not_taken_for_the_finished_run(config, rows, tmp_path):
    keys = {"dataset_name": None, "save_strategy": "steps", "save_steps": 2}
    train(config("out", **keys), rows)
    with pytest.raises(ValueError, match="other data"):
        train(config("out", resume_from_checkpoint=True, **keys), rows[::-1])


def test_every_step_is_told(config, tmp_path):
    told: list[tuple[int, dict[str, float]]] = []
    train(config("out", logging_steps=2), on_step=lambda step, found: told.append((step, found)))
    assert [step for step, _ in told] == [1, 2, 3, 4]
    assert [found for _, found in told if found] == [
        {name: value for name, value in line.items() if name != "step"}
        for line in metrics(tmp_path / "out")
    ]


def test_what_on_step_raises_ends_the_run(config):
    def stop(step: int, found: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config("out"), on_step=stop)


def test_a_library_logs_and_does_not_print(config, capsys):
    with heard() as said:
        train(config("out"))
    assert any(line.startswith("training: 24 comparisons") for line in said)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": [PAIR, "text"]}, "rows, row 2: expected a dict, got str"),
        ({"rows": [PAIR, PAIR | {"chosen": "\ud800"}]}, "rows, row 2: chosen: a text with half a"),
        ({"rows": []}, "rows: has no rows"),
        ({"rows": PAIR}, "rows: expected a list of dicts or a datasets.Dataset, got dict"),
        (
            {"rows": datasets.DatasetDict()},
            "rows: expected a list of dicts or a datasets.Dataset, got DatasetDict",
        ),
        ({"rows": [{"prompt": "a", "chosen": "b"}]}, "rows: missing columns: found chosen, prompt"),
        ({"rows": [PAIR, {**PAIR, "chosen": 1}]}, "rows, row 2: chosen: "),
        ({"rows": [PAIR, {**PAIR, "chosen": object()}]}, "rows, row 2: chosen: expected plain"),
        ({"rows": [PAIR, {"prompt": "a", "chosen": "b"}]}, "rows, row 2: rejected: "),
    ],
)
def test_rows_that_cannot_be_trained_on(config, given, message):
    with pytest.raises(DataError) as raised:
        train(config("out", dataset_name=None), **given)
    assert str(raised.value).startswith(message)


def test_messages_and_types_that_differ_are_read_as_in_a_file(config, tmp_path):
    rows = [
        {**PAIR, "prompt": "the dog ", "chosen": "42"},
        {
            "prompt": [{"role": "user", "content": "the cat"}],
            "chosen": [{"role": "assistant", "content": "sat"}],
            "rejected": [{"role": "assistant", "content": "ran"}],
        },
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train(config("file", dataset_name=str(file)))
    train(config("rows", dataset_name=None), rows)
    assert_same_weights(tmp_path / "rows", tmp_path / "file")


def test_what_is_missing_is_named(config, rows, tiny_model):
    with pytest.raises(ConfigError, match="dataset_name: expected a value"):
        train(config("out", dataset_name=None))
    with pytest.raises(ConfigError, match="model_name_or_path: expected a value"):
        train(config("out", model_name_or_path=None), rows)
    model = load(tiny_model)["model"]
    with pytest.raises(ConfigError, match="model_name_or_path: expected a value"):
        train(config("out", model_name_or_path=None), rows, model=model)


def test_models_that_cannot_be_trained(config, tiny_model):
    with pytest.raises(ModelError, match="model: expected a transformers PreTrainedModel, got str"):
        train(config("out"), model=str(tiny_model))
    model = load(tiny_model)["model"]
    with pytest.raises(ModelError, match="no weight of it requires a gradient"):
        train(config("out"), model=model.requires_grad_(False))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for one in (adapted, model):
        with pytest.raises(ModelError, match="model: has adapters already; pass what"):
            train(config("out", use_peft=True), model=one)
    with pytest.raises(ModelError, match="tokenizer: expected one of transformers, got str"):
        train(config("out"), tokenizer=str(tiny_model))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"optimizer_in_backward": True, "max_grad_norm": 0.0, "max_tokens_per_batch": 4000},
        {"layer_tile_tokens": 8, "gradient_checkpointing": True},
        {"attn_implementation": "eager"},
        {"save_strategy": "steps", "save_steps": 2},
    ],
)
def test_a_lent_model_comes_back_as_it_was(config, tiny_model, tmp_path, keys):
    """So the next run with it is that of the model from disk, whatever the one before was."""
    loaded = load(tiny_model)
    model, weights = loaded["model"], load(tiny_model)["model"].state_dict()
    train(config("first", model_name_or_path=None, **keys), **loaded)
    assert not model.training and not model.is_gradient_checkpointing
    assert (
        model.config.attention_dropout == 0.1 == model.model.layers[0].self_attn.attention_dropout
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    model.load_state_dict(weights)
    train(config("second", model_name_or_path=None), **loaded)
    train(config("disk"))
    assert_same_weights(tmp_path / "second", tmp_path / "disk")
    saved = json.loads((tmp_path / "second" / "config.json").read_text(encoding="utf-8"))
    assert saved["attention_dropout"] == 0.1


@pytest.mark.parametrize("precompute", [True, False])
def test_the_reference_is_the_model_in_memory(config, tiny_model, precompute, tmp_path):
    """And not the one at `model_name_or_path`, which is there for the tokenizer."""
    model = load(tiny_model)["model"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    train(config("out", precompute_ref_log_probs=precompute), model=model)
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_any_dtype_is_resumed(config, tiny_model, tmp_path, dtype):
    def go(name: str, **keys: Any) -> None:
        loaded = load(tiny_model)
        loaded["model"] = loaded["model"].to(dtype)
        train(config(name, model_name_or_path=None, **keys), **loaded)

    go("out", save_strategy="steps", save_steps=2)
    go("rest", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same_weights(tmp_path / "rest", tmp_path / "out")


def test_the_model_can_be_used_in_on_step(config, tiny_model, tmp_path):
    """What is computed there, in whatever mode, changes nothing."""
    keys = {"use_peft": True, "lora_dropout": 0.3, "model_name_or_path": None}
    loaded = load(tiny_model)
    prompt = loaded["tokenizer"]("the cat", return_tensors="pt")

    def sample(step: int, found: dict[str, float]) -> None:
        loaded["model"].eval().generate(**prompt, max_new_tokens=2, do_sample=True)

    train(config("sampled", **keys), **loaded, on_step=sample)
    train(config("plain", **keys), **load(tiny_model))
    assert_same_weights(tmp_path / "sampled", tmp_path / "plain")


@pytest.mark.parametrize("wrong", ["print", lambda: None, lambda step: None])
def test_a_callback_that_cannot_be_called_costs_nothing(config, tmp_path, wrong):
    with pytest.raises(ConfigError, match="on_step: expected a function of step and metrics"):
        train(config("out"), on_step=wrong)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_evaluation_is_asked_for_or_refused(config, rows):
    with pytest.raises(ConfigError, match="eval_rows: the run does not evaluate; set"):
        train(config("out"), rows, rows)
    with pytest.raises(ConfigError, match="eval_rows: expected rows to evaluate on"):
        train(config("out", dataset_name=None, do_eval=True), rows)


def test_mistakes_of_a_script_are_one_line(tiny_model, rows, config):
    with pytest.raises(ConfigError, match="TrainConfig: unknown key learning_rat; the nearest"):
        TrainConfig(learning_rat=1)
    with pytest.raises(ConfigError, match="TrainConfig: max_prompt_length "):
        TrainConfig(max_prompt_length=512)
    with pytest.raises(ConfigError, match="config: expected a TrainConfig, got dict"):
        train({"beta": 0.1}, rows)
    with pytest.raises(DataError, match="rows: expected a list of dicts"):
        train(config("out"), "rows.jsonl")
    with pytest.raises(ConfigError, match="report_to: wandb is not installed"):
        train(config("out", report_to=["wandb"]), rows)


def test_settings_without_effect_are_logged(config):
    with heard() as said:
        train(config("out", lora_r=8))
    assert "note: lora_r has no effect: use_peft is false" in said


def test_columns_that_are_not_read_may_hold_anything(config, rows, tmp_path):
    train(config("plain"), rows)
    noted = [{**row, "seen": {1, 2}, "fastdpo_line": "x", "fastdpo_problem": "y"} for row in rows]
    train(config("noted"), noted)
    assert_same_weights(tmp_path / "noted", tmp_path / "plain")
