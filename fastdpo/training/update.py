"""From a step's losses to new weights: backward, the gradients' norm, the optimizer's step.

Ordinarily every gradient of a step is kept until all are there. `optimizer_in_backward` steps each
weight in a hook that autograd calls once its gradient is complete (once also for a weight that is
used twice, such as a tied embedding) and frees the gradient. A step is then one backward: one row.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..config import TrainConfig
from ..data.groups import Group
from ..data.packing import part_tokens
from ..data.plan import Step
from ..errors import ConfigError
from ..parallel.gradients import add_gradients
from ..parallel.world import ALONE, World
from .optimizer import make_optimizer
from .pending import Pending


class Update:
    """Gradients of a whole step over all ranks, clipped, then one step of the optimizer."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrainConfig,
        device: torch.device,
        world: World = ALONE,
        rows: Any = None,
    ) -> None:
        self.world, self.rows = world, rows
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_norm = config.max_grad_norm or math.inf
        self.free = device.type == "cuda"
        self.optimizer = make_optimizer(model, config)
        self.hooks: list[Any] = []
        self.pending = Pending(self.optimizer, device)

    def close(self) -> None:
        """Leave the weights' gradients alone from now on."""
        for hook in self.hooks:
            hook.remove()

    def backward(self, loss: Tensor, step: int) -> None:
        """Gradients of a row's loss, added to those of the step's other rows."""
        loss.backward()

    def norm(self) -> Tensor:
        """The norm of the step's gradient, (); it is scaled to `max_grad_norm` where larger."""
        if self.world.size > 1 and not self.world.sharded:  # FSDP has added them up by now
            add_gradients(self.parameters)
        self._add_rows()
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if math.isfinite(self.max_norm):
            self.clip(norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _add_rows(self) -> None:
        """Sum the gradient of a head sharded over the vocabulary, which FSDP leaves alone, over the
        replicas.
        """
        mesh = self.world.mesh
        if mesh is None or self.rows is None or mesh.size(0) == 1 or self.rows.grad is None:
            return
        local = self.rows.grad.to_local()
        total = local.to(torch.promote_types(local.dtype, torch.float32))
        dist.all_reduce(total, group=mesh.get_group("replicate"))
        local.copy_(total)

    def clip(self, norm: Tensor) -> None:
        """Scale the gradients as their norm asks for."""
        clip_grads_with_norm_(self.parameters, self.max_norm, norm)

    def step(self) -> None:
        """New weights; the gradients are gone."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.free)


class GradientNorms:
    """The norm of each gradient, taken when it is complete and before it is used."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.norms: dict[int, Tensor] = {}
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._take, number))
            for number, parameter in enumerate(parameters)
        ]

    def _take(self, number: int, parameter: Tensor) -> None:
        if number in self.norms:
            raise ConfigError(
                "optimizer_in_backward: a step took more than one backward pass; expected one row "
                "a step (raise max_tokens_per_batch or lower per_device_train_batch_size)"
            )
        assert parameter.grad is not None
        self.norms[number] = torch.linalg.vector_norm(parameter.grad)

    def total(self) -> Tensor:
        """The norm of all gradients since the last call, (), in the order of the weights."""
        norms, self.norms = [self.norms[number] for number in sorted(self.norms)], {}
        return torch.linalg.vector_norm(torch.stack(norms))


class InBackward(Update):
    """Each weight is stepped, and its gradient freed, as soon as that gradient is complete."""

    def __init__(self, model: torch.nn.Module, config: TrainConfig, device: torch.device) -> None:
        super().__init__(model, config, device)
        self.norms = GradientNorms(self.parameters)
        self.pending.in_backward = True
        self.group = {
            parameter: number
            for number, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
        }
        self.hooks = self.norms.hooks + [
            parameter.register_post_accumulate_grad_hook(partial(self._step_one, number))
            for number, parameter in enumerate(self.parameters)
        ]

    def backward(self, loss: Tensor, step: int) -> None:
        """Gradients and new weights, unless the loss is not finite."""
        self.pending.guard(step, loss)
        loss.backward()

    def _step_one(self, number: int, parameter: Tensor) -> None:
        if not self.pending.waits:
            self.pending.flag(self.norms.norms[number])
        groups = self.optimizer.param_groups
        own = {**groups[self.group[parameter]], "params": [parameter]}
        self.optimizer.param_groups = [own]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        parameter.grad = None

    def norm(self) -> Tensor:
        """The norm of the step's gradient, (), which is gone by now."""
        return self.norms.total()

    def step(self) -> None:
        """Return at once: every weight was stepped in the backward."""


class Offloaded(Update):
    """torchao's CPUOffloadOptimizer, whose hooks copy each complete gradient to the host, where
    every weight has a copy and an optimizer of its own.
    """

    def __init__(self, model: torch.nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.norms: GradientNorms | None = None
        if config.optimizer_in_backward:  # before torchao's hooks, which free the gradients
            self.norms = GradientNorms([p for p in model.parameters() if p.requires_grad])
        super().__init__(model, config, device)
        self.free = True  # the only way that torchao knows
        self.hooks = self.norms.hooks if self.norms else []

    def norm(self) -> Tensor:
        """The norm of the step's gradient, (), which is scaled on the host."""
        if self.norms is None:
            return super().norm()
        norm = self.norms.total()
        self.clip(norm)
        return norm

    def clip(self, norm: Tensor) -> None:
        """Scale the host's copies of the gradients, and those of small weights, which stay."""
        optimizer: Any = self.optimizer
        factor = float((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        if factor == 1.0:
            return
        for copied in optimizer.queue.values():
            copied.synchronize()
        grads = [optimizer.param_d2h_map[p].grad for p in optimizer.queue]
        grads += [p.grad for p in self.parameters if p not in optimizer.param_d2h_map]
        torch._foreach_mul_([g for g in grads if g is not None], factor)


def make_update(
    model: torch.nn.Module,
    config: TrainConfig,
    device: torch.device,
    world: World = ALONE,
    rows: Any = None,
) -> Update:
    """What the keys `optim` and `optimizer_*` ask for; `rows` is the weight of a head that is
    sharded over the vocabulary.
    """
    if config.optimizer_offload:
        return Offloaded(model, config, device)
    if config.optimizer_in_backward:
        return InBackward(model, config, device)
    return Update(model, config, device, world, rows)


def require_one_row(
    epochs: Iterable[Sequence[Step]], groups: Sequence[Group], layout: str, config: TrainConfig
) -> None:
    """Raise ConfigError if a step of these epochs takes more than one row."""
    for epoch, steps in enumerate(epochs, 1):
        for number, step in enumerate(steps, 1):
            rows = step.ranks[0]
            if len(rows) > 1:
                parts = [part for row in rows for part in row]
                tokens = sum(part_tokens(groups[p.group], p.responses, layout) for p in parts)
                units = f"{groups[0].unit}s"
                raise ConfigError(
                    f"optimizer_in_backward: step {number} of epoch {epoch} takes {len(rows)} rows "
                    f"for its {step.units} {units}; expected one row a step (raise "
                    f"max_tokens_per_batch to some {tokens}, or take fewer {units} a step: "
                    f"per_device_train_batch_size {config.per_device_train_batch_size} x "
                    f"gradient_accumulation_steps {config.gradient_accumulation_steps})"
                )
