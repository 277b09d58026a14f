"""Everything that is loaded, checked and computed before the first step."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from ..config import TrainConfig
from ..config.inputs import DTYPES
from ..data.dataset import Data, RowsInMemory, load_data, needs_reference
from ..data.groups import describe_units
from ..data.packing import longest_unit
from ..data.plan import plan_digest, row_budget, units_per_step
from ..errors import ConfigError, ModelError
from ..hub import open_repository
from ..losses import TrainingLoss, loss_of
from ..memory.allocator import keep_freed_memory, return_freed_memory
from ..memory.auto import fit
from ..memory.spread import ONE
from ..model.adapter import adopt_adapter
from ..model.context import ContextGroup, padded_context
from ..model.layers import compile_layers, recompute_layers
from ..model.layout import beyond_positions
from ..model.load import (
    check_given,
    check_model_files,
    load_model_config,
    load_tokenizer,
    with_pad_token,
)
from ..model.load_scorer import load_scorer
from ..model.offload import transfer_of
from ..model.paths import activations_path, attention_path, run_device
from ..model.precision import choose_precision
from ..model.scorer import TOKEN_STATS, Scorer
from ..parallel.agree import same_data, same_weights
from ..parallel.world import ALONE, World
from ..tried import untried
from .arrangement import arranged, spread_over
from .card import model_card
from .changes import check_keys
from .checkpoint import read_state
from .data_checks import check_data
from .loop import Trainer
from .optimizer import optimizer_path
from .output import Output
from .references import make_reference
from .services import require_trackers
from .step import Objective
from .uploads import Uploads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InMemory:
    """What the caller has in memory; the rest is where the configuration says."""

    rows: RowsInMemory | None = None
    eval_rows: RowsInMemory | None = None
    model: Any = None
    tokenizer: Any = None

    def check(self, config: TrainConfig) -> None:
        """Hold it against the configuration, before anything is loaded.

        Raises:
            ConfigError: what is neither given nor named there, or given for nothing.
            ModelError: a model or tokenizer that cannot be used.
        """
        if self.model is None or self.tokenizer is None:
            config.require("model_name_or_path")
        if self.rows is None:
            config.require("dataset_name")
        if self.eval_rows is not None and not config.evaluates:
            raise ConfigError(
                "eval_rows: the run does not evaluate; set eval_strategy, do_eval or eval_on_start"
            )
        if config.evaluates and self.eval_rows is None and config.eval_source is None:
            raise ConfigError("eval_rows: expected rows to evaluate on, or eval_dataset_name")
        if self.model is not None:
            check_given(self.model, config)
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase | None):
            kind = type(self.tokenizer).__name__
            raise ModelError(f"tokenizer: expected one of transformers, got {kind}")

    @property
    def is_empty(self) -> bool:
        """Whether the configuration alone says what is trained."""
        return all(value is None for value in vars(self).values())


@dataclass
class Loaded:
    """What training and precomputing begin with."""

    config: TrainConfig
    tokenizer: Any
    data: Data
    policy: Scorer
    loss: TrainingLoss
    max_tokens: int
    world: World


def load(
    config: TrainConfig,
    given: InMemory,
    bf16: bool | None,
    world: World = ALONE,
    *,
    trains: bool = True,
) -> Loaded:
    """Tokenizer, data and policy, made to fit the device if it `trains` and `memory` is auto;
    `bf16` as the configuration or a checkpoint has it. What is measured here, the first rank
    measures for all.
    """
    loss_of(config)  # an unknown one is an error before anything is read
    if given.model is None:
        check_model_files(config)
        model_config = load_model_config(config)
    else:
        model_config = given.model.config
    device = _device(config)
    tokenizer = load_tokenizer(config) if given.tokenizer is None else given.tokenizer
    if given.model is not None:  # the path was for the tokenizer
        config = config.choose("model", model_name_or_path=None)
    vocab_size = getattr(model_config.get_text_config(), "vocab_size", None)
    with world.one_after_another():  # the others find in the cache what the first one has made
        data = load_data(config, with_pad_token(tokenizer), vocab_size, given.rows, given.eval_rows)
    same_data(world, _digest(data) if world.size > 1 else "", "dataset_name")
    for line in data.config.notes():  # of a loss that the data's layout named
        if line not in config.notes():
            logger.warning(f"note: {line}")
    config, loss = data.config, loss_of(data.config)
    _note_positions(config, model_config, data)
    autocast, reason = world.share(choose_precision(bf16, device) if world.first else None)
    precision = "bf16 autocast" if autocast else config.dtype
    logger.info(f"precision: {precision} on {device.type} ({reason})")
    for line in untried():
        logger.info(f"versions: {line}")
    spread = ONE
    if world.size > 1:
        spread = spread_over(config, data, model_config, device, autocast, world, given.model)
        world = arranged(config, spread, given.model, world, device)
    if trains and config.memory == "auto":
        fitted = config
        if world.first:
            fitted = fit(config, data, model_config, device, autocast, spread)
        config = world.share(fitted)
    # What is going to be sharded is not whole on any device.
    place = torch.device("cpu") if world.sharded else device
    policy = load_scorer(config, place, autocast, model=given.model, world=world)
    if not policy.from_first:
        same_weights(world, policy.model)
    if world.context is not None:
        if policy.layout.name == "padded":
            raise padded_context(policy.layout.reason)
        policy.context = ContextGroup(world.context)
    budget = row_budget(config, device.type)
    return Loaded(config, tokenizer, data, policy, loss, budget, world)


def _digest(data: Data) -> str:
    """Names the tokens of all responses, of those that are evaluated on too."""
    return plan_digest(data.train + data.evaluation)


def set_up(
    config: TrainConfig,
    given: InMemory,
    world: World,
    output: Output,
    on_step: Callable[..., None] | None,
    callbacks: Sequence[Any] = (),
) -> Trainer:
    """A trainer that stands before the first step that is left."""
    attention_path(config)  # a backend that cannot be had here is an error before anything else
    if given.model is None:
        config = adopt_adapter(config)
    elif (dtype := str(given.model.dtype).removeprefix("torch.")) in DTYPES:
        config = config.choose("model", dtype=dtype)
    require_trackers(config)
    uploads = _uploads(config, world, output)
    optimizer = optimizer_path(config, run_device(config))
    start, bf16 = output.checkpoint(), config.bf16
    if start is not None:
        state = read_state(start, world)
        if "loss_type" in config.origins:  # or else the data's layout decides
            check_keys(start, state, config)
        if bf16 is None and "identity" in state:  # not what this machine would choose
            bf16 = state["identity"]["precision"] == str(torch.bfloat16)
    set_seed(config.seed)
    loaded = load(config, given, bf16, world)
    config, policy, data, loss = loaded.config, loaded.policy, loaded.data, loaded.loss
    world = loaded.world
    if config.check_data and world.first:
        output.checks = check_data(config, given.rows, given.eval_rows)
    if start is not None:
        check_keys(start, state, config)
    reference, digests = make_reference(config, policy, data, loss, loaded.max_tokens, world)
    logger.info(f"activations: {activations_path(config)}")
    logger.info(f"optimizer: {optimizer}")
    _change_layers(config, policy.model, policy.device, output)
    trainer = Trainer(
        config=config,
        objective=Objective(
            policy,
            loss,
            config.per_device_train_batch_size,
            reference,
            compares=needs_reference(loss, data),
            world=world,
        ),
        tokenizer=loaded.tokenizer,
        data=data,
        max_tokens=loaded.max_tokens,
        output=output,
        identity={"precision": str(policy.autocast), **digests},
        units=_units(config, world, state if start is not None else {}),
        on_step=on_step,
        callbacks=callbacks,
        uploads=uploads,
        card=partial(model_card, config, _base(config, given), units=describe_units(data.train)),
    )
    _log_training(trainer, loaded)
    _keep_memory(loaded)
    policy.compile_head(loss.loss, TOKEN_STATS)
    if not world.first:  # what dropout draws on each rank is its own
        torch.manual_seed(config.seed + world.rank)
    if start is not None:
        trainer.resume(start, state)
    elif config.resume_from_checkpoint:
        logger.info(
            f"resume_from_checkpoint: {output.path} holds no checkpoint, starting at step 0"
        )
    return trainer


def _base(config: TrainConfig, given: InMemory) -> str:
    """The name of the model that is trained."""
    if given.model is None:
        return str(config.model_name_or_path)
    return str(given.model.name_or_path or type(given.model).__name__)


def _uploads(config: TrainConfig, world: World, output: Output) -> Uploads:
    """The run's uploads, after the hub has said on the first rank that they may be made."""
    if not config.push_to_hub:
        return Uploads(None)
    name: str | ConfigError = ""
    if world.first:
        try:
            name = open_repository(config)
            logger.info(f"push_to_hub: {name} may be written to")
        except ConfigError as error:
            name = error
    name = world.share(name)
    if isinstance(name, ConfigError):
        raise name
    return Uploads(config, name, output.path) if world.first else Uploads(None)


def _log_training(trainer: Trainer, loaded: Loaded) -> None:
    """How many units are trained on, and what precedes the rows of a step."""
    loss = loaded.loss
    logger.info(f"loss: {loss.describe()}")
    logger.info(
        f"training: {describe_units(loaded.data.train)}, {trainer.schedule.units} a step, "
        f"{trainer.total_steps} steps, rows of up to {loaded.max_tokens} tokens"
    )
    if loss.scores_first:
        what = "each prompt with the row before's response" if loss.mismatched else "every response"
        logger.info(f"loss: each step begins with a pass that scores {what}, without gradient")


def _keep_memory(loaded: Loaded) -> None:
    """On a CPU, keep what steps free for the steps after them."""
    if loaded.policy.device.type == "cpu":
        longest = longest_unit(loaded.data.train, loaded.policy.layout.name)
        keep_freed_memory(max(loaded.max_tokens, longest))
        return_freed_memory()


def _units(config: TrainConfig, world: World, saved: Mapping[str, Any]) -> int:
    """Units of a step. A run that goes on with other devices and the same keys keeps its own."""
    units = units_per_step(config, world.data_size)
    before = saved.get("config", {})
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
    if all(before.get(name) == getattr(config, name) for name in sizes):
        units = saved.get("units", units)
    return units


def _device(config: TrainConfig) -> torch.device:
    if run_device(config).type == "cpu":
        keep_freed_memory()
    if config.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
    return run_device(config)


def _note_positions(config: TrainConfig, model_config: Any, data: Data) -> None:
    """Warn of sequences that are longer than any the model has positions for."""
    length, what = config.max_length, "max_length"
    if length is None:
        length, what = data.longest_sequence(), "the longest sequence,"
    if warning := beyond_positions(model_config, length, what):
        logger.warning(f"note: {warning}")


def _change_layers(config: TrainConfig, model: Any, device: torch.device, output: Output) -> None:
    """Recompute and compile the layers as the configuration asks."""
    if config.gradient_checkpointing:
        transfer = transfer_of(device, output.path) if config.activation_offloading else None
        recompute_layers(model, every=config.gradient_checkpointing_every, offload=transfer)
    if config.torch_compile:
        logger.info(f"layers: {compile_layers(model)} compiled")
