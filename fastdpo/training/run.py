"""`train` and `precompute`: from a configuration, and what the caller has in memory, to a trained
model or to reference log-probabilities.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..data.dataset import RowsInMemory
from ..errors import ConfigError
from ..hub import reached
from ..model.adapter import adopt_adapter
from ..model.layout import restore_attention
from ..model.lent import lent
from ..parallel.world import World, joined
from ..terminal import progress_bars, silent, withheld
from .callbacks import check_callbacks
from .loop import Trainer
from .output import Output, claim
from .references import needs_reference, precompute_reference
from .restart import restarted
from .retry import enough_memory, retried
from .setup import InMemory, load, set_up

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind."""

    step: int
    """The last optimizer step."""
    metrics: dict[str, float]
    """The last value of every metric, under TRL's names; empty where nothing was left to do."""
    output_dir: Path
    model: Any = None
    """The trained transformers or peft model; None where nothing was left to do."""
    seconds: float = 0.0
    """What the steps of this call took, without evaluations and checkpoints."""
    tokens: int = 0
    """Tokens of the sequences in these steps."""
    url: str | None = None
    """Where the model is on the hub; None where it was not to be uploaded."""


def train(
    config: TrainConfig,
    rows: RowsInMemory | None = None,
    eval_rows: RowsInMemory | None = None,
    model: Any = None,
    tokenizer: Any = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    callbacks: Sequence[Any] | None = None,
) -> TrainResult:
    """Train as `fastdpo train` does.

    Lines about the run go to the logger "fastdpo", at INFO.

    Args:
        config: every key of the run.
        rows: preference data in place of `dataset_name`, in any layout that a file may have: a list
            of dicts or a `datasets.Dataset`.
        eval_rows: the same in place of the data to evaluate on, where the run evaluates.
        model: a transformers causal language model in place of `model_name_or_path`. It is trained
            in place, in its own dtype, on the device of the run; `use_peft` wraps it.
        tokenizer: its tokenizer, in place of the one at `model_name_or_path`.
        on_step: called after every optimizer step with its number, from 1 on, and the metrics that
            were logged at that step ({} where none were). What it raises ends the run.
        callbacks: `transformers.TrainerCallback` objects, as its `Trainer` takes them. They may
            stop the run, and have it log, evaluate or save; what one raises ends the run, and the
            checkpoints are whole.

    Raises:
        FastDPOError: anything wrong with configuration, data, model or checkpoint, before the first
            step; a loss or gradient that is not finite, later.
    """
    given = InMemory(rows, eval_rows, model, tokenizer)
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"config: expected a TrainConfig, got {type(config).__name__}")
    _check_callback(on_step)
    called = check_callbacks(callbacks)
    given.check(config)
    with joined(config) as world:
        config = restarted(config, world)
        with claim(config, world) as output, _surroundings(config, world):
            return _run(config, given, world, output, on_step, called)


def _run(
    config: TrainConfig,
    given: InMemory,
    world: World,
    output: Output,
    on_step: Callable[..., None] | None,
    callbacks: Sequence[Any],
) -> TrainResult:
    if given.is_empty and config.resume_from_checkpoint is True and output.holds_this_run():
        logger.info(
            f"{output.path}: the run with these keys is finished (step {output.step}), nothing "
            "is left to do"
        )
        return TrainResult(output.step, {}, output.path)
    return _train(config, given, world, output, on_step, callbacks)


def _check_callback(on_step: Any) -> None:
    """Raise ConfigError for what cannot be called after a step, before any is taken."""
    if on_step is None:
        return
    try:
        inspect.signature(on_step).bind(1, {})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"on_step: expected a function of step and metrics ({error})") from None


def _train(
    config: TrainConfig,
    given: InMemory,
    world: World,
    output: Output,
    on_step: Callable[..., None] | None,
    callbacks: Sequence[Any],
) -> TrainResult:
    with nullcontext() if given.model is None else lent(given.model):
        with withheld():
            trainer = set_up(config, given, world, output, on_step, callbacks)
        return _finish(output, trainer)


def _finish(output: Output, trainer: Trainer) -> TrainResult:
    """Take the steps that are left and save the model."""
    if output.finished and trainer.step == trainer.total_steps:
        logger.info(
            f"{output.path}: this run is finished (step {trainer.step}), nothing is left to do"
        )
        return TrainResult(output.step, {}, output.path)
    metrics = trainer.train(retried(trainer))
    output.finish(
        trainer.config,
        trainer.step,
        trainer.model,
        trainer.tokenizer,
        trainer.card(metrics),
        stopped=trainer.stopped,
    )
    trainer.report.finish()
    restore_attention(trainer.model)
    trainer.uploads.finish()
    return TrainResult(
        trainer.step,
        metrics,
        output.path,
        trainer.model,
        seconds=trainer.seconds,
        tokens=trainer.num_tokens - trainer.tokens_before,
        url=trainer.uploads.url,
    )


def precompute(config: TrainConfig) -> dict[str, Any]:
    """Run `fastdpo precompute`: fills the reference cache, returns what was found and computed.

    Raises:
        FastDPOError: as `train`; a run that reads no reference, or moves it.
    """
    config.require("model_name_or_path", "dataset_name")
    if not config.needs_reference:
        losses = " and ".join(config.loss_type)
        raise config.error("loss_type", f"{losses} without a reference: nothing to precompute")
    if config.sync_ref_model:
        raise config.error("sync_ref_model", "the reference moves: nothing to precompute")
    with joined(config) as world, _surroundings(config, world), withheld():
        loaded = load(adopt_adapter(config), InMemory(), config.bf16, world, trains=False)
        if not needs_reference(loaded.loss, loaded.data):
            raise loaded.config.error(
                "beta",
                "is 0 and every row has logps, so no reference is read: nothing to precompute",
            )
        report = precompute_reference(
            loaded.config, loaded.policy, loaded.data, loaded.loss, loaded.max_tokens, world
        )
    return {"found": report.found, "computed": report.computed, "cache": str(report.directory)}


@contextmanager
def _surroundings(config: TrainConfig, world: World) -> Iterator[None]:
    """Terminal, network and memory, each of which may be less than what libraries expect."""
    for line in config.notes() if world.first else ():
        logger.warning(f"note: {line}")
    with (
        nullcontext() if world.first else silent(),
        progress_bars(config.disable_tqdm),
        reached(config),
        enough_memory(),
    ):
        yield
