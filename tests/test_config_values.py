"""Every wrong value, key, flag and file is an error that says where and what was expected."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastdpo.config import TrainConfig
from fastdpo.errors import ConfigError, FastDPOError


def fails(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse(arguments)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("--learning_rate 1e-6", "learning_rate", 1e-6),
        ("--learning-rate=1E-6", "learning_rate", 1e-6),
        ("--max_steps 50 --max_steps 60", "max_steps", 60),
        ("--max_steps -1", "max_steps", -1),
        ("--max_steps 1e3", "max_steps", 1000),
        ("--bf16 false", "bf16", False),
        ("--bf16", "bf16", True),
        ("--bf16 none", "bf16", None),
        ("--no_bf16", "bf16", False),
        ("--no-gradient-checkpointing", "gradient_checkpointing", False),
        ("--gradient_checkpointing", "gradient_checkpointing", True),
        ("--use_peft yes", "use_peft", True),
        ("--max_length none", "max_length", None),
        ("--lora_target_modules q_proj v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("--lora_target_modules a,b", "lora_target_modules", ["a,b"]),
        ("--loss_type sigmoid ipo --loss_weights 1 5e-1", "loss_weights", [1.0, 0.5]),
        ("--report_to none", "report_to", []),
        ("--report_to wandb tensorboard", "report_to", ["wandb", "tensorboard"]),
        ("--save_steps 0.25", "save_steps", 0.25),
        ("--save_steps 20.0", "save_steps", 20),
        ("--warmup_steps 0", "warmup_steps", 0),
        ("--resume_from_checkpoint", "resume_from_checkpoint", True),
        ("--resume_from_checkpoint true", "resume_from_checkpoint", True),
        ("--resume_from_checkpoint out/checkpoint-5", "resume_from_checkpoint", "out/checkpoint-5"),
        ("--run_name=--beta", "run_name", "--beta"),
        ("--output_dir ~/runs", "output_dir", str(Path("~/runs").expanduser())),
    ],
)
def test_flags(arguments, name, value):
    found = getattr(TrainConfig.parse(arguments.split()), name)
    assert found == value
    assert type(found) is type(value)


def test_a_mapping_is_json_on_the_command_line():
    text = json.dumps({"min_lr": "1e-7", "num_cycles": 1})
    config = TrainConfig.parse(
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", text]
    )
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-7, "num_cycles": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beta: 0", "beta: expected a number greater than 0, got 0.0"),
        ("beta: -.1", "beta: expected a number greater than 0, got -0.1"),
        ("beta: true", "beta: expected a number, got true"),
        ("beta: [0.1]", "beta: expected a number, got [0.1]"),
        ("beta: nan", "beta: expected a number, got nan"),
        ("beta: .inf", "beta: expected a number, got Infinity"),
        ("beta:", "beta: expected a number, got null"),
        ("label_smoothing: 0.5", "expected a number of at least 0 and less than 0.5, got 0.5"),
        ("label_smoothing: -0.1", "expected a number of at least 0 and less than 0.5, got -0.1"),
        ("max_steps: 0", "expected a whole number of at least 1, or -1 for no limit, got 0"),
        ("max_steps: 1.5", "max_steps: expected a whole number, got 1.5"),
        ("max_length: 1", "expected a whole number of at least 2, got 1"),
        ("logging_steps: 0", "a share of the run between 0 and 1, got 0"),
        ("save_steps: 1.5", "a share of the run between 0 and 1, got 1.5"),
        ("save_steps: many", "save_steps: expected a number, got many"),
        ("warmup_steps: -1", "at least 0 and less than 1, got -1"),
        ("seed: 4294967296", "expected a whole number from 0 to 4294967295, got 4294967296"),
        ("per_device_train_batch_size: 0", "expected a whole number of at least 1, got 0"),
        ("adam_beta2: 1", "expected a number of at least 0 and less than 1, got 1.0"),
        ("use_peft: 3", "use_peft: expected true or false, got 3"),
        ("bf16: maybe", "bf16: expected true or false or none, got maybe"),
        ("run_name: 1.10", "run_name: expected a text or none, got 1.1"),
        ("output_dir: ''", "output_dir: expected a text that is not empty"),
        ("dtype: fp32", "expected one of auto, bfloat16, float16, float32, got fp32"),
        ("attn_implementation: flash_attention_2", "expected one of eager, sdpa, or nothing for"),
        ("truncation_mode: keep_end", "expected keep_start, got keep_end"),
        (
            "optim: adamw_hf",
            "expected one of adamw_torch_fused, adamw_torch, sgd, adamw_torch_8bit, ",
        ),
        (
            "report_to: [wandb, comet]",
            "expected one of tensorboard, wandb, trackio, mlflow, all, got ",
        ),
        ("save_strategy: last", "expected one of no, steps, epoch, best, got last"),
        ("lr_scheduler_type: greedy", "expected one of linear, cosine"),
        ("loss_type: []", "loss_type: expected at least one loss"),
        ("loss_type: [1]", "loss_type: expected a list (a text each), got [1]"),
        ("loss_weights: [1, 2]", "expected one weight for each entry of loss_type, 1, got 2"),
        ("loss_weights: [-1]", "loss_weights: expected a number of at least 0, got -1.0"),
        ("loss_weights: [0]", "loss_weights: expected at least one weight above 0"),
        ("loss_type: exo_pair", "loss_type: exo_pair needs a label_smoothing above 0"),
        ("lr_scheduler_kwargs: [1]", "expected a mapping (JSON on the command line) or none"),
        ("lr_scheduler_kwargs: {a: 1}", "the linear schedule takes no options, not a"),
        ("lora_r: 0", "lora_r: expected a whole number of at least 1, got 0"),
        ("lora_dropout: 1", "expected a number of at least 0 and less than 1, got 1.0"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(text, expected, tmp_path):
    path = write(tmp_path / "run.yaml", f"# a comment\n{text}\n")
    message = fails(path)
    assert expected in message
    assert message.startswith(f"{path}, line 2: {text.split(':')[0]}: ")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "the warmup_stable_decay schedule needs num_decay_steps",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "the cosine_with_min_lr schedule needs either min_lr or min_lr_rate",
        ),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-7, "min_lr_rate": 0.1},
            },
            "needs either min_lr or min_lr_rate",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"power": 2}},
            "the cosine schedule takes num_cycles, not power",
        ),
        (
            {"overwrite_output_dir": True, "resume_from_checkpoint": True},
            "overwrite_output_dir: cannot go with resume_from_checkpoint",
        ),
        (
            {"eval_strategy": "steps", "dataset_name": "pairs.jsonl"},
            "expected the data to evaluate on, since pairs.jsonl is one file without a test split",
        ),
        ({"do_eval": True, "dataset_name": "pairs.csv"}, "pairs.csv is one file"),
    ],
)
def test_values_that_do_not_fit_together(values, expected):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**values)
    assert expected in str(caught.value)


def test_evaluation_source():
    def source(**values: Any) -> Any:
        return TrainConfig(**values).eval_source

    assert source(dataset_name="pairs.jsonl") is None
    assert source(dataset_name="hub/name", eval_on_start=True) == ("hub/name", "test")
    part = "train[90%:]"
    assert source(dataset_name="a.jsonl", do_eval=True, dataset_test_split=part) == (
        "a.jsonl",
        part,
    )
    other = {"eval_dataset_name": "b.jsonl", "eval_strategy": "epoch", "dataset_name": "a.jsonl"}
    assert source(**other) == ("b.jsonl", "train")
    assert source(**other, dataset_test_split=part) == ("b.jsonl", part)
    other["eval_dataset_name"] = "hub/other"
    assert source(**other) == ("hub/other", "test")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, None),
        (["all-linear"], "all-linear"),
        (["q_proj"], ["q_proj"]),
        (["model.layers.0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ],
)
def test_lora_targets_as_peft_reads_them(names, expected):
    assert TrainConfig(lora_target_modules=names).lora_targets == expected


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("bta", "beta"),
        ("learning_rates", "learning_rate"),
        ("lr", "learning_rate"),
        ("model", "model_name_or_path"),
        ("batch_size", "per_device_train_batch_size"),
        ("epochs", "num_train_epochs"),
        ("cutoff_len", "max_length"),
        ("dataset", "dataset_name"),
        ("sync_refmodel", "sync_ref_model"),
        ("no_beta", "beta"),
    ],
)
def test_unknown_key_names_the_nearest(name, nearest, tmp_path):
    path = write(tmp_path / "run.yaml", f"\n{name}: 1\n")
    expected = f"unknown key {name}; the nearest known key is {nearest}"
    assert fails(path) == f"{path}, line 2: {expected}"
    assert fails(f"--{name}") == f"--{name}: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beta: 0.1\nbeta: 0.2\n", ", line 2: beta was already given at "),
        ("max_steps: 1\nmax-steps: 2\n", ", line 2: max_steps was already given at "),
        ("- beta\n", ": expected a mapping of keys to values, one a line"),
        ("beta: [0.1\n", ": expected YAML ("),
        ("beta: 0.1\n\tseed: 1\n", ", line 2: expected YAML ("),
        ("beta: \x07\n", ": expected YAML (a character that YAML does not allow)"),
        ("seed: !!python/object/apply:os.getpid []\n", ", line 1: expected YAML ("),
    ],
)
def test_a_file_that_is_no_configuration(text, expected, tmp_path):
    path = write(tmp_path / "run.yaml", text)
    message = fails(path)
    assert message.startswith(path)
    assert expected in message


def test_files_that_cannot_be_read(tmp_path):
    missing = str(tmp_path / "none.yaml")
    assert fails(missing) == (
        f"{missing}: cannot read the configuration file (No such file or directory)"
    )
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    assert "expected UTF-8 text" in fails(str(tmp_path / "latin.yaml"))
    empty = write(tmp_path / "empty.yaml", "# nothing\n")
    assert TrainConfig.parse([empty]) == TrainConfig()
    assert TrainConfig.parse(["--config", empty]) == TrainConfig()
    assert "expected one configuration file, got 2" in fails(empty, "--config", empty)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--beta", "--beta: expected a value after it"),
        ("--beta --seed 1", "--beta: expected a value after it"),
        ("--run_name --beta=0.3", "--run_name: expected a value after it"),
        ("--beta 0.1 0.2", "--beta: expected one value, got 2: 0.1 0.2"),
        ("--loss_type", "--loss_type: expected a value after it"),
        ("--config", "--config: expected a value after it"),
        ("--no_bf16 true", "--no_bf16: takes no value, got true"),
        ("--use_peft run.yaml", "--use_peft: expected true or false, got run.yaml"),
        ("--lr_scheduler_kwargs {a", "--lr_scheduler_kwargs: expected a mapping (JSON on"),
        ("--beta x", "--beta: expected a number, got x"),
        ("--", "--: unknown key "),
    ],
)
def test_wrong_flags(arguments, expected):
    assert fails(*arguments.split()).startswith(expected)


def test_errors_are_the_users():
    assert issubclass(ConfigError, FastDPOError)
    with pytest.raises(ConfigError, match=r"^beta: expected a number greater than 0, got -1.0$"):
        TrainConfig(beta=-1)


def test_require():
    TrainConfig(model_name_or_path="m").require("model_name_or_path")
    with pytest.raises(ConfigError, match=r"^dataset_name: expected a value \(--dataset_name"):
        TrainConfig(model_name_or_path="m").require("model_name_or_path", "dataset_name")
