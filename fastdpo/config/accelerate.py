"""accelerate's configuration files, which TRL's command lines take as `--accelerate_config FILE`.

Such a file says how many processes to start and how the model is spread over them: our `devices`
and `data_parallel`.
"""

import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .files import Given, read_json, read_yaml
from .parallel_peers import check_mesh, of_fsdp_config, of_parallelism_config, together
from .peer_key import Meant, PeerKey, not_honoured, read_options, refusal
from .replaced import GPU_BF16
from .values import convert, show_short

_TYPES: dict[str, dict[str, Any]] = {
    "NO": {},
    "MULTI_GPU": {"data_parallel": "replicate"},
    "MULTI_CPU": {"data_parallel": "replicate", "use_cpu": True},
    "FSDP": {"data_parallel": "fsdp"},
}
_SHARDED = "Use data_parallel: fsdp, which shards as ZeRO's stage 3 does."
_REFUSED = {
    "DEEPSPEED": _SHARDED,
    "MEGATRON_LM": "Use data_parallel: fsdp, which shards every layer too.",
}
_TPU = "TPUs are not supported."
_SWITCHED_OFF: tuple[Any, ...] = (None, False, "no", {}, [], "")
_COMPILE = "torch_compile: true compiles with torch's default backend and mode."
DYNAMO_OPTIONS: dict[str, PeerKey] = {
    "backend": PeerKey("NO", _COMPILE, also=("no",), means={"inductor": ("torch_compile", True)}),
    "mode": PeerKey("default", _COMPILE, also=(None,)),
    "use_fullgraph": PeerKey(False, _COMPILE),
    "use_dynamic": PeerKey(True, _COMPILE, also=(False,)),
    "use_regional_compilation": PeerKey(True, _COMPILE, also=(False,)),
}
"""Options of `dynamo_config`, after `dynamo_`."""


def _of_dynamo(name: str, given: Given) -> Meant:
    return read_options(name, given, DYNAMO_OPTIONS, "dynamo_")[0]


FILE_KEYS: dict[str, PeerKey] = {
    "compute_environment": PeerKey("LOCAL_MACHINE", "Start torchrun on each machine."),
    "debug": PeerKey(False, "Set TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment."),
    "mixed_precision": PeerKey("no", GPU_BF16, also=(None, False), means={"bf16": ("bf16", True)}),
    "use_cpu": PeerKey(False, "Use use_cpu.", means={"true": ("use_cpu", True)}),
    "gpu_ids": PeerKey("all", "Set CUDA_VISIBLE_DEVICES in the environment.", also=(None,)),
    "enable_cpu_affinity": PeerKey(False, "Start the run under numactl."),
    "main_training_function": PeerKey("main", "It is for notebooks.", also=(None,)),
    "rdzv_backend": PeerKey("static", "Use torchrun's --rdzv_backend.", also=("c10d", None, "")),
    "same_network": PeerKey(True, "Use torchrun's own flags.", also=(False, None)),
    "dynamo_config": PeerKey(None, "Use torch_compile.", also=({},), read=_of_dynamo),
    "fp8_config": PeerKey(None, GPU_BF16, also=_SWITCHED_OFF),
    "megatron_lm_config": PeerKey(None, _REFUSED["MEGATRON_LM"], also=_SWITCHED_OFF),
    "mpirun_config": PeerKey(None, "Start processes with devices or torchrun.", also=_SWITCHED_OFF),
    **{
        name: PeerKey(None, _TPU, also=_SWITCHED_OFF)
        for name in ("downcast_bf16", "tpu_name", "tpu_zone", "tpu_vm", "tpu_env", "tpu_use_sudo")
    },
    **{
        name: PeerKey(None, _TPU, also=_SWITCHED_OFF)
        for name in ("tpu_use_cluster", "command_file", "commands")
    },
}
"""accelerate's `ClusterConfig`, but for the keys that are read together."""
_TOGETHER = (
    "distributed_type",
    "fsdp_config",
    "deepspeed_config",
    "parallelism_config",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
)

_EIGHT = {"num_processes": 8, "mixed_precision": "bf16"}
SHIPPED: dict[str, dict[str, Any]] = {
    "single_gpu": {"distributed_type": "NO", **_EIGHT},
    "multi_gpu": {"distributed_type": "MULTI_GPU", **_EIGHT},
    "fsdp1": {"distributed_type": "FSDP", **_EIGHT},
    "fsdp2": {"distributed_type": "FSDP", **_EIGHT},
    "zero1": {"distributed_type": "DEEPSPEED", **_EIGHT},
    "zero2": {"distributed_type": "DEEPSPEED", **_EIGHT},
    "zero3": {"distributed_type": "DEEPSPEED", **_EIGHT},
}
"""What the files say that TRL ships and knows by their names."""


def of_accelerate_config(name: str, given: Given) -> Meant:
    """What a file of accelerate's, or one of TRL's by its name, asks for.

    Raises:
        ConfigError: not there, not of accelerate's, or a key that is not honoured.
    """
    entries = _entries(name, given)
    for key, entry in entries.items():
        if key not in FILE_KEYS and key not in _TOGETHER:
            raise ConfigError(f"{entry.place}: {key} is no key of accelerate's that is known here")
    meant: Meant = {}
    for key, peer in FILE_KEYS.items():
        if key in entries:
            meaning = peer.meaning(key, entries[key])
            if meaning is None:
                raise not_honoured(key, entries[key], peer)
            meant |= meaning
    return meant | _spread(entries, given) | _processes(entries)


def _entries(name: str, given: Given) -> dict[str, Given]:
    if not isinstance(given.value, str):
        expected = f"expected the path of a file, got {show_short(given.value)}"
        raise refusal(name, given, expected)
    path = Path(given.value)
    if given.value in SHIPPED and not path.exists():
        return {key: Given(value, given.value) for key, value in SHIPPED[given.value].items()}
    if path.suffix != ".json":
        if not path.expanduser().exists():
            expected = f"expected a file, or one of {', '.join(SHIPPED)}"
            raise refusal(name, given, f"{expected}, got {show_short(given.value)}")
        return read_yaml(path)
    read = read_json(path)
    if not isinstance(read, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return {key: Given(value, str(path)) for key, value in read.items()}


def _spread(entries: dict[str, Given], given: Given) -> Meant:
    """`data_parallel` and what goes with it."""
    kind = entries.get("distributed_type")
    if kind is None:
        raise ConfigError(f"{given.value}: expected a distributed_type, as accelerate does")
    name = "NO" if kind.value is False else str(kind.value)  # NO is false in YAML
    if name not in _TYPES:
        instead = _REFUSED.get(name, f"Expected one of {', '.join(_TYPES)}.")
        raise not_honoured("distributed_type", kind, PeerKey(None, instead))
    meant = {own: Given(value, kind.place) for own, value in _TYPES[name].items()}
    for key in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        entry = entries.get(key)
        if entry is None or entry.value in (None, {}):
            continue
        if name != "FSDP":
            does = f"does nothing with distributed_type {name}: remove it"
            raise ConfigError(f"{entry.place}: {key} {does}")
        if key == "deepspeed_config":
            raise not_honoured(key, entry, PeerKey(None, _SHARDED))
        read = of_fsdp_config if key == "fsdp_config" else of_parallelism_config
        for own, value in read(key, entry).items():
            meant[own] = together(own, meant.get(own), value)
    if (mesh := entries.get("parallelism_config")) and "num_processes" in entries:
        check_mesh(mesh, entries["num_processes"].value, "num_processes")
    return meant


def _processes(entries: dict[str, Given]) -> Meant:
    """`devices`, of one machine; torchrun starts the processes of several."""
    counts = {}
    for key, least in (("num_processes", -1), ("num_machines", 1), ("machine_rank", 0)):
        entry = entries.get(key, Given(least, ""))
        try:
            counts[key] = convert(entry.value, int)
        except ValueError:
            counts[key] = least - 1
        if counts[key] < least:
            expected = f"expected a whole number, got {show_short(entry.value)}"
            raise ConfigError(f"{entry.place}: {key}: {expected}")
    processes, machines = counts["num_processes"], counts["num_machines"]
    if machines == 1:
        if processes < 2 or entries["distributed_type"].value in ("NO", False):
            return {}
        return {"devices": Given(processes, entries["num_processes"].place)}
    if os.environ.get("WORLD_SIZE") == str(processes):
        return {}
    raise ConfigError(
        f"{entries['num_machines'].place}: num_machines is {machines}: on each machine, start "
        f"torchrun --nnodes {machines} --nproc_per_node {max(1, processes // machines)} "
        f"--node_rank {counts['machine_rank']} --master_addr "
        f"{_said(entries, 'main_process_ip', 'ADDRESS')} --master_port "
        f"{_said(entries, 'main_process_port', '29500')} -m fastdpo train"
    )


def _said(entries: dict[str, Given], key: str, otherwise: str) -> str:
    value = entries[key].value if key in entries else None
    return otherwise if value is None else show_short(value)
