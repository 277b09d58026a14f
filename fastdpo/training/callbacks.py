"""transformers' callbacks, called in this loop as in its own: at the same events, in the same
order (but that the end of an epoch is told before what is due there), with the same arguments, and
obeyed in the same way.

What the loop does not have, such as batches within a step, has no event; a callback that waits for
one is named. What a callback computes with the model changes nothing of the run. On several ranks
each has its own callbacks, and what one of them asks for happens on all.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..config import TrainConfig
from ..errors import ConfigError, FastDPOError
from ..model.layout import ordinary
from ..parallel.world import World
from .schedule import Schedule

logger = logging.getLogger(__name__)

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_step_end",
    "on_epoch_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_train_end",
)
_MISSING = (
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_substep_end",
    "on_prediction_step",
    "on_predict",
    "on_push_begin",
)
_FLAGS = ("should_training_stop", "should_log", "should_evaluate", "should_save")
_END = object()


class Arguments(TrainingArguments):
    """What callbacks read of the configuration, under transformers' names. Nothing is decided by
    it, and no device is touched.
    """

    def __post_init__(self) -> None: ...

    @classmethod
    def of(cls, config: TrainConfig, schedule: Schedule, world: World, device: Any) -> "Arguments":
        """Those of a run; without keys that transformers does not have, and the hub's token."""
        known = cls.__dataclass_fields__
        keys = {k: v for k, v in config.to_dict().items() if k in known and k != "hub_token"}
        metric, greater = config.best_metric
        if config.finds_best:
            keys |= {"metric_for_best_model": metric.removeprefix("eval_")}
            keys |= {"greater_is_better": greater}
        for name in ("logging_steps", "eval_steps", "save_steps"):
            keys[name] = config.interval(name, schedule.steps)
        keys["eval_strategy"] = IntervalStrategy(config.eval_strategy)
        keys["save_strategy"] = SaveStrategy(config.save_strategy)
        keys["logging_strategy"] = IntervalStrategy.STEPS
        made = cls(**keys, log_on_each_node=False)
        made.__dict__["_setup_devices"] = device
        made._n_gpu = int(device.type == "cuda")
        made.distributed_state = SimpleNamespace(
            num_processes=world.size,
            process_index=world.rank,
            local_process_index=world.local_rank,
            distributed_type="NO" if world.size == 1 else "MULTI_GPU",
        )
        return made


def check_callbacks(given: Sequence[Any] | None) -> list[TrainerCallback]:
    """The callbacks as objects; a class is called for one, as transformers' Trainer does.

    Raises:
        ConfigError: something else.
    """
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        raise ConfigError(f"callbacks: expected a list, got {type(given).__name__}")
    found = []
    for entry in given:
        made = entry() if isinstance(entry, type) and issubclass(entry, TrainerCallback) else entry
        if not isinstance(made, TrainerCallback):
            name = entry.__name__ if isinstance(entry, type) else type(entry).__name__
            raise ConfigError(
                f"callbacks: expected transformers.TrainerCallback objects, got {name}; derive it "
                "from TrainerCallback, or use on_step"
            )
        found.append(made)
    return found


def _overridden(callback: TrainerCallback, event: str) -> bool:
    return getattr(type(callback), event, None) is not getattr(TrainerCallback, event)


class Callbacks:
    """The callbacks of a run, with the state and the control that they are handed."""

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback],
        config: TrainConfig,
        schedule: Schedule,
        world: World,
        **passed: Any,
    ) -> None:
        """`passed` are the objects that every event gets: model, processing_class, optimizer..."""
        self.callbacks, self.world, self.passed = list(callbacks), world, passed
        self.schedule, self.model = schedule, passed["model"]
        self.control, self.stopping = TrainerControl(), False
        if not callbacks:
            return
        device = next(self.model.parameters()).device
        self.args = Arguments.of(config, schedule, world, device)
        self.state = TrainerState(
            max_steps=schedule.steps,
            num_train_epochs=schedule.epochs,
            logging_steps=int(self.args.logging_steps),
            eval_steps=int(self.args.eval_steps or 0),
            save_steps=int(self.args.save_steps),
            train_batch_size=config.per_device_train_batch_size,
            is_local_process_zero=world.local_rank == 0,
            is_world_process_zero=world.first,
        )
        for callback in callbacks:
            if lost := [event for event in _MISSING if _overridden(callback, event)]:
                names = f"{', '.join(lost)} of {type(callback).__name__}"
                logger.warning(f"callbacks: {names} is not called: there is no such moment here")
        self.event("on_init_end")

    def event(self, name: str, **more: Any) -> None:
        """Call the callbacks that wait for an event, which may change the control."""
        waiting = [c for c in self.callbacks if name in EVENTS and _overridden(c, name)]
        if not waiting:
            return
        with ordinary(self.model):
            for callback in waiting:
                passed = {**self.passed, "train_dataloader": None, "eval_dataloader": None, **more}
                changed = getattr(callback, name)(self.args, self.state, self.control, **passed)
                if changed is not None:
                    self.control = changed
        if self.control.should_epoch_stop:
            raise FastDPOError(
                f"callbacks: should_epoch_stop is not honoured, since an epoch is planned whole; "
                f"set should_training_stop in {name}"
            )

    def position(self, step: int, tokens: int) -> None:
        """Say where the run stands."""
        if self.callbacks:
            self.state.global_step, self.state.num_input_tokens_seen = step, tokens
            self.state.epoch = step / self.schedule.steps_per_epoch

    def steps(self, taken: Iterator[None], first: int) -> Iterator[None]:
        """The steps that are taken from number `first` on, each after its beginning was told, until
        one of them is the last or a callback stops the run.
        """
        for number in range(first, self.schedule.steps):
            if self.stopping:
                return
            self.control._new_step()
            if number % self.schedule.steps_per_epoch == 0 or number == first:
                self.event("on_epoch_begin")
            self.event("on_step_begin")
            if next(taken, _END) is _END:
                return
            yield

    def step_end(self, **due: bool) -> None:
        """Tell of a step's end; `due` (log, evaluate, save) is what follows unless a callback
        decides otherwise.
        """
        for name, value in due.items():
            setattr(self.control, f"should_{name}", value)
        self.event("on_step_end")
        if self.callbacks and self.state.global_step % self.schedule.steps_per_epoch == 0:
            self.event("on_epoch_end")
        self.agree()

    def logged(self, metrics: Mapping[str, float]) -> None:
        """Tell of metrics that were logged."""
        if self.callbacks:
            entry = {**metrics, "step": self.state.global_step}
            self.state.log_history.append(entry)
            self.event("on_log", logs=dict(metrics))

    def best(self, value: float | None, step: int, kept: Any) -> None:
        """Say which evaluation is the best so far."""
        if self.callbacks and value is not None:
            self.state.best_metric, self.state.best_global_step = value, step
            self.state.best_model_checkpoint = None if kept is None else str(kept)

    def agree(self) -> None:
        """Make the control the same on every rank: what is asked for on one happens on all."""
        if not self.callbacks:
            return
        own = [getattr(self.control, name) for name in _FLAGS]
        flags = [any(values) for values in zip(*self.world.gather_all(own), strict=True)]
        for name, value in zip(_FLAGS, flags, strict=True):
            setattr(self.control, name, value)
        self.stopping = self.control.should_training_stop
