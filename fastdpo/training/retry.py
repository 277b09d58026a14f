"""Steps that run out of memory: repeated with less where `memory: auto` allows it, else explained.

A step that fails while its rows are scored has changed nothing but gradients and random states:
both are put back, something is made smaller, and the same units are packed and computed anew.
The numbers are those of a run that was never disturbed, rounding apart. Where weights may have been
stepped already there is nothing to go back to, and the run ends with the keys that would help.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from fastdpo_kernels.head import workspace_of
from fastdpo_kernels.tiles import release_workspace

from ..config import TrainConfig
from ..config.values import show
from ..data.ahead import ahead
from ..data.packing import longest_unit
from ..devices import at_hand
from ..errors import ConfigError, FastDPOError, one_line
from ..memory.auto import REASON, advice
from ..memory.planner import Planner
from ..memory.switches import SWITCHES, Demand
from ..model.layers import recompute_layers
from ..model.load import load_model_config
from ..model.offload import transfer_of
from ..model.tiles import tile_layers
from .loop import Trainer
from .step import StepBatches

logger = logging.getLogger(__name__)

_HOST_MESSAGES = ("can't allocate memory", "not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error) for m in _HOST_MESSAGES)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn memory that is missing outside of steps, which have words of their own, into one line.

    Raises:
        FastDPOError: there was not enough.
    """
    try:
        yield
    except FastDPOError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise FastDPOError(
            f"there is not enough memory for model, adapter and reference: {one_line(error)}; "
            "fastdpo plan says what a run needs"
        ) from error


def retried(trainer: Trainer) -> Generator[None, None, None]:
    """Take every step that is left, as `Trainer.take_steps` does; one that runs out of memory is
    repeated with less where the configuration allows it.

    Raises:
        FastDPOError: a step ran out of memory and cannot be repeated with less.
    """
    config = trainer.config
    # Weights that are stepped during a backward cannot be put back.
    repeats = config.memory == "auto" and not config.optimizer_in_backward
    repeats = repeats and trainer.world.size == 1  # the others would wait in the middle of the step
    while trainer.step < trainer.total_steps:
        with closing(ahead(trainer.steps_left())) as made:
            for step in trainer.pace.waits(made):
                if not _take(trainer, step, repeats):
                    break  # to be repeated, with other rows than those made ahead
                yield


def _take(trainer: Trainer, step: StepBatches, repeats: bool) -> bool:
    """Take one step; False where it has to be packed and taken again, with less."""
    start, state = time.perf_counter(), _random_state(trainer.device) if repeats else None
    finishing = False
    try:
        sums = trainer.gradients(step)
        finishing = True
        trainer.finish(step, sums, start)
        return True
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if finishing or state is None:
            raise _failure(trainer, step) from error
    # Only here, outside the except clause, is what the failed attempt held gone.
    _clear(trainer, state)
    changed = _less(trainer, step)
    trainer.config = trainer.config.choose(REASON, **changed)
    done = ", ".join(f"{name} is {show(value)} now" for name, value in changed.items())
    logger.warning(f"memory: auto: {_where(trainer, step)}; {done}; the step is repeated")
    trainer.output.save_config(trainer.config)
    return False


def _where(trainer: Trainer, step: StepBatches) -> str:
    return f"step {trainer.step + 1} ran out of memory in rows of up to {_largest(step)} tokens"


def _largest(step: StepBatches) -> int:
    return max(batch.computed_tokens for batch in (*(step.first or ()), *step.batches))


def _clear(trainer: Trainer, state: Any) -> None:
    """Put gradients and random states back, and free what is held for reuse."""
    for parameter in trainer.model.parameters():
        parameter.grad = None
    gc.collect()
    release_workspace()
    _set_random_state(trainer.device, state)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()


def _less(trainer: Trainer, step: StepBatches) -> dict[str, Any]:
    """Turn on the cheapest switch that is left and can be turned on in a running model; the keys
    that changed.
    """
    layout = trainer.objective.policy.layout.name
    largest = min(trainer.max_tokens, _largest(step))
    longest = longest_unit(trainer.data.train, layout)
    workspace = workspace_of(None, trainer.device)
    demand = Demand(trainer.device.type, largest, longest, workspace)
    for switch in SWITCHES:
        if not switch.while_training:
            continue
        values = switch.values(trainer.config, demand)
        changed = {k: v for k, v in values.items() if getattr(trainer.config, k) != v}
        try:
            if changed:
                _apply(trainer, trainer.config.choose(REASON, **changed), changed)
                return changed
        except ConfigError:  # the model cannot be changed like that
            continue
    raise _failure(trainer, step)


def _apply(trainer: Trainer, config: TrainConfig, changed: dict[str, Any]) -> None:
    """Make the running model what `config` asks for in the keys that changed."""
    policy, model = trainer.objective.policy, trainer.model
    if "max_tokens_per_batch" in changed:
        trainer.max_tokens = changed["max_tokens_per_batch"]
    if "head_workspace_mib" in changed:
        policy.workspace_mib = changed["head_workspace_mib"]
    if "layer_tile_tokens" in changed:
        if config.torch_compile:
            raise ConfigError("layer_tile_tokens: the layers are compiled")
        with policy.precision():
            tile_layers(policy.model, changed["layer_tile_tokens"])
    if {"gradient_checkpointing", "activation_offloading"} & set(changed):
        offloads = config.activation_offloading
        transfer = transfer_of(trainer.device, trainer.output.path) if offloads else None
        recompute_layers(model, every=config.gradient_checkpointing_every, offload=transfer)


def _failure(trainer: Trainer, step: StepBatches) -> FastDPOError:
    try:
        help_text = advice(_planner(trainer))
    except Exception as error:  # whatever a plan stumbles over must not hide what happened
        help_text = f"lower max_tokens_per_batch ({type(error).__name__} while planning)"
    return FastDPOError(f"{_where(trainer, step)}: {help_text}")


def _planner(trainer: Trainer) -> Planner:
    config, policy = trainer.config, trainer.objective.policy
    given = config.model_name_or_path is None
    model_config = trainer.model.config if given else load_model_config(config)
    return Planner(config, trainer.data, at_hand(trainer.device), policy.autocast, model_config)


def _random_state(device: torch.device) -> tuple[Any, Any]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _set_random_state(device: torch.device, state: tuple[Any, Any]) -> None:
    host, cuda = state
    torch.set_rng_state(host)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
