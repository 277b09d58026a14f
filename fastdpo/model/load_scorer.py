"""A model with its head and its row layout, loaded, checked and said to be what it is."""

import logging
from typing import Any

import torch

from ..config import TrainConfig
from ..parallel.world import ALONE, World
from .adapter import check_targets, load_adapter
from .attention import register
from .head import base_causal_lm, check_causal, check_head, find_head
from .layout import Layout, choose_layout
from .load import adopt_model, load_model
from .paths import attention_path, head_path, run_device
from .place import Place, find_model
from .quantised import is_quantised, packing
from .scorer import Scorer
from .skeleton import load_skeleton, takes_skeletons
from .tiles import tile_layers

logger = logging.getLogger(__name__)


def load_scorer(
    config: TrainConfig,
    device: torch.device,
    autocast: torch.dtype | None,
    path: str | None = None,
    model: Any = None,
    world: World = ALONE,
) -> Scorer:
    """The model at `path` (default: the policy's), or the one in memory, with its head, checked
    against its own logits, and the row layout that is exact for it. What it found is logged. Where
    it is going to be sharded, the first rank does that for all, if the others can do without.

    Raises:
        ModelError: a model that cannot be loaded or trained.
        ConfigError: a key that cannot be honoured for it.
    """
    # The rows of a head over the vocabulary are taken from the whole one on each rank.
    if world.sharded and not world.vocabulary and takes_skeletons(config, path):
        return _of_first(config, device, autocast, path, world)
    place = None if model is not None else find_model(config, path)
    if model is not None:
        model = adopt_model(model, config, device, autocast)
    else:
        model = load_model(config, device, path, autocast)
    head = find_head(model)
    scorer = Scorer(model, head, Layout("padded", ""), autocast, config.head_workspace_mib)
    with scorer.precision():
        check_causal(model)
        check_head(model, head)
        scorer.layout = _layout(model, config)
        tiles = config.layer_tile_tokens and tile_layers(model, config.layer_tile_tokens)
    logger.info(f"{'model' if path is None else 'reference model'}: {scorer.layout.reason}")
    if tiles:
        logger.info(f"tiles: {tiles}")
    if is_quantised(model):
        logger.info(f"weights: {packing(model)}")
    if place is not None and place.adapter is not None and config.use_peft:
        _put_on(scorer, place, config, path is None)
        logger.info(f"adapter: {place.adapter}{', trained on' if path is None else ''}")
    if path is None:
        _log_paths(scorer, config)
    return scorer


def _of_first(
    config: TrainConfig,
    device: torch.device,
    autocast: torch.dtype | None,
    path: str | None,
    world: World,
) -> Scorer:
    """The scorer of a model that the first rank loads and checks; see `skeleton`."""
    if world.first:
        scorer = load_scorer(config, device, autocast, path)
        implementation = base_causal_lm(scorer.model).config._attn_implementation
        world.share((scorer.layout, scorer.model.dtype, implementation))
    else:
        layout, dtype, implementation = world.share(None)
        model: Any = load_skeleton(config, path, dtype)
        register(config.attention_backend)
        model.set_attn_implementation(implementation)
        workspace = config.head_workspace_mib
        scorer = Scorer(model, find_head(model), layout, autocast, workspace)
    scorer.from_first = True
    return scorer


def _layout(model: Any, config: TrainConfig) -> Layout:
    if config.attn_implementation is not None:
        return Layout("padded", f"padded: attn_implementation is {config.attn_implementation}")
    # What is going to be sharded is checked on the host, where the kernels of a GPU do not run.
    here = model.device.type == run_device(config).type
    layout = choose_layout(
        model,
        share_prefix=config.share_prefix,
        max_length=config.max_length,
        attention_backend=config.attention_backend if here else None,
    )
    register(config.attention_backend)
    return layout


def _put_on(scorer: Scorer, place: Place, config: TrainConfig, trained: bool) -> None:
    """Put the adapter that lies on disk on a scorer's model; a head with it is checked again."""
    if trained:
        check_targets(scorer.model, place, config)
    scorer.model = load_adapter(scorer.model, place, config.lora_dropout if trained else 0.0)
    scorer.head = find_head(scorer.model)
    with scorer.precision():
        check_head(scorer.model, scorer.head)


def _log_paths(scorer: Scorer, config: TrainConfig) -> None:
    """What computes attention, head and layers of the policy."""
    model = scorer.model
    if scorer.layout.name == "padded":
        attention = f"{model.config._attn_implementation}: the model's own"
    else:
        sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
        attention = attention_path(config, model.config, sinks)
    logger.info(f"attention: {attention}")
    logger.info(f"head: {head_path(config)}")
    if config.use_liger_kernel:
        logger.info("layers: liger: use_liger_kernel asks for it")
