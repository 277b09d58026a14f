"""What transformers' and accelerate's keys of many devices ask for, in keys of ours.

Sharding is torch's FSDP2 here too, so that most of their options describe what is done anyway, or
change no number. What would be done otherwise is refused, with what to use.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .files import Given
from .peer_key import Meant, PeerKey, not_honoured, read_options, refusal
from .values import TRUE_WORDS, convert, show_short

_GATHERED = (
    "Use full_shard (data_parallel: fsdp), which gathers weights again for the backward pass, or "
    "no_shard (data_parallel: replicate)."
)
_ON_DEVICE = "Weights stay on the devices: memory: auto finds what else saves memory."
_XLA = "PyTorch/XLA is not used."
_WRAP = "Each decoder layer is sharded as one unit, whatever the policy."
_LOADING = "Weights are loaded once and are the same on every device."
_PREFETCH = "FSDP2 gathers the next layer ahead by itself."

STRATEGIES: dict[str, tuple[str, Any]] = {
    "full_shard": ("data_parallel", "fsdp"),
    "hybrid_shard": ("data_parallel", "hsdp"),
    "no_shard": ("data_parallel", "replicate"),
}
"""Names of sharding strategies that say what `data_parallel` says."""
_NUMBERED = {"1": STRATEGIES["full_shard"], "3": STRATEGIES["no_shard"]}
_NUMBERED["4"] = STRATEGIES["hybrid_shard"]


def _layer_classes(name: str, given: Given) -> Meant:
    """Names of decoder layers, by how such classes are called."""
    value = given.value
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(
        re.fullmatch(r"\s*\w+(Layer|Block)\s*", str(each)) for each in names
    ):
        raise not_honoured(name, given, PeerKey(None, _WRAP))
    return {}


FSDP_OPTIONS: dict[str, PeerKey] = {
    "version": PeerKey(2, "Sharding is FSDP2.", also=(1,)),
    "reshard_after_forward": PeerKey(True, _GATHERED, means=STRATEGIES),
    "sharding_strategy": PeerKey(None, _GATHERED, means={**STRATEGIES, **_NUMBERED}),
    "cpu_offload": PeerKey(False, _ON_DEVICE),
    "offload_params": PeerKey(False, _ON_DEVICE),
    "auto_wrap_policy": PeerKey(
        "TRANSFORMER_BASED_WRAP", _WRAP, also=("transformer_based_wrap", None)
    ),
    "transformer_layer_cls_to_wrap": PeerKey(None, _WRAP, read=_layer_classes),
    "transformer_cls_names_to_wrap": PeerKey(None, _WRAP, read=_layer_classes),
    "min_num_params": PeerKey(0, _WRAP, also=(None,)),
    "activation_checkpointing": PeerKey(
        False, "Use gradient_checkpointing.", means={"true": ("gradient_checkpointing", True)}
    ),
    "activation_checkpointing_offload": PeerKey(
        False, "Use activation_offloading.", means={"true": ("activation_offloading", True)}
    ),
    "state_dict_type": PeerKey(
        "FULL_STATE_DICT",
        "The model is saved whole, and what resumes a run by shares.",
        also=("SHARDED_STATE_DICT", "full_state_dict", "sharded_state_dict"),
    ),
    "cpu_ram_efficient_loading": PeerKey(False, _LOADING, also=(True,)),
    "sync_module_states": PeerKey(True, _LOADING, also=(False,)),
    "use_orig_params": PeerKey(True, "FSDP2 keeps the model's own weights.", also=(False,)),
    "forward_prefetch": PeerKey(False, _PREFETCH, also=(True,)),
    "backward_prefetch": PeerKey(
        "NO_PREFETCH", _PREFETCH, also=("BACKWARD_PRE", "no_prefetch", "backward_pre", None)
    ),
    "backward_prefetch_policy": PeerKey("BACKWARD_PRE", _PREFETCH, also=("NO_PREFETCH",)),
    "limit_all_gathers": PeerKey(True, _PREFETCH),
    "mixed_precision_policy": PeerKey(
        None, "Use dtype and bf16: weights are gathered in dtype and gradients summed in float32."
    ),
    "ignored_modules": PeerKey(None, "All weights are sharded."),
    "xla": PeerKey(False, _XLA),
    "xla_fsdp_v2": PeerKey(False, _XLA),
    "xla_fsdp_grad_ckpt": PeerKey(False, _XLA),
    "xla_fsdp_settings": PeerKey(None, _XLA, also=({},)),
}
"""Options of `fsdp_config`, in transformers and (after `fsdp_`) in accelerate."""

_BATCHES = "Rows are packed before the run, so there is no data loader to set up."
ACCELERATOR_OPTIONS: dict[str, PeerKey] = {
    "split_batches": PeerKey(
        False, "Use global_batch_size for a size that all devices divide among them."
    ),
    "dispatch_batches": PeerKey(None, _BATCHES, also=(False,)),
    "even_batches": PeerKey(True, "No row is taken twice.", also=(False,)),
    "use_seedable_sampler": PeerKey(True, "The order follows seed, or data_seed."),
    "non_blocking": PeerKey(False, _BATCHES, also=(True,)),
    "gradient_accumulation_kwargs": PeerKey(None, "Use gradient_accumulation_steps.", also=({},)),
    "use_configured_state": PeerKey(False, "Processes join each other from torchrun's variables."),
}
"""Options of transformers' `accelerator_config`."""

SIZES = ("dp_replicate_size", "dp_shard_size", "cp_size", "sp_size")
"""The sizes of a mesh of devices that are read."""


def _size(name: str, given: Given) -> int:
    try:
        size = 1 if given.value is None else convert(given.value, int)
    except ValueError:
        size = 0
    if size < 1:
        got = show_short(given.value)
        raise refusal(name, given, f"expected a whole number of at least 1, got {got}")
    return int(size)


def _read_size(name: str, given: Given) -> Meant:
    _size(name, given)
    return {}


_TENSOR = PeerKey(None, "Use data_parallel: fsdp, which shards every layer too.", also=(1,))
_COMM = "How the devices of a row exchange its tokens is not chosen by hand."
MESH_OPTIONS: dict[str, PeerKey] = {
    **{name: PeerKey(None, "Use data_parallel.", read=_read_size) for name in SIZES},
    "tp_size": _TENSOR,
    "cp_backend": PeerKey(None, _COMM, also=("torch",)),
    "sp_backend": PeerKey(None, _COMM, also=("deepspeed",)),
    "cp_comm_strategy": PeerKey(None, _COMM, also=("allgather", "alltoall")),
    "cp_handler": PeerKey(None, _COMM),
    "sp_handler": PeerKey(None, _COMM),
    "tp_handler": PeerKey(None, _TENSOR.instead),
}
"""Options of accelerate's `ParallelismConfig`."""


def of_fsdp(name: str, given: Given) -> Meant:
    """`fsdp`: true, or FSDP1's strategy with auto_wrap and offload, as a text or a list."""
    value = given.value
    own = STRATEGIES["full_shard"]
    for word in re.findall(r"\w+", str(value).lower()):
        if word in STRATEGIES:
            own = STRATEGIES[word]
        elif word == "offload":
            raise not_honoured(name, given, PeerKey(None, _ON_DEVICE))
        elif word in ("shard_grad_op", "hybrid_shard_zero2"):
            raise not_honoured(name, given, PeerKey(None, _GATHERED))
        elif word != "auto_wrap" and word not in TRUE_WORDS:
            expected = "true, or one of full_shard, hybrid_shard and no_shard with auto_wrap"
            raise ConfigError(
                f"{given.place}: {name}: expected {expected}, got {show_short(value)}"
            )
    return {own[0]: Given(own[1], given.place)}


def of_fsdp_config(name: str, given: Given) -> Meant:
    """`fsdp_config`: a mapping or a JSON file, each option with or without `fsdp_` before it."""
    return read_options(name, given, FSDP_OPTIONS, "fsdp_")[0]


def of_accelerator_config(name: str, given: Given) -> Meant:
    """`accelerator_config`: what it says of data loaders, which there are none of."""
    return read_options(name, given, ACCELERATOR_OPTIONS)[0]


def of_parallelism_config(name: str, given: Given) -> Meant:
    """`parallelism_config`: the sizes of a mesh of devices, as a mapping or accelerate's object.

    There, the devices that share rows (cp_size, sp_size) share the shards of the model too.
    """
    sizes = _sizes(name, given)
    replicas, shards = sizes["dp_replicate_size"], sizes["dp_shard_size"]
    row = sizes["cp_size"] * sizes["sp_size"]
    if min(sizes["cp_size"], sizes["sp_size"]) > 1:
        problem = "cp_size and sp_size both split rows: use one of them"
        raise refusal(name, given, problem)
    ours: dict[str, Any] = {}
    if row > 1:
        ours["cp_size"] = row
    if shards * row > 1:
        ours["data_parallel"] = "fsdp" if replicas == 1 else "hsdp"
    elif replicas > 1:
        ours["data_parallel"] = "replicate"
    if ours.get("data_parallel") == "hsdp":
        ours["dp_replicate_size"] = replicas
    return {own: Given(value, given.place) for own, value in ours.items()}


def _sizes(name: str, given: Given) -> dict[str, int]:
    value = given.value
    if not isinstance(value, str | Mapping) and hasattr(value, "dp_shard_size"):
        sizes = {size: getattr(value, size, None) for size in (*SIZES, "tp_size")}
        given = Given(sizes, given.place)
    found = read_options(name, given, MESH_OPTIONS, "parallelism_config_")[1]
    return {size: _size(f"{name}: {size}", Given(found.get(size), given.place)) for size in SIZES}


def of_local_rank(name: str, given: Given) -> Meant:
    """`local_rank`, which old launchers pass as a flag: what the environment says anyway."""
    if str(given.value) != os.environ.get("LOCAL_RANK", ""):
        expected = f"expected LOCAL_RANK of the environment, got {show_short(given.value)}"
        raise refusal(name, given, f"{expected}: start processes with devices or torchrun instead")
    return {}


def together(own: str, before: Given | None, now: Given) -> Given:
    """What two keys of theirs mean for one of ours: the more sharded one, unless that is undone.

    accelerate starts the processes of an FSDP run as those of any other, so that replicate there is
    no contradiction, and a mesh with replicas makes hsdp of fsdp.

    Raises:
        ConfigError: the second undoes what the first asks for.
    """
    if own != "data_parallel" or before is None or before.value == now.value:
        return now
    if now.value == "replicate":
        raise ConfigError(
            f"{now.place}: asks for data_parallel replicate, where {before.place} asks for "
            f"{before.value}"
        )
    return before if before.value == "hsdp" else now


def check_mesh(mesh: Given, processes: Any, key: str) -> None:
    """Whether `parallelism_config` is for the processes that there are.

    Args:
        mesh: its value.
        processes: how many there are, a raw value.
        key: what says so; devices are those of one host, of which there may be several.

    Raises:
        ConfigError: its sizes multiply to another number.
    """
    if MESH.asks_nothing(mesh.value):
        return
    wanted = math.prod(_sizes("parallelism_config", mesh).values())
    try:
        there = 1 if processes is None else convert(processes, int)
    except ValueError:  # said of the key itself
        return
    fits = wanted == there or (key == "devices" and there > 1 and wanted % there == 0)
    if wanted > 1 and not fits:
        problem = f"its sizes multiply to {wanted} processes, and {key} is {there}"
        raise refusal("parallelism_config", mesh, problem)


MESH = PeerKey(None, "Use data_parallel.", also=({},), read=of_parallelism_config)
"""`parallelism_config`."""
