"""TRL's configuration files work, and what is not honoured or gone is refused by name."""

import inspect
from dataclasses import MISSING, fields
from typing import Any

import pytest
import yaml

from fastdpo.config import TrainConfig
from fastdpo.config.optimizer import OPTIMIZERS
from fastdpo.config.peers import PEER_KEYS
from fastdpo.config.replaced import OTHER_NAMES, REPLACED_KEYS
from fastdpo.config.schedule import SCHEDULERS
from fastdpo.errors import ConfigError

OWN_DEFAULTS = TrainConfig().to_dict()

NOT_IN_TRL = {
    "early_stopping_patience",
    "early_stopping_threshold",
    "logging_dir",
    "devices",
    "data_parallel",
    "dp_replicate_size",
    "cp_size",
    "head_parallel",
    "global_batch_size",
    "profile_steps",
    "resume_with_changes",
    "gradient_checkpointing_every",
    "layer_tile_tokens",
    "memory",
    "optimizer_offload",
    "optimizer_in_backward",
    "stochastic_rounding",
    "ref_model_name_or_path",
    "eval_dataset_name",
    "skip_bad_rows",
    "check_data",
    "max_comparisons_per_group",
    "convert",
    "layout",
    "columns",
    "shuffle",
    "epsilon",
    "epsilon_high",
    "scale_rewards",
    "importance_sampling_level",
    "group_prompts",
    "share_prefix",
    "max_tokens_per_batch",
    "attention_backend",
    "head_workspace_mib",
    "reference_cache_dir",
    "overwrite_output_dir",
    "report",
    "report_samples",
}

OTHER_DEFAULT_THAN_TRL = {
    "precompute_ref_log_probs": False,
    "eval_on_start": False,
    # TRL resolves both to ours after parsing.
    "output_dir": None,
    "report_to": "none",
}

TRL_YAML = """\
# Model arguments
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dtype: bfloat16
attn_implementation: null
use_peft: true
lora_r: 32
lora_target_modules: [q_proj, v_proj]

# Data
dataset_name: trl-lib/ultrafeedback_binarized
dataset_num_proc: 4
remove_unused_columns: false

# Training
do_train: true
learning_rate: 5e-7
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-8}
warmup_steps: 0.1
eval_strategy: no
eval_steps: 50
padding_free: true
fp16: false
beta: 0.05
loss_type: sigmoid
report_to: none
push_to_hub: false
output_dir: Qwen2-0.5B-DPO
"""


OTHER_DEFAULTS_OF_A_TRAINER = {
    "DPOConfig": {},
    "KTOConfig": {"loss_type": "kto", "train_sampling_strategy": "sequential"},
    "ORPOConfig": {},
    "CPOConfig": {"loss_type": "sigmoid", "cpo_alpha": 1.0},
}
"""Where TRL's trainers differ from each other, or in how they say what a list of ours says."""


def defaults_of(trainer: str) -> dict[str, Any]:
    """Every key of a TRL command line with its default, read from the installed release."""
    import trl
    from trl import ModelConfig, ScriptArguments
    from trl.experimental import cpo, orpo
    from trl.scripts.utils import DatasetMixtureConfig

    kinds = {"CPOConfig": cpo, "ORPOConfig": orpo}
    own = getattr(kinds.get(trainer, trl), trainer)
    found: dict[str, Any] = {}
    for kind in (own, ModelConfig, ScriptArguments, DatasetMixtureConfig):
        for item in fields(kind):
            made = item.default_factory() if item.default_factory is not MISSING else item.default
            found[item.name] = made
    return found


@pytest.fixture(scope="module")
def trl_defaults() -> dict[str, Any]:
    """Every key of TRL's command lines with its default, that of DPO where they differ."""
    found: dict[str, Any] = {}
    for trainer in reversed(OTHER_DEFAULTS_OF_A_TRAINER):
        found |= defaults_of(trainer)
    return found | {"cpo_alpha": None}


SINCE_TRANSFORMERS_5_23 = {"activation_checkpointing", "activation_checkpointing_kwargs"}


def fails(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse(arguments)
    return str(caught.value)


def test_peer_table_is_that_of_the_installed_trl(trl_defaults):
    ours = set(TrainConfig.key_fields())
    assert set(trl_defaults) - ours <= set(PEER_KEYS)
    assert not set(PEER_KEYS) & ours
    assert set(PEER_KEYS) - set(trl_defaults) <= {*SINCE_TRANSFORMERS_5_23, "accelerate_config"}
    for name, peer in PEER_KEYS.items():
        if name not in trl_defaults:
            continue
        assert peer.default == trl_defaults[name], name
        assert type(peer.default) is type(trl_defaults[name]), name
        assert peer.instead.endswith("."), name


def test_shared_keys_have_trl_defaults_but_for_the_named_ones(trl_defaults):
    assert set(OWN_DEFAULTS) - set(trl_defaults) == NOT_IN_TRL
    differing = {
        name: default
        for name, default in trl_defaults.items()
        if name in OWN_DEFAULTS and OWN_DEFAULTS[name] != default
    }
    assert differing == OTHER_DEFAULT_THAN_TRL


@pytest.mark.parametrize("trainer", OTHER_DEFAULTS_OF_A_TRAINER)
def test_every_key_of_every_trainer_is_accepted_at_its_default(trainer):
    defaults = defaults_of(trainer)
    peers = {name: peer.default for name, peer in PEER_KEYS.items()}
    expected = OWN_DEFAULTS | peers | OTHER_DEFAULT_THAN_TRL | OTHER_DEFAULTS_OF_A_TRAINER[trainer]
    assert defaults == {name: expected[name] for name in defaults}
    del defaults["output_dir"]
    config = TrainConfig.from_dict(defaults)
    assert config.loss_type == {
        "KTOConfig": ["kto"],
        "CPOConfig": ["cpo"],
    }.get(trainer, ["sigmoid"])
    assert config.idle_settings() == []


def test_choices_are_names_that_transformers_knows():
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    keys = TrainConfig.key_fields()
    assert [OptimizerNames(name) for name in OPTIMIZERS]
    assert [IntervalStrategy(name) for name in keys["eval_strategy"].metadata["choices"]]
    assert [SaveStrategy(name) for name in keys["save_strategy"].metadata["choices"]]
    by_metric = {"reduce_lr_on_plateau", "greedy"}
    assert set(SCHEDULERS) | by_metric >= {kind.value for kind in SchedulerType}


def test_schedule_options_are_those_of_transformers():
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    given_by_the_trainer = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for kind, make in TYPE_TO_SCHEDULER_FUNCTION.items():
        if kind.value in SCHEDULERS:
            options = set(inspect.signature(make).parameters) - given_by_the_trainer
            assert set(SCHEDULERS[kind.value]) == options, kind


def test_replaced_keys_are_gone_everywhere(trl_defaults):
    assert not set(REPLACED_KEYS) & (set(trl_defaults) | set(OWN_DEFAULTS))
    assert set(OTHER_NAMES.values()) <= set(OWN_DEFAULTS)
    assert not set(OTHER_NAMES) & (set(trl_defaults) | set(OWN_DEFAULTS) | set(REPLACED_KEYS))


def test_trl_yaml_works(tmp_path):
    path = tmp_path / "dpo.yaml"
    path.write_text(TRL_YAML, encoding="utf-8")
    config = TrainConfig.parse([str(path), "--beta", "0.2"])
    assert config.learning_rate == 5e-7
    assert config.beta == 0.2
    assert config.loss_type == ["sigmoid"]
    assert config.report_to == []
    assert config.eval_strategy == "no"
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-8}
    assert config.lora_targets == ["q_proj", "v_proj"]
    assert config.origins["beta"] == "--beta"
    assert config.origins["dtype"].endswith("dpo.yaml, line 3")


@pytest.mark.parametrize("name", PEER_KEYS)
def test_peer_key_is_accepted_at_its_default_alone(name):
    peer = PEER_KEYS[name]
    for value in (peer.default, *peer.also):
        assert TrainConfig.from_dict({name: value}) == TrainConfig()
        text = yaml.safe_dump(value, default_flow_style=True).split("\n")[0].strip("'")
        assert TrainConfig.parse([f"--{name}={text}"]) == TrainConfig()
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({name: "something else"}, place="here")
    if peer.read is not None:
        assert str(caught.value).startswith(f"here: {name}: expected ")
        return
    assert str(caught.value).startswith(f"here: {name} is a key of TRL's that fastdpo does not")
    assert str(caught.value).endswith(peer.instead)


def test_peer_flags_may_go_without_a_value():
    accepted = "--no_remove_unused_columns --no-fp16 --padding_free --label_smoothing_factor 0e-2"
    accepted += " --fsdp none"
    assert TrainConfig.parse(accepted.split()) == TrainConfig()
    assert "its default, false" in fails("--fp16")
    assert "bf16" in fails("--fp16", "true")
    assert "its default, 0.0" in fails("--label_smoothing_factor", "0.5")
    assert "max_tokens_per_batch" in fails("--precompute_ref_batch_size", "16")


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("rpo_alpha", "loss_type: [sigmoid, sft]"),
        ("reference_free", "loss_type: cpo"),
        ("ref_model_init_kwargs", "options of the model"),
        ("model_adapter_name", "switched off"),
        ("ref_adapter_name", "switched off"),
        ("label_pad_token_id", "Nothing is padded"),
        ("max_prompt_length", "max_length"),
        ("max_target_length", "max_length"),
        ("tools", "tools column"),
        ("warmup_ratio", "warmup_steps"),
        ("evaluation_strategy", "eval_strategy"),
        ("torch_dtype", "dtype"),
        ("no_cuda", "use_cpu"),
    ],
)
def test_replaced_key_names_its_replacement(name, replacement, tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text(f"beta: 0.1\n{name}: 1\n", encoding="utf-8")
    message = fails(str(path))
    assert f"old.yaml, line 2: {name} does not exist any more" in message
    assert replacement in message
    assert replacement in fails(f"--{name}")
