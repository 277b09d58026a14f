"""transformers' and accelerate's keys of many devices are read as ours, or refused by name."""

import json
from typing import Any

import pytest
import yaml

from fastdpo.config import TrainConfig
from fastdpo.config.accelerate import _TOGETHER, FILE_KEYS, SHIPPED, of_accelerate_config
from fastdpo.config.files import Given
from fastdpo.config.parallel_peers import (
    ACCELERATOR_OPTIONS,
    FSDP_OPTIONS,
    MESH_OPTIONS,
    SIZES,
    of_fsdp_config,
)
from fastdpo.errors import ConfigError

FSDP, HSDP = {"data_parallel": "fsdp"}, {"data_parallel": "hsdp"}
CHECKPOINTED = {"gradient_checkpointing": True}

FSDP_FILE = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: false
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_version: 2
machine_rank: 0
main_process_ip: null
main_process_port: 29501
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 4
parallelism_config:
  parallelism_config_cp_size: 2
  parallelism_config_dp_replicate_size: 2
  parallelism_config_dp_shard_size: 1
  parallelism_config_tp_size: 1
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def read(**values: Any) -> dict[str, Any]:
    """The keys of ours that are not as by default, from Python values and from flags alike."""
    config = TrainConfig.from_dict(values, place="here")
    flags = [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in values.items()]
    assert TrainConfig.parse(flags) == config
    return config.changed()


def refused(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(values, place="here")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (True, FSDP),
        ("true", FSDP),
        ("full_shard", FSDP),
        ("full_shard auto_wrap", FSDP),
        (["full_shard", "auto_wrap"], FSDP),
        ("auto_wrap", FSDP),
        ("hybrid_shard auto_wrap", HSDP),
        ("no_shard", {"data_parallel": "replicate"}),
        (False, {}),
        ("", {}),
        ([], {}),
        (None, {}),
    ],
)
def test_fsdp_is_data_parallel(value, meant):
    assert read(fsdp=value) == meant


def test_fsdp_takes_no_value_as_a_flag():
    assert TrainConfig.parse(["--fsdp"]).data_parallel == "fsdp"
    assert TrainConfig.parse(["--no_fsdp"]).data_parallel == "auto"
    assert TrainConfig.parse(["--fsdp", "--data_parallel", "hsdp"]).data_parallel == "hsdp"


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({}, {}),
        ({"version": 2, "reshard_after_forward": True}, {}),
        ({"fsdp_version": 1, "fsdp_reshard_after_forward": "HYBRID_SHARD"}, HSDP),
        ({"sharding_strategy": 4}, HSDP),
        ({"sharding_strategy": "FULL_SHARD", "use_orig_params": False}, {}),
        ({"activation_checkpointing": True}, {}),
        ({"activation_checkpointing": "true", "xla": False, "min_num_params": 0}, {}),
        ({"activation_checkpointing_offload": True}, {"activation_offloading": True}),
        ({"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "MixtralDecoderLayer"]}, {}),
        ({"transformer_layer_cls_to_wrap": "GPT2Block, GPTNeoXLayer"}, {}),
        ({"cpu_ram_efficient_loading": True, "state_dict_type": "SHARDED_STATE_DICT"}, {}),
    ],
)
def test_options_of_fsdp(options, meant, tmp_path):
    assert read(fsdp=True, fsdp_config=options) == {**FSDP, **meant}
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps(options))
    assert read(fsdp=True, fsdp_config=str(path)) == {**FSDP, **meant}


def test_fsdp_that_checkpoints_turns_gradient_checkpointing_on():
    fsdp = {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}
    assert TrainConfig.from_dict({**fsdp, "gradient_checkpointing": False}).gradient_checkpointing
    fsdp["fsdp_config"] = {"activation_checkpointing": False}
    assert not TrainConfig.from_dict(
        fsdp | {"gradient_checkpointing": False}
    ).gradient_checkpointing


@pytest.mark.parametrize(
    ("sizes", "meant"),
    [
        ({"dp_shard_size": 8}, FSDP),
        ({"dp_replicate_size": 8}, {"data_parallel": "replicate"}),
        ({"dp_replicate_size": 2, "dp_shard_size": 4}, {**HSDP, "dp_replicate_size": 2}),
        ({"dp_shard_size": 4, "cp_size": 2}, {**FSDP, "cp_size": 2}),
        ({"dp_replicate_size": 4, "sp_size": 2}, {**HSDP, "dp_replicate_size": 4, "cp_size": 2}),
        ({"dp_shard_size": "8", "tp_size": 1, "cp_backend": "torch"}, FSDP),
        ({"dp_shard_size": 1}, {}),
    ],
)
def test_a_mesh_is_read(sizes, meant):
    assert read(parallelism_config=sizes, devices=8) == {"devices": 8, **meant}
    refined = {"data_parallel": "fsdp", **meant, "devices": 8}
    if meant != {"data_parallel": "replicate"}:
        assert read(fsdp=True, parallelism_config=sizes, devices=8) == refined


def test_a_mesh_of_accelerate_itself_is_read():
    from accelerate.parallelism_config import ParallelismConfig

    mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    config = TrainConfig.from_dict({"parallelism_config": mesh, "devices": 4})
    assert config.changed() == {"devices": 4, "data_parallel": "hsdp", "dp_replicate_size": 2}


def test_a_mesh_is_for_the_processes_that_there_are(monkeypatch):
    sizes = {"dp_replicate_size": 2, "dp_shard_size": 4}
    assert refused(parallelism_config=sizes) == (
        "here: parallelism_config: its sizes multiply to 8 processes, and devices is 1"
    )
    assert "devices is 3" in refused(parallelism_config=sizes, devices=3)
    assert read(parallelism_config=sizes, devices=4)["data_parallel"] == "hsdp"  # of two hosts
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert read(parallelism_config=sizes)["dp_replicate_size"] == 2
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert "WORLD_SIZE is 6" in refused(parallelism_config=sizes)


def test_the_rank_of_an_old_launcher_passes(monkeypatch):
    assert "expected LOCAL_RANK" in refused(local_rank=0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert read(local_rank=3) == {}
    assert "expected LOCAL_RANK" in refused(local_rank=2)


def test_a_file_of_accelerates(tmp_path):
    path = tmp_path / "fsdp.yaml"
    path.write_text(FSDP_FILE)
    meant = {**HSDP, "dp_replicate_size": 2, "cp_size": 2, "devices": 4, "bf16": True}
    assert read(accelerate_config=str(path)) == meant
    as_json = tmp_path / "fsdp.json"
    as_json.write_text(json.dumps(yaml.safe_load(FSDP_FILE)))
    assert read(accelerate_config=str(as_json)) == meant
    config = TrainConfig.parse(["--accelerate_config", str(path), "--devices", "8", "--no_bf16"])
    assert (config.devices, config.bf16) == (8, False)
    assert config.origins["data_parallel"] == f"{path}, line 22"
    assert config.origins["cp_size"] == f"{path}, line 22"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("num_processes: 2", "expected a distributed_type, as accelerate does"),
        ("distributed_type: XLA", "XLA is not honoured. Expected one of NO, MULTI_GPU, MULTI_CPU"),
        ("distributed_type: [FSDP]", "line 1: distributed_type: [FSDP] is not honoured"),
        (
            "distributed_type: NO\nfsdp_config: {fsdp_version: 2}",
            "line 2: fsdp_config does nothing",
        ),
        ("distributed_type: NO\nmixed_precision: fp16", "fp16 is not honoured. Use bf16."),
        ("distributed_type: FSDP\nnum_processes: many", "line 2: num_processes: expected a whole"),
        ("distributed_type: FSDP\ndynamo_config: {dynamo_backend: EAGER}", "backend: EAGER is not"),
        (
            "distributed_type: FSDP\nnum_processes: 4\nparallelism_config: {dp_shard_size: 8}",
            "its sizes multiply to 8 processes, and num_processes is 4",
        ),
    ],
)
def test_what_a_file_of_accelerates_may_not_say(lines, expected, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(lines)
    message = refused(accelerate_config=str(path))
    assert message.startswith(str(path))
    assert expected in message


def test_what_a_file_of_accelerates_may_leave_open(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("distributed_type: NO\nmixed_precision: no\nnum_processes: 1\n")
    assert read(accelerate_config=str(path)) == {}
    path.write_text("distributed_type: MULTI_CPU\ndynamo_config: {dynamo_backend: INDUCTOR}\n")
    meant = {"data_parallel": "replicate", "use_cpu": True, "torch_compile": True}
    assert read(accelerate_config=str(path)) == meant


@pytest.mark.parametrize("name", SHIPPED)
def test_the_files_that_trl_ships(name, tmp_path):
    """What stands here under a name is what the installed TRL's file says."""
    from importlib import resources

    text = resources.files("trl.accelerate_configs").joinpath(f"{name}.yaml").read_text()
    path = tmp_path / "there.yaml"
    path.write_text(text)
    if name.startswith("zero"):
        with pytest.raises(
            ConfigError, match=r"^zero\d: distributed_type: DEEPSPEED is not h.*fsdp"
        ):
            TrainConfig.from_dict({"accelerate_config": name})
        assert "there.yaml, line " in refused(accelerate_config=str(path))
        return
    there = of_accelerate_config("accelerate_config", Given(str(path), "here"))
    here = of_accelerate_config("accelerate_config", Given(name, "here"))
    assert {k: v.value for k, v in here.items()} == {k: v.value for k, v in there.items()}
    spread = {"single_gpu": "auto", "multi_gpu": "replicate"}.get(name, "fsdp")
    config = TrainConfig.parse(["--accelerate_config", name])
    assert (config.data_parallel, config.bf16) == (spread, True)
    assert config.devices == (None if name == "single_gpu" else 8)


def test_fsdp_of_the_trainer_wins_over_a_launcher_of_many_processes():
    assert read(accelerate_config="multi_gpu", fsdp="full_shard") == {
        "data_parallel": "fsdp",
        "devices": 8,
        "bf16": True,
    }
    assert "asks for data_parallel replicate" in refused(accelerate_config="fsdp2", fsdp="no_shard")


def test_a_file_for_several_machines_names_torchrun(tmp_path, monkeypatch):
    path = tmp_path / "two.yaml"
    text = "distributed_type: FSDP\nnum_processes: 16\nnum_machines: 2\nmachine_rank: 1\n"
    path.write_text(text + "main_process_ip: 10.0.0.1\n")
    assert refused(accelerate_config=str(path)) == (
        f"{path}, line 3: num_machines is 2: on each machine, start torchrun --nnodes 2 "
        "--nproc_per_node 8 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 "
        "-m fastdpo train"
    )
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert read(accelerate_config=str(path)) == FSDP


def test_tables_are_those_of_the_installed_accelerate_and_transformers():
    from dataclasses import fields

    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers.trainer_pt_utils import AcceleratorConfig

    def names(kind: type) -> set[str]:
        return {item.name for item in fields(kind)}

    assert names(ClusterConfig) == {*FILE_KEYS, *_TOGETHER}
    assert names(AcceleratorConfig) == set(ACCELERATOR_OPTIONS)
    assert names(ParallelismConfig) <= set(MESH_OPTIONS)
    assert set(SIZES) <= names(ParallelismConfig)
    in_python = {"fsdp_version", "param_init_fn", "state_dict_config", "optim_state_dict_config"}
    assert names(FullyShardedDataParallelPlugin) - set(FSDP_OPTIONS) <= in_python


@pytest.mark.parametrize("option", FSDP_OPTIONS)
def test_every_option_of_fsdp_refuses_what_it_does_not_know(option):
    peer = FSDP_OPTIONS[option]
    given = Given({f"fsdp_{option}": "something else"}, "here")
    with pytest.raises(ConfigError) as caught:
        of_fsdp_config("fsdp_config", given)
    assert str(caught.value) == (
        f"here: fsdp_config: {option}: something else is not honoured. {peer.instead}"
    )
    for value in (peer.default, *peer.also):
        assert of_fsdp_config("fsdp_config", Given({option: value}, "here")) == {}
