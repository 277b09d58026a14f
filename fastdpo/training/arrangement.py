"""How the model is spread over the ranks, and what cannot go with that."""

import logging
from typing import Any

import torch

from ..config import TrainConfig
from ..data.dataset import Data
from ..errors import ConfigError
from ..memory.auto import spread_for
from ..memory.spread import TIED, Spread, spread_of
from ..model.quantised import is_quantised
from ..model.scorer import Scorer
from ..model.sharding import settle, shard_model
from ..model.skeleton import fill_skeleton
from ..parallel.world import World

logger = logging.getLogger(__name__)


def spread_over(
    config: TrainConfig,
    data: Data,
    model_config: Any,
    device: torch.device,
    autocast: torch.dtype | None,
    world: World,
    model: Any,
) -> Spread:
    """How the run lies over its processes; where that depends on the memory that is free, the first
    one says.

    Raises:
        ConfigError: a key that cannot be honoured there.
    """
    sizes = world.size, world.local_size
    name = config.data_parallel
    if name == "auto" and model is not None:
        name = "replicate"
    spread = None
    if name != "auto":
        spread = spread_of(config, *sizes, name)
        if spread.vocabulary and model_config.get_text_config().tie_word_embeddings:
            raise config.error("head_parallel", TIED)
        if spread.shards == 1 or config.head_parallel != "auto":
            return spread
    if world.first:
        devices, local = sizes
        where = {"devices": devices, "local": local}
        spread = spread_for(config, data, model_config, device, autocast, **where)
    return world.share(spread)


def arranged(
    config: TrainConfig, spread: Spread, model: Any, world: World, device: torch.device
) -> World:
    """The world with the model spread over it; `model` is one of the caller's, if any.

    Raises:
        ConfigError: a model in memory that would have to be sharded.
    """
    if world.size == 1:
        return world
    ranks = f"{world.size} processes"
    if world.hosts > 1:
        ranks += f" on {world.hosts} hosts"
    why = f" ({spread.reason})" if spread.reason else ""
    if spread.shards == 1:
        logger.info(f"devices: {ranks}, replicate: each holds the whole model{why}")
        return world
    if model is not None:
        raise config.error(
            "data_parallel",
            f"{spread.name} loads the model itself: give model_name_or_path instead of a model",
        )
    held = f"each holds 1/{spread.shards} of the model"
    if spread.replicas > 1:
        held += f", of which there are {spread.replicas}"
    logger.info(f"devices: {ranks}, {spread.name}: {held}{why}")
    return world.with_shares(spread.replicas, device, spread.vocabulary)


def shard_scorer(scorer: Scorer, world: World) -> None:
    """Leave this rank its share of a model, where ranks hold shares.

    Raises:
        ConfigError: a head that cannot stay sharded.
    """
    if world.mesh is None:
        return
    if is_quantised(scorer.model):
        raise ConfigError(
            "data_parallel: a base in 4 bits cannot be sharded; replicate holds it whole"
        )
    model, mesh = scorer.model, world.mesh
    if not world.vocabulary:
        state = model.state_dict() if scorer.from_first and world.first else None
        shard_model(model, mesh)
        if scorer.from_first:
            fill_skeleton(model, state, torch.device(mesh.device_type), world.first)
        settle(model)
        return
    head, embedding = scorer.head.module, model.get_input_embeddings()
    if head.weight is embedding.weight:
        raise ConfigError(f"head_parallel: {TIED}")
    if not isinstance(head, torch.nn.Linear):
        raise ConfigError("head_parallel: vocabulary needs a head without adapter; use gathered")
    shard_model(model, mesh, head)
    settle(model)
    scorer.shares = mesh.get_group("shard")
