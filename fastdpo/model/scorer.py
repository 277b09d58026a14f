"""A model that scores packed batches: hidden states of the scored tokens, then the head. Policy and
reference alike.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fastdpo_kernels import (
    compile_ahead,
    linear_logprob,
    linear_loss,
    vocab_parallel_logprob,
    vocab_parallel_loss,
)
from fastdpo_kernels.losses import Loss
from fastdpo_kernels.ops import LinearLoss
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..data.batch import Batch
from .context import ContextGroup, padded_context
from .context_loss import context_loss, scored_part, together
from .forward import batch_states
from .head import Head, effective_weight
from .layout import Layout
from .sharding import inside, is_sharded

TOKEN_STATS = ("entropy", "mean_logit", "is_top1")
"""What is measured of every scored token beside its log-probability."""


@dataclass
class Scorer:
    """A causal language model with its head, the row layout that is exact for it, and the precision
    to run it in.

    With a `context` every method is called by all ranks of the group, with the same batch, and
    returns the same on each; a weight's gradient is the sum over the ranks. With `shares` each of
    those ranks holds some rows of the head, and calls with a batch of its own.
    """

    model: Any  # a transformers or peft model
    head: Head
    layout: Layout
    autocast: torch.dtype | None = None
    workspace_mib: int | None = None
    context: ContextGroup | None = None
    shares: dist.ProcessGroup | None = None
    from_first: bool = False
    """Whether the first rank alone has the weights, until they are sharded."""

    @property
    def device(self) -> torch.device:
        """Where the head's weight lies."""
        return self.head.weight.device

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context of every forward, none in full precision.

        Its cache would keep a rounded copy of every whole weight of a sharded model.
        """
        if self.autocast is None:
            return nullcontext()
        cached = not is_sharded(self.model)
        return torch.autocast(self.device.type, self.autocast, cache_enabled=cached)

    def scored_states(self, batch: Batch) -> Tensor:
        """Hidden states (T, H) that predict the scored tokens of a batch on this device; with a
        context (t, H), those of this rank's part of them.

        Raises ConfigError for a context where rows are padded.
        """
        if batch.layout != self.layout.name:
            raise ValueError(
                f"a {batch.layout} batch for a model whose rows are {self.layout.name}"
            )
        if self.context is not None and self.layout.name == "padded":
            raise padded_context(self.layout.reason)
        with self.precision():
            states = batch_states(
                self.model, batch, one_by_one=self.layout.one_by_one, context=self.context
            )
        if self.context is not None:
            return scored_part(states[0], batch, self.context)
        return states.reshape(-1, states.shape[-1]).index_select(0, batch.score_index)

    def _head_operands(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states and weight; the head computes in the dtype of the states."""
        states, weight = self.scored_states(batch), effective_weight(self.head)
        if self.shares is not None:
            assert isinstance(weight, DTensor)
            return states, weight.to_local()
        if weight is not self.head.weight:  # rounded to bf16, an adapter's update would vanish
            states = states.to(torch.promote_types(states.dtype, weight.dtype))
        return states, weight

    def _own_targets(self, batch: Batch) -> Tensor:
        """The targets (T,), or (t,) of this rank's part, of what `scored_states` gives."""
        if self.context is None:
            return batch.targets
        return batch.targets[self.context.part(len(batch.targets))]

    def _head_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "bias": self.head.bias,
            "softcap": self.head.softcap,
            "logit_scale": self.head.logit_scale,
            "workspace_mib": self.workspace_mib,
        }
        if self.shares is None:
            return arguments
        weight, bias = self.head.weight, self.head.bias
        assert isinstance(weight, DTensor)
        _, (start, *_) = compute_local_shape_and_global_offset(
            weight.shape, weight.device_mesh, weight.placements
        )
        if bias is not None:
            arguments["bias"] = bias[start : start + len(weight.to_local())]
        return arguments | {"group": self.shares}

    def _head_functions(self) -> tuple[Callable[..., Any], Callable[..., LinearLoss]]:
        """The head's log-probabilities and its loss, with the whole weight or with some rows."""
        if self.shares is None:
            return linear_logprob, linear_loss
        return vocab_parallel_logprob, vocab_parallel_loss

    def compile_head(self, loss: Loss, outputs: tuple[str, ...] = ()) -> None:
        """Compile the kernels of the head that scoring and `loss` will launch; on a GPU only."""

        def compile_each() -> None:
            arguments, weight = self._head_arguments(), effective_weight(self.head)
            arguments = {name: arguments[name] for name in ("bias", "softcap", "logit_scale")}
            weight = weight.to_local() if isinstance(weight, DTensor) else weight
            # Under autocast the model's last norm decides in which dtype the states come out.
            for dtype in dict.fromkeys((self.autocast or weight.dtype, weight.dtype)):
                compile_ahead(weight, dtype=dtype, outputs=outputs, loss=loss, **arguments)

        if self.device.type == "cuda":
            inside(self.model, compile_each)

    @torch.no_grad()
    def token_logps(self, batch: Batch) -> Tensor:
        """Log-probability (T,) of every scored token, nats, fp32; no gradient."""

        def score() -> Tensor:
            states, weight = self._head_operands(batch)
            targets = self._own_targets(batch)
            logprob, _ = self._head_functions()
            logps = logprob(states, weight, targets, **self._head_arguments())
            if self.context is None:
                return logps
            return together(logps[None], len(batch.targets), self.context)[0]

        return inside(self.model, score)

    def response_logps(self, batch: Batch) -> Tensor:
        """Log-probability (R,) of every response, summed over tokens, nats, fp64; no gradient."""
        logps = self.token_logps(batch)
        total = logps.new_zeros(len(batch.response_lengths), dtype=torch.float64)
        return total.index_add_(0, batch.response_ids, logps.double())

    def idle_loss(self, batch: Batch, loss: Loss, outputs: tuple[str, ...] = ()) -> Tensor:
        """Zero, (), for a batch without units, whose forward and backward take part in those of
        `loss` on the other ranks.
        """
        if self.shares is not None:
            plain = Loss.named("sigmoid", beta=0.1, use_weighting=loss.use_weighting)
            ref_logps = batch.response_lengths.new_zeros(len(batch.response_lengths))
            return self.loss(batch, plain, ref_logps, None, {}, 1, outputs).loss

        def score() -> Tensor:
            states, weight = self._head_operands(batch)
            targets = self._own_targets(batch)
            return linear_logprob(states, weight, targets, **self._head_arguments()).sum() * 0

        return inside(self.model, score)

    def loss(
        self,
        batch: Batch,
        loss: Loss,
        ref_logps: Tensor | None,
        ref_token_logps: Tensor | None,
        given: dict[str, Tensor],
        units_in_step: int,
        outputs: tuple[str, ...] = (),
    ) -> LinearLoss:
        """This batch's share of a step's mean loss, and the log-probabilities that it is made of.

        ref_logps (R,) and ref_token_logps (T,) are the reference's, nats; `given` are constants of
        the units.
        """
        indices = batch.host or batch
        unit_weights = batch.weights / units_in_step

        def score() -> LinearLoss:
            states, weight = self._head_operands(batch)
            if self.context is not None:
                return context_loss(
                    states,
                    weight,
                    batch,
                    self.context,
                    loss,
                    ref_logps,
                    ref_token_logps,
                    given,
                    unit_weights,
                    outputs,
                    **self._head_arguments(),
                )
            _, scored = self._head_functions()
            return scored(
                states,
                weight,
                batch.targets,
                indices.response_ids,
                indices.units,
                ref_logps,
                loss=loss,
                given=given,
                ref_token_logps=ref_token_logps,
                unit_weights=unit_weights,
                response_lengths=batch.response_lengths,
                outputs=outputs,
                **self._head_arguments(),
            )

        return inside(self.model, score)
