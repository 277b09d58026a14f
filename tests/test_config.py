"""The configuration: keys are frozen, what is saved reads back equal, the table is readable."""

from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from fastdpo.config import TrainConfig
from fastdpo.config.declare import GROUPS, default_of
from fastdpo.errors import ConfigError

OWN_DEFAULTS: dict[str, Any] = {
    "model_name_or_path": None,
    "model_revision": "main",
    "dtype": "float32",
    "trust_remote_code": False,
    "attn_implementation": None,
    "use_liger_kernel": False,
    "gradient_checkpointing": True,
    "memory": "manual",
    "gradient_checkpointing_every": 1,
    "activation_offloading": False,
    "layer_tile_tokens": None,
    "devices": None,
    "data_parallel": "auto",
    "dp_replicate_size": None,
    "cp_size": 1,
    "head_parallel": "auto",
    "global_batch_size": None,
    "ddp_timeout": 1800,
    "dataset_name": None,
    "dataset_config": None,
    "datasets": [],
    "dataset_streaming": False,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "dataset_num_proc": None,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "ref_model_name_or_path": None,
    "precompute_ref_log_probs": None,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": 0.05,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "cpo_alpha": None,
    "simpo_gamma": 0.5,
    "alpha": 0.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "max_completion_length": None,
    "eval_dataset_name": None,
    "layout": None,
    "columns": None,
    "skip_bad_rows": False,
    "check_data": True,
    "max_comparisons_per_group": None,
    "convert": None,
    "shuffle": None,
    "group_prompts": True,
    "share_prefix": True,
    "max_tokens_per_batch": None,
    "attention_backend": None,
    "head_workspace_mib": None,
    "reference_cache_dir": None,
    "profile_steps": 0,
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "lora_modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
    "load_in_4bit": False,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": False,
    "bnb_4bit_quant_storage": None,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "optimizer_offload": False,
    "optimizer_in_backward": False,
    "stochastic_rounding": False,
    "bf16": None,
    "tf32": None,
    "torch_compile": False,
    "use_cpu": False,
    "seed": 42,
    "data_seed": None,
    "do_eval": False,
    "eval_strategy": "no",
    "eval_steps": None,
    "eval_on_start": None,
    "per_device_eval_batch_size": 8,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "early_stopping_patience": None,
    "early_stopping_threshold": 0.0,
    "logging_steps": 10,
    "logging_first_step": False,
    "report_to": [],
    "run_name": None,
    "project": "huggingface",
    "logging_dir": None,
    "trackio_space_id": None,
    "trackio_bucket_id": None,
    "report": True,
    "report_samples": 4,
    "disable_tqdm": None,
    "output_dir": "trainer_output",
    "overwrite_output_dir": False,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "save_only_model": False,
    "resume_from_checkpoint": None,
    "resume_with_changes": False,
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_strategy": "every_save",
    "hub_token": None,
    "hub_private_repo": None,
    "hub_always_push": False,
    "hub_revision": None,
}


def test_keys_and_defaults_are_frozen():
    found = {name: default_of(declared) for name, declared in TrainConfig.key_fields().items()}
    assert found == OWN_DEFAULTS
    assert TrainConfig().to_dict() == OWN_DEFAULTS
    assert {name: type(value) for name, value in TrainConfig().to_dict().items()} == {
        name: type(value) for name, value in OWN_DEFAULTS.items()
    }


def test_every_key_has_a_group_and_a_sentence():
    for name, declared in TrainConfig.key_fields().items():
        assert declared.metadata["group"] in GROUPS, name
        assert declared.metadata["help"].endswith("."), name


def test_saved_configuration_reads_back_equal(tmp_path):
    config = TrainConfig(
        model_name_or_path="~/models/tiny",
        run_name="a: b # c 'd' \"e\" ü\n\tx",
        learning_rate=1.2345678901234567e-7,
        loss_type=["sigmoid", "ipo"],
        loss_weights=[1, 0.1],
        lr_scheduler_type="cosine",
        lr_scheduler_kwargs={"num_cycles": 0.5},
        resume_from_checkpoint=True,
        bf16=False,
        max_length=None,
        save_steps=0.1,
    )
    config.save(tmp_path / "config.yaml")
    again = TrainConfig.load(tmp_path / "config.yaml")
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert again.to_yaml() == config.to_yaml()
    assert set(yaml.safe_load(config.to_yaml())) == set(OWN_DEFAULTS)


@example(run_name="\u00e9\x85\u2028", beta=0.1, share=1, seed=0, modules=None, flag=None).via(
    "line breaks that are not ASCII"
)
@given(
    run_name=st.none()
    | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30),
    beta=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    share=st.floats(min_value=0, max_value=1, exclude_min=True) | st.integers(1, 10**9),
    seed=st.integers(0, 2**32 - 1),
    modules=st.none() | st.lists(st.sampled_from(["q", "no", "null", "1", "~", "1e3"])),
    flag=st.none() | st.booleans(),
)
def test_any_configuration_survives_yaml(tmp_path_factory, **values):
    config = TrainConfig(
        run_name=values["run_name"],
        beta=values["beta"],
        save_steps=values["share"],
        seed=values["seed"],
        lora_target_modules=values["modules"],
        bf16=values["flag"],
    )
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    config.save(path)
    assert TrainConfig.load(path) == config


def test_describe_shows_changes_first_with_their_origin(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 7\nbeta: 0.3\nmax_length: 1024\n", encoding="utf-8")
    config = TrainConfig.parse([str(path), "--max_steps", "50", "--num_train_epochs", "2"])
    lines = config.choose("chosen for the device", max_tokens_per_batch=8192).describe().split("\n")
    rows = [line.split(None, 2) for line in lines]
    assert rows[:5] == [
        ["beta", "0.3", f"{path}, line 2"],
        ["max_tokens_per_batch", "8192", "chosen for the device"],
        ["num_train_epochs", "2.0", "--num_train_epochs"],
        ["max_steps", "50", "--max_steps"],
        ["seed", "7", f"{path}, line 1"],
    ]
    assert lines[5] == ""
    assert ["max_length", "1024", f"{path}, line 3"] in rows[6:]
    assert ["lora_r", "16", "default"] in rows[6:]
    assert sorted(row[0] for row in rows if row) == sorted(OWN_DEFAULTS)


def test_describe_of_the_changes_alone():
    assert TrainConfig().describe(defaults=False) == ""
    assert TrainConfig(beta=0.2).describe(defaults=False) == "beta  0.2  given"


@pytest.mark.parametrize(
    ("values", "idle"),
    [
        ({"lora_r": 8}, "lora_r has no effect: use_peft is false"),
        (
            {"max_steps": 50, "num_train_epochs": 2},
            "num_train_epochs has no effect: max_steps sets the length of the run",
        ),
        ({"eval_steps": 5}, "eval_steps has no effect: eval_strategy is no"),
        (
            {"eval_strategy": "epoch", "per_device_eval_batch_size": 4},
            "per_device_eval_batch_size has no effect: evaluation is packed by",
        ),
        ({"eval_dataset_name": "x"}, "eval_dataset_name has no effect: nothing is evaluated"),
        (
            {"save_strategy": "epoch", "save_steps": 7},
            "save_steps has no effect: save_strategy is epoch",
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 3},
            "warmup_steps has no effect: the constant schedule has no warm-up",
        ),
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1 has no effect: sgd has no moments"),
        (
            {"use_bnb_nested_quant": True},
            "use_bnb_nested_quant has no effect: load_in_4bit is false",
        ),
        (
            {"precompute_ref_log_probs": False, "reference_cache_dir": "c"},
            "reference_cache_dir has no effect: precompute_ref_log_probs is false",
        ),
    ],
)
def test_settings_without_effect_are_noted(values, idle):
    (line,) = TrainConfig(**values).idle_settings()
    assert line.startswith(idle)


def test_no_note_where_everything_has_an_effect():
    config = TrainConfig(use_peft=True, lora_r=8, eval_strategy="steps", eval_steps=5)
    assert config.idle_settings() == []


@pytest.mark.parametrize(
    ("steps", "total", "expected"), [(10, 7, 10), (0.25, 10, 3), (0.001, 5, 1)]
)
def test_intervals(steps, total, expected):
    config = TrainConfig(logging_steps=steps)
    assert config.interval("logging_steps", total) == expected
    assert config.interval("eval_steps", total) == expected
    assert TrainConfig(save_steps=steps).interval("save_steps", total) == expected


@pytest.mark.parametrize("warmup", [0, 1, 7, 0.1, 0.999])
def test_warmup_is_that_of_transformers(warmup, tmp_path):
    from transformers import TrainingArguments

    theirs = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup, report_to="none")
    for total in (1, 10, 33):
        assert TrainConfig(warmup_steps=warmup).warmup(total) == theirs.get_warmup_steps(total)


def test_choose_keeps_checks_and_origins():
    config = TrainConfig.parse(["--beta", "0.2"])
    chosen = config.choose("measured", bf16=True)
    assert (chosen.bf16, chosen.beta) == (True, 0.2)
    assert chosen.origins == {"beta": "--beta", "bf16": "measured"}
    with pytest.raises(ConfigError, match="measured: max_tokens_per_batch: expected a whole"):
        config.choose("measured", max_tokens_per_batch=0)
