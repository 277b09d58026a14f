"""Steps that run out of memory: repeated with less where `memory: auto` allows it, else explained.

A step that fails while its rows are scored has changed nothing but gradients and random states:
both are put back, something is made smaller, and the same comparisons are packed and computed anew.
The numbers are those of a run that was never disturbed, rounding apart. Where weights may have been
stepped already there is nothing to go back to, and the run ends with the keys that would help.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from fastdpo_kernels.tiles import release_workspace

from ..data.ahead import ahead
from ..data.batch import Batch
from ..errors import ConfigError, FastDPOError
from ..memory.auto import REASON, advice
from ..memory.devices import at_hand
from ..memory.plan import Planner, longest_comparison
from ..model.activations import recompute_layers
from ..model.load import load_model_config
from ..model.offload import Transfer, transfer_of
from ..model.tiles import tile_layers

if TYPE_CHECKING:
    from .loop import Trainer

_TILE, _SMALLEST_TILE, _SMALLEST_WORKSPACE = 4096, 256, 64
_HOST_MESSAGES = ("can't allocate memory", "not enough memory")

Step = tuple[int, list[Batch]]


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
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise FastDPOError(
            f"there is not enough memory for model, adapter and reference: {reason}; fastdpo plan "
            "says what a run needs"
        ) from error


class Retry:
    """Takes steps of a trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        # Weights that are stepped during a backward cannot be put back.
        self.repeats = trainer.config.memory == "auto" and not trainer.config.optimizer_in_backward

    def steps(self, left: Callable[[], Iterable[Step]]) -> Generator[None, None, None]:
        """Take every step that is left; yields after each. `left` makes them from the next on."""
        trainer = self.trainer
        while trainer.step < trainer.total_steps:
            with closing(ahead(left())) as made:
                for step in made:
                    if not self.take(step):
                        break  # to be repeated, with other rows than those made ahead
                    yield

    def take(self, step: Step) -> bool:
        """Take one step; False where it has to be packed and taken again, with less.

        Raises:
            FastDPOError: it ran out of memory and cannot be repeated with less.
        """
        trainer, start = self.trainer, time.perf_counter()
        state = _random_state(trainer.device) if self.repeats else None
        try:
            sums = trainer.gradients(step)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if state is None:
                raise self._failure(step) from error
        else:
            try:
                trainer.finish(sums, start)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise self._failure(step) from error
            return True
        # Only here, outside the except clause, is what the failed attempt held gone.
        self._clear(state)
        largest = max(batch.computed_tokens for batch in step[1])
        trainer.say(
            f"memory: auto: step {trainer.step + 1} ran out of memory in rows of up to {largest} "
            f"tokens; {self._less(step, largest)}; the step is repeated"
        )
        trainer.output.save_config(trainer.config)
        return False

    def _clear(self, state: Any) -> None:
        trainer = self.trainer
        for parameter in trainer.model.parameters():
            parameter.grad = None
        gc.collect()
        release_workspace()
        _set_random_state(trainer.device, state)
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()

    def _less(self, step: Step, largest: int) -> str:
        """Make the cheapest thing smaller that is left; what was done, in words."""
        for change in (
            self._shorter_rows,
            self._recompute,
            self._tile,
            self._offload,
            self._smaller_tile_of_logits,
        ):
            values = change(largest)
            if values:
                self.trainer.config = self.trainer.config.choose(REASON, **values)
                return ", ".join(f"{name} is {_word(value)} now" for name, value in values.items())
        raise self._failure(step)

    def _shorter_rows(self, largest: int) -> dict[str, Any]:
        trainer = self.trainer
        layout = trainer.objective.policy.layout.name
        longest = longest_comparison(trainer.groups, layout)
        tokens = min(trainer.max_tokens, largest)
        if tokens <= longest:
            return {}
        trainer.max_tokens = max(longest, tokens // 2)
        return {"max_tokens_per_batch": trainer.max_tokens}

    def _recompute(self, largest: int) -> dict[str, Any]:
        config = self.trainer.config
        if config.gradient_checkpointing and config.gradient_checkpointing_every == 1:
            return {}
        values = {"gradient_checkpointing": True, "gradient_checkpointing_every": 1}
        side = self._transfer() if config.activation_offloading else None
        return self._tried(values, lambda: recompute_layers(self.trainer.model, offload=side))

    def _tile(self, largest: int) -> dict[str, Any]:
        tokens = min(_TILE, (self.trainer.config.layer_tile_tokens or largest) // 2)
        if tokens < _SMALLEST_TILE or self.trainer.config.torch_compile:
            return {}
        policy = self.trainer.objective.policy

        def tile() -> None:
            with policy.precision():
                tile_layers(policy.model, tokens)

        return self._tried({"layer_tile_tokens": tokens}, tile)

    def _offload(self, largest: int) -> dict[str, Any]:
        if self.trainer.device.type != "cuda" or self.trainer.config.activation_offloading:
            return {}
        side = self._transfer()
        values = {"activation_offloading": True}
        return self._tried(values, lambda: recompute_layers(self.trainer.model, offload=side))

    def _transfer(self) -> Transfer:
        return transfer_of(self.trainer.device, self.trainer.output.path)

    def _smaller_tile_of_logits(self, largest: int) -> dict[str, Any]:
        policy = self.trainer.objective.policy
        if policy.workspace_mib <= _SMALLEST_WORKSPACE:
            return {}
        policy.workspace_mib = max(_SMALLEST_WORKSPACE, policy.workspace_mib // 4)
        return {"head_workspace_mib": policy.workspace_mib}

    def _tried(self, values: dict[str, Any], change: Callable[[], object]) -> dict[str, Any]:
        """`values` if the model can be changed like that, {} if not."""
        try:
            change()
        except ConfigError:
            return {}
        return values

    def _failure(self, step: Step) -> FastDPOError:
        trainer = self.trainer
        largest = max(batch.computed_tokens for batch in step[1])
        where = f"step {trainer.step + 1} ran out of memory in rows of up to {largest} tokens"
        try:
            help_text = advice(self._planner())
        except Exception as error:  # whatever a plan stumbles over must not hide what happened
            help_text = f"lower max_tokens_per_batch ({type(error).__name__} while planning)"
        return FastDPOError(f"{where}: {help_text}")

    def _planner(self) -> Planner:
        trainer, policy = self.trainer, self.trainer.objective.policy
        device, model_config = at_hand(trainer.device), load_model_config(trainer.config)
        return Planner(trainer.config, trainer.groups, device, policy.autocast, model_config)


def _random_state(device: torch.device) -> tuple[Any, Any]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _set_random_state(device: torch.device, state: tuple[Any, Any]) -> None:
    host, cuda = state
    torch.set_rng_state(host)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
