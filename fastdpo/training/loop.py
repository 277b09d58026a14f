"""The training loop: whole steps of exactly so many units, each packed into a few rows."""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import TrainConfig
from ..data.ahead import ahead
from ..data.dataset import Data
from ..data.plan import Plan, epoch_plan, plan_digest
from ..devices import peak_memory_mib
from ..errors import ConfigError
from ..model.head import base_causal_lm
from ..model.layers import layers_of
from ..model.layout import ordinary
from ..model.sharding import add_replicas_up
from ..model.shares import load_any_weights
from ..parallel.pace import Pace
from ..parallel.restart import mark_begun
from . import checkpoint, metrics
from .best import Best, compare, require_metric, take_best
from .callbacks import Callbacks
from .changes import check_identity, deciding, describe_changes
from .optimizer import make_scheduler, restart
from .output import METRICS, TRACE, Output
from .profile import profiler
from .reporting import Reporter
from .saves import Saves
from .schedule import Schedule
from .services import make_trackers
from .step import Objective, StepBatches
from .trackers import MetricsLog, Tracker
from .update import make_update, require_one_row
from .uploads import Uploads

logger = logging.getLogger(__name__)


class Trainer:
    """One run: `resume()` goes where a checkpoint ended, `train()` takes every step that is left,
    evaluates, logs and saves on the way.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        tokenizer: Any,
        data: Data,
        max_tokens: int,
        output: Output,
        identity: dict[str, Any],
        units: int,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
        callbacks: Sequence[Any] = (),
        uploads: Uploads | None = None,
        card: Callable[[dict[str, float]], str] = str,
    ) -> None:
        self.config, self.objective, self.tokenizer = config, objective, tokenizer
        self.data, self.max_tokens, self.output = data, max_tokens, output
        self.on_step, self.uploads, self.card = on_step, uploads or Uploads(None), card
        self.model, self.device = objective.policy.model, objective.policy.device
        self.moving = objective.reference if config.sync_ref_model else None
        self.world = objective.world
        layers = layers_of(base_causal_lm(self.model)) if self.world.sharded else ()
        self.pace = Pace(self.world, self.device, layers)
        self.schedule = Schedule(config, data.train, units)
        self.total_steps = self.schedule.steps
        head = objective.policy.head.weight if self.world.vocabulary else None
        self.update = make_update(self.model, config, self.device, self.world, head)
        self.optimizer, self.pending = self.update.optimizer, self.update.pending
        self.saves = Saves(self.world, config.ddp_timeout)
        self.scheduler = make_scheduler(self.optimizer, config, self.total_steps)
        self.best, self.last = Best(config), dict[str, float]()
        self.callbacks = Callbacks(
            callbacks,
            config,
            self.schedule,
            self.world,
            model=self.model,
            processing_class=tokenizer,
            optimizer=self.optimizer,
            lr_scheduler=self.scheduler,
        )
        self.report = Reporter(
            config, output.path, objective.policy, tokenizer, data, self.world, self.total_steps
        )
        hidden = config.disable_tqdm if self.world.first else True
        self.bar = tqdm(total=self.total_steps, unit="step", disable=hidden)
        self.step = self.num_tokens = 0
        self.seconds, self.tokens_before = 0.0, 0
        self.resumed: int | None = None
        self._names: list[str] = []
        if config.optimizer_in_backward:
            epochs = map(self.plan, range(self.schedule.epochs))
            require_one_row(epochs, data.train, objective.policy.layout.name, config)
        self.identity = identity | {"data": plan_digest(data.train, self.plan(0))}

    def plan(self, epoch: int) -> Plan:
        """The steps of an epoch."""
        return epoch_plan(
            self.config,
            self.data.train,
            layout=self.objective.policy.layout.name,
            max_tokens=self.max_tokens,
            epoch=epoch,
            ranks=self.world.data_size,
            units=self.schedule.units,
            lockstep=self.world.sharded,
        )

    def train(self, steps: Generator[None, None, None] | None = None) -> dict[str, float]:
        """Run to the last step; returns the last value of every metric.

        `steps` takes every step that is left and yields after each (default: `take_steps`).
        """
        config, folder = self.config, self.output.path
        require_metric(self)
        trackers: list[Tracker] = [self.report]
        if self.world.first:
            trackers += make_trackers(config, folder, self.resumed)
        self.log = MetricsLog(folder / METRICS, trackers, self.resumed, writes=self.world.first)
        self.last = self.log.last()
        self.report.begin(self.step)
        self.callbacks.position(self.step, self.num_tokens)
        self.callbacks.event("on_train_begin")
        self.callbacks.agree()
        if self.step == 0 and self.schedule.begins_with_evaluation(self.data.evaluation):
            self.last |= self._evaluate()
        self.model.train()
        traced = config.profile_steps if self.world.first else 0
        trace = profiler(traced, folder / TRACE, self.device)
        taken = steps or self.take_steps()
        with closing(self.log), closing(self.update), closing(taken), trace as watch, self.saves:
            self._take_all(taken, watch)
        self.bar.close()
        self._begin()
        take_best(self)
        self.callbacks.event("on_train_end")
        self.report.end(self.step)
        return self.last

    def _take_all(self, taken: Generator[None, None, None], watch: Any) -> None:
        """Take the steps until the last one, or until the run is stopped."""
        if self.best.stops:  # it was, at the checkpoint that is gone on from
            return
        start = time.perf_counter()
        for _ in self.callbacks.steps(taken, self.step):
            watch.step()
            self.seconds += time.perf_counter() - start
            logged = self._after_step()
            if self.on_step is not None:
                with ordinary(self.model):
                    self.on_step(self.step, logged)
            if self.stopped:
                break
            start = time.perf_counter()

    @property
    def stopped(self) -> bool:
        """Whether the run ends before its last step."""
        return self.step < self.total_steps and (self.best.stops or self.callbacks.stopping)

    def _begin(self) -> None:
        """Take the output directory, which was left as it was until a step had been taken."""
        self.output.begin(self.config)
        if self.world.first:
            mark_begun(self.config.output_dir)
        self.log.open()
        if self.resumed is not None:  # a kill may have come between a save and its rotation
            self._rotate(self.resumed)

    def _rotate(self, newest: int) -> None:
        if self.world.first:
            limit = self.config.save_total_limit
            checkpoint.rotate(self.output.path, limit, newest, self.best.kept)

    def steps_left(self) -> Iterator[StepBatches]:
        """The steps that are left, on the host, as they are packed now."""
        first = self.step
        for number in range(first, self.total_steps):
            epoch, place = divmod(number, self.schedule.steps_per_epoch)
            if place == 0 or number == first:
                plan = self.plan(epoch)
            yield self.objective.batches(self.data.train, plan[place])

    def take_steps(self) -> Generator[None, None, None]:
        """Take every step that is left; yields after each."""
        with closing(ahead(self.steps_left())) as made:
            for step in self.pace.waits(made):
                start = time.perf_counter()
                self.finish(step, self.gradients(step), start)
                yield

    def gradients(self, step: StepBatches) -> metrics.StepSums:
        """Score a step's rows forward and backward; nothing but gradients changes."""
        sums, terms = metrics.StepSums(self.device), self.objective.terms(step)
        with self.pace.rows():
            for number, batch in enumerate(step.batches, 1):
                if self.world.sharded:
                    add_replicas_up(self.model, number == len(step.batches))
                loss = self.objective.score(batch, step.units, sums, terms)
                self.update.backward(loss, self.step)
        return sums

    def finish(self, step: StepBatches, sums: metrics.StepSums, start: float) -> None:
        """Take the step that these gradients ask for; it began at `start` of `perf_counter`."""
        sums.over(self.world, self._names)
        norm = self.update.norm()
        rate = float(self.scheduler.get_last_lr()[0])
        self.pending.check(self.step, step, sums, norm, rate)
        self.update.step()
        self.scheduler.step()
        self.objective.keep_running()
        self.step += 1
        if self.moving is not None and self.step % self.config.ref_model_sync_steps == 0:
            self.moving.follow(self.model, self.config.ref_model_mixup_alpha)
        self.num_tokens += step.pair_tokens
        self.pending.took(time.perf_counter() - start)
        self.bar.update()

    def _after_step(self) -> dict[str, float]:
        """Read, log, evaluate and save where that is due; the metrics that were logged."""
        first = self.step == (self.resumed or 0) + 1
        self.callbacks.position(self.step, self.num_tokens)
        self.callbacks.step_end(
            log=self.schedule.logs(self.step),
            evaluate=bool(self.data.evaluation) and self.schedule.evaluates(self.step),
            save=self.schedule.saves(self.step),
        )
        control = self.callbacks.control
        log, evaluate = control.should_log, control.should_evaluate and bool(self.data.evaluation)
        if self.pending.waits or first or log or evaluate or control.should_save:
            self._read()
        self.output.require()
        if first:
            self._begin()
        logged = self._write_metrics() if log else {}
        if evaluate:
            found = self._evaluate()
            compare(self, found)
            logged |= found
        self.last |= logged
        if self.callbacks.control.should_save:
            self._save()
        self.callbacks.agree()
        return logged

    def _read(self) -> None:
        """Bring metrics to the host; log the first loss beside that of a policy which still is its
        reference.
        """
        values = self.pending.read(partial(metrics.rates, self.model, self.world.size))
        self.bar.set_postfix_str(metrics.show(values), refresh=False)
        if self.step != 1 or self.config.ref_model_name_or_path is not None:
            return
        if (expected := self.objective.loss.at_reference()) is not None:
            logger.info(f"first loss {values['loss']:.7f}, with policy = reference {expected:.7f}")

    def _write_metrics(self) -> dict[str, float]:
        result = self.pending.line() | self._position()
        result["peak_memory_mib"] = max(self.world.gather_all(peak_memory_mib(self.device)))
        self.log.write(result, self.step)
        self.callbacks.logged(result)
        if line := self.pace.slowest(self.step):
            logger.warning(line)
        if self.bar.disable and self.world.first:
            logger.info(f"step {self.step}/{self.total_steps}: {metrics.show(result)}")
        return result

    def _position(self) -> dict[str, float]:
        return {"epoch": self.step / self.schedule.steps_per_epoch, "num_tokens": self.num_tokens}

    def _evaluate(self) -> dict[str, float]:
        size = self.config.per_device_eval_batch_size
        result = self.objective.evaluate(self.data.evaluation, self.max_tokens, size)
        result |= self._position()
        self.log.write(result, self.step)
        logger.info(f"evaluation at step {self.step}: {metrics.show(result)}")
        self.callbacks.logged(result)
        self.callbacks.event("on_evaluate", metrics=result)
        return result

    def _save(self) -> None:
        self.log.sync()
        path = self.output.path / f"checkpoint-{self.step}"
        self.best.saved(path)
        self.saves.save(
            path,
            then=partial(self._saved, path, self.best.kept, self.card(self.last)),
            model=self.model,
            tokenizer=self.tokenizer,
            optimizer=None if self.config.save_only_model else self.optimizer,
            reference=None if self.moving is None else self.moving.weights(),
            state={
                "step": self.step,
                "num_tokens": self.num_tokens,
                "units": self.schedule.units,
                "pending": self.pending.values,
                "running": self.objective.running_state(),
                "config": deciding(self.config),
                "identity": self.identity,
                "best": self.best.state(),
            },
        )
        if self.callbacks.callbacks:
            self.saves.wait()  # a callback may read what was written
            self.callbacks.best(self.best.value, self.best.step, self.best.kept)
            self.callbacks.event("on_save")

    def _saved(self, path: Path, best: Path | None, card: str) -> None:
        """What follows a checkpoint on the first rank, perhaps in another thread."""
        self.uploads.checkpoint(path, card)
        newest = checkpoint.step_of(path)
        checkpoint.rotate(self.output.path, self.config.save_total_limit, newest, best)

    def resume(self, path: Path, state: dict[str, Any]) -> None:
        """Go on from a verified checkpoint and its state, with its weights, moments and random
        state, and with the rates that the configuration asks for.

        Raises:
            CheckpointError: it was made for something else than this run trains.
            ConfigError: it was taken after the last step of this run.
        """
        check_identity(path, state, self.config, self.identity)
        if state["step"] > self.total_steps:
            raise ConfigError(
                f"resume_from_checkpoint: {path} was taken at step {state['step']}, after the last "
                f"of this run's {self.total_steps}; raise max_steps or num_train_epochs"
            )
        load_any_weights(self.model, self.config, path)
        if self.moving is not None:
            self.moving.load(checkpoint.read_reference(path), path)
        checkpoint.restore(path, state, self.optimizer, self.world)
        self.step = self.resumed = state["step"]
        restart(self.scheduler, self.step)
        self.num_tokens, self.pending.values = state["num_tokens"], state["pending"]
        self.tokens_before = self.num_tokens
        self.objective.resume_running(state.get("running", {}))
        self.best.resume(path, state.get("best", {}))
        self.callbacks.best(self.best.value, self.best.step, self.best.kept)
        self.bar.update(self.step)
        logger.info(f"resumed at step {self.step} from {path}")
        if line := describe_changes(state, self.config):
            logger.info(line)
