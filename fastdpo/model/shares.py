"""The weights of a model that is spread over ranks, as its files name them: to save, and to load
without holding more than a rank's share on a device.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..config import TrainConfig
from ..errors import CheckpointError
from ..parallel.shares import INDEX, SUFFIX, Stored, take_share
from .load import load_model, load_weights
from .place import ADAPTER_WEIGHTS
from .sharding import is_sharded


def reshard(model: nn.Module) -> None:
    """Leave every rank its shares alone: after a forward without a backward, what lies outside of
    layers is whole.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that are saved, each once, in the model's own memory."""
    reshard(model)
    state, first = model.state_dict(), dict[nn.Parameter, str]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            state.pop(name, None)
    return state


def load_any_weights(model: Any, config: TrainConfig, path: Path) -> None:
    """Put the weights (or the adapter) of a checkpoint into the model that is being trained, which
    may be sharded.

    Raises:
        CheckpointError: it holds another model or none.
    """
    if not is_sharded(model):
        load_weights(model, config, path)
    elif config.use_peft:
        _load_adapter(model, path)
    else:
        _load_model(model, config, path)


def _load_adapter(model: Any, path: Path) -> None:
    from peft import get_peft_model_state_dict

    if not (path / ADAPTER_WEIGHTS).exists():
        raise CheckpointError(f"{path}: holds no adapter, but use_peft is set")
    reshard(model)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=False)
    stored = Stored([path / ADAPTER_WEIGHTS])
    # Of adapted embeddings peft saves the base too, which is what it was.
    saved = {name for name in stored.sizes if not name.endswith(".base_layer.weight")}
    if other := sorted(named.keys() ^ saved):
        raise CheckpointError(f"{path}: its adapter is on other modules ({', '.join(other[:3])})")
    _read(stored, named, f"{path}: its adapter has other shapes")


def _load_model(model: Any, config: TrainConfig, path: Path) -> None:
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path}: holds no full model, but use_peft is not set")
    named, stored = named_weights(model), Stored(_files(path))
    if named.keys() <= stored.sizes.keys():
        _read(stored, named, f"{path}: holds another model")
        return
    # transformers names and cuts some weights otherwise in files.
    whole = load_model(config, torch.device("cpu"), str(path)).state_dict()
    try:
        for name, weight in named.items():
            take_share(weight, whole[name])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: holds another model ({error})") from error


def _files(path: Path) -> list[Path]:
    """The files that hold a model's weights."""
    if (path / INDEX).exists():
        names = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [path / name for name in sorted(set(names))]
    return [path / ("model" + SUFFIX)]


def _read(stored: Stored, named: dict[str, Tensor], problem: str) -> None:
    try:
        stored.read(named)
    except CheckpointError as error:
        raise CheckpointError(f"{problem} ({error})") from error
