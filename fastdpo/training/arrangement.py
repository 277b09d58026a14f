"""How the model is spread over the ranks, and what cannot go with that."""

import logging
from collections.abc import Iterator
from typing import Any

import torch

from ..config import TrainConfig
from ..config.optimizer import BITSANDBYTES
from ..errors import ConfigError
from ..model.quantised import is_quantised
from ..model.scorer import Scorer
from ..model.sharding import shard_model
from ..parallel.world import World

logger = logging.getLogger(__name__)


def arranged(config: TrainConfig, model: Any, world: World, device: torch.device) -> World:
    """The world with the model as `data_parallel` says; `model` is one of the caller's, if any.

    Raises:
        ConfigError: a key that cannot be honoured there.
    """
    if world.size == 1:
        return world
    name = "replicate" if config.data_parallel == "auto" else config.data_parallel
    for key, problem in _obstacles(config, model, name):
        raise config.error(key, problem)
    ranks = f"{world.size} processes"
    if world.hosts > 1:
        ranks += f" on {world.hosts} hosts"
    if name == "replicate":
        logger.info(f"devices: {ranks}, the whole model on each")
        return world
    replicas = _replicas(config, world) if name == "hsdp" else 1
    shares = world.size // replicas
    logger.info(f"devices: {ranks}, {replicas} x the model in {shares} shares (FSDP2)")
    return world.with_shares(replicas, device, config.head_parallel == "vocabulary")


def shard_scorer(scorer: Scorer, world: World) -> None:
    """Leave this rank its share of a model, where ranks hold shares.

    Raises:
        ConfigError: a head that cannot stay sharded.
    """
    if world.mesh is None:
        return
    if not world.vocabulary:
        shard_model(scorer.model, world.mesh)
        return
    head, embedding = scorer.head.module, scorer.model.get_input_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.weight is embedding.weight:
        why = "the embedding too" if head.weight is embedding.weight else "adapted"
        raise ConfigError(
            f"head_parallel: vocabulary needs a head of its own, and this model's is {why}; use "
            "gathered"
        )
    shard_model(scorer.model, world.mesh, head)
    scorer.shares = world.mesh.get_group("shard")


def _replicas(config: TrainConfig, world: World) -> int:
    replicas = config.dp_replicate_size or world.hosts
    if world.size % replicas:
        raise config.error(
            "dp_replicate_size", f"expected a divisor of the {world.size} processes, got {replicas}"
        )
    if replicas == 1 or replicas == world.size:
        raise ConfigError(
            f"data_parallel: hsdp needs replicas of several shares each, got {replicas} over "
            f"{world.size} processes; set dp_replicate_size, or take fsdp or replicate"
        )
    return replicas


def _obstacles(config: TrainConfig, model: Any, name: str) -> Iterator[tuple[str, str]]:
    if config.optimizer_in_backward:
        yield "optimizer_in_backward", "cannot go with several processes: they add gradients up"
    if config.optimizer_offload:
        yield (
            "optimizer_offload",
            "cannot go with several processes; data_parallel: fsdp saves more",
        )
    if config.head_parallel == "vocabulary" and (name == "replicate" or config.cp_size > 1):
        yield "head_parallel", "vocabulary goes with data_parallel fsdp or hsdp and cp_size 1"
    if name == "replicate":
        return
    if config.torch_compile:
        yield "torch_compile", f"cannot go with data_parallel {name}; replicate can"
    if config.optim in BITSANDBYTES:
        yield "optim", f"{config.optim} cannot go with data_parallel {name}; adamw_torch_8bit can"
    if config.load_in_4bit or (model is not None and is_quantised(model)):
        yield "data_parallel", f"{name} cannot shard a base in 4 bits; replicate holds it whole"
    if model is not None:
        yield "data_parallel", f"{name} loads the model itself: give model_name_or_path instead"
