"""The training loop: whole steps of exactly so many comparisons, each packed into a few rows."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from ..config import TrainConfig
from ..data.groups import Group, count_comparisons
from ..data.plan import Step, make_plan, plan_digest
from ..errors import CheckpointError, FastDPOError
from ..losses import loss_at_reference
from . import checkpoint, metrics
from .optimizer import make_optimizer, make_scheduler
from .step import Objective


class Trainer:
    """One run: `train()` takes every step that is left, evaluates, logs and saves on the way."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        tokenizer: Any,
        groups: list[Group],
        eval_groups: list[Group],
        max_tokens: int,
        load_weights: Callable[[Path], None],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.objective, self.tokenizer = config, objective, tokenizer
        self.groups, self.eval_groups, self.max_tokens = groups, eval_groups, max_tokens
        self.load_weights, self.say = load_weights, say
        self.model, self.device = objective.policy.model, objective.policy.device
        self.output_dir = Path(config.output_dir)
        self.per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(count_comparisons(groups) / self.per_step)
        epochs = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else epochs
        self.every = {
            name: config.interval(f"{name}_steps", self.total_steps)
            for name in ("logging", "save", "eval")
        }
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, config)
        self.scheduler = make_scheduler(self.optimizer, config, self.total_steps)
        self.bar = tqdm(total=self.total_steps, unit="step", disable=config.disable_tqdm)
        self.step = self.num_tokens = 0
        self.pending: dict[str, list[float]] = {}
        self.digest = plan_digest(groups, self.plan(0))

    def plan(self, epoch: int) -> list[Step]:
        """The steps of an epoch: the same for the same data, seed and step size."""
        seed = self.config.seed if self.config.data_seed is None else self.config.data_seed
        return make_plan(
            self.groups,
            comparisons_per_step=self.per_step,
            max_tokens=self.max_tokens,
            layout=self.objective.policy.layout.name,
            seed=seed if self.config.shuffle else None,
            epoch=epoch,
        )

    def train(self) -> dict[str, float]:
        """Run to the last step and write the model; returns the last value of every metric."""
        config, resumed = self.config, self._resume()
        trackers = metrics.make_trackers(
            config.report_to, self.output_dir, config.run_name, config.to_dict()
        )
        self.log = metrics.MetricsLog(self.output_dir / "metrics.jsonl", trackers, resumed)
        last: dict[str, float] = {}
        if config.eval_on_start and self.step == 0:
            last |= self._evaluate()
        self.model.train()
        epoch, plan = -1, []
        while self.step < self.total_steps:
            if self.step // self.steps_per_epoch != epoch:
                epoch = self.step // self.steps_per_epoch
                plan = self.plan(epoch)
            self._take(plan[self.step % self.steps_per_epoch])
            if self._due("steps", "logging") or (config.logging_first_step and self.step == 1):
                last |= self._write_metrics()
            if self.eval_groups and self._due(config.eval_strategy, "eval"):
                last |= self._evaluate()
            if self._due(config.save_strategy, "save"):
                self._save()
        if config.do_eval and config.eval_strategy == "no":
            last |= self._evaluate()
        self.bar.close()
        checkpoint.save_model(self.output_dir, self.model, self.tokenizer)
        return last

    def _due(self, strategy: str, name: str) -> bool:
        end = self.step == self.total_steps
        if strategy == "epoch":
            return end or self.step % self.steps_per_epoch == 0
        return strategy == "steps" and (end or self.step % self.every[name] == 0)

    def _take(self, step: Step) -> None:
        start = time.perf_counter()
        sums = metrics.StepSums(self.device)
        for row in step.ranks[0]:
            self.objective.score(self.groups, row, step.comparisons, sums).backward()
        norm = clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        values = sums.means() | {"grad_norm": norm.item()}
        self._check(values)
        self.optimizer.step()
        values["learning_rate"] = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=self.device.type == "cuda")
        self.step += 1
        self.num_tokens += sums.pair_tokens
        values |= sums.rates(time.perf_counter() - start, self.model)
        for name, value in values.items():
            self.pending.setdefault(name, []).append(value)
        self.bar.set_postfix_str(metrics.show(values), refresh=False)
        self.bar.update()

    def _check(self, values: dict[str, float]) -> None:
        """Stop before a step that would spoil the weights; show whether the first loss is what it
        has to be.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise FastDPOError(
                    f"step {self.step + 1}: {name} is {values[name]}; stopped with the weights "
                    f"of step {self.step} (try a lower learning_rate, or fp32: --bf16 false)"
                )
        if self.step == 0 and self.config.ref_model_name_or_path is None:
            expected = loss_at_reference(self.objective.loss_function)
            self.say(f"first loss {values['loss']:.7f}, with policy = reference {expected:.7f}")

    def _write_metrics(self) -> dict[str, float]:
        """Means since the last line; of the gradient norm and the learning rate, the last."""
        result = {name: sum(values) / len(values) for name, values in self.pending.items()}
        result |= {name: self.pending[name][-1] for name in ("grad_norm", "learning_rate")}
        self.pending = {}
        result |= self._position()
        result["peak_memory_mib"] = metrics.peak_memory_mib(self.device)
        self.log.write(result, self.step)
        if self.bar.disable:
            self.say(f"step {self.step}/{self.total_steps}: {metrics.show(result)}")
        return result

    def _position(self) -> dict[str, float]:
        return {"epoch": self.step / self.steps_per_epoch, "num_tokens": self.num_tokens}

    def _evaluate(self) -> dict[str, float]:
        result = self.objective.evaluate(self.eval_groups, self.max_tokens) | self._position()
        self.log.write(result, self.step)
        self.say(f"evaluation at step {self.step}: {metrics.show(result)}")
        return result

    def _save(self) -> None:
        whole = not self.config.save_only_model
        checkpoint.save_checkpoint(
            self.output_dir / f"checkpoint-{self.step}",
            model=self.model,
            tokenizer=self.tokenizer,
            optimizer=self.optimizer if whole else None,
            scheduler=self.scheduler if whole else None,
            state={
                "step": self.step,
                "num_tokens": self.num_tokens,
                "pending": self.pending,
                "plan": self.digest,
            },
        )
        checkpoint.rotate(self.output_dir, self.config.save_total_limit)

    def _resume(self) -> int | None:
        """Go on from the checkpoint that the configuration asks for; returns its step, None for a
        new run.
        """
        wanted = self.config.resume_from_checkpoint
        path = checkpoint.find_checkpoint(self.output_dir) if wanted is True else wanted
        if not path:
            return None
        state = checkpoint.load_checkpoint(
            Path(path),
            load_weights=self.load_weights,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
        )
        if state["plan"] != self.digest:
            raise CheckpointError(f"{path}: made with other data, another seed or step size")
        self.step, self.num_tokens, self.pending = (
            state[name] for name in ("step", "num_tokens", "pending")
        )
        self.bar.update(self.step)
        self.say(f"resumed at step {self.step} from {path}")
        return self.step
