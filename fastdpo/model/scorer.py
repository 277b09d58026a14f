"""A model that scores packed batches: hidden states of the scored tokens, then the head. Policy and
reference alike.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from fastdpo_kernels import linear_dpo_loss, linear_logprob
from torch import Tensor

from ..data.batch import Batch
from .head import Head, effective_weight, hidden_states
from .layout import Layout


@dataclass
class Scorer:
    """A causal language model with its head, the row layout that is exact for it, and the precision
    to run it in.
    """

    model: Any  # a transformers or peft model
    head: Head
    layout: Layout
    autocast: torch.dtype | None = None
    workspace_mib: int = 512

    @property
    def device(self) -> torch.device:
        """Where the head's weight lies."""
        return self.head.weight.device

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context of every forward, none in full precision."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def scored_states(self, batch: Batch) -> Tensor:
        """Hidden states (T, H) that predict the scored tokens of a batch on this device."""
        with self.precision():
            states = self._forward(batch)
        return states.reshape(-1, states.shape[-1]).index_select(0, batch.score_index)

    def _forward(self, batch: Batch) -> Tensor:
        if batch.layout != self.layout.name:
            raise ValueError(
                f"a {batch.layout} batch for a model whose rows are {self.layout.name}"
            )
        if batch.layout != "padded":
            return hidden_states(
                self.model,
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                fastdpo_segments=batch.segments,
            )
        ids, mask = batch.input_ids, batch.attention_mask
        assert mask is not None
        if self.layout.max_batch is None:
            return hidden_states(self.model, input_ids=ids, attention_mask=mask)
        lines = []
        for line, length in enumerate(batch.lengths()):
            one = slice(line, line + 1), slice(0, length)
            states = hidden_states(self.model, input_ids=ids[one], attention_mask=mask[one])
            lines.append(torch.nn.functional.pad(states, (0, 0, 0, ids.shape[1] - length)))
        return torch.cat(lines)

    def _head_operands(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states and weight; the head computes in the dtype of the states."""
        states, weight = self.scored_states(batch), effective_weight(self.head)
        if weight is not self.head.weight:  # rounded to bf16, an adapter's update would vanish
            states = states.to(torch.promote_types(states.dtype, weight.dtype))
        return states, weight

    def _head_arguments(self) -> dict[str, Any]:
        return {
            "bias": self.head.bias,
            "softcap": self.head.softcap,
            "logit_scale": self.head.logit_scale,
            "workspace_mib": self.workspace_mib,
        }

    @torch.no_grad()
    def token_logps(self, batch: Batch) -> Tensor:
        """Log-probability (T,) of every scored token, nats, fp32; no gradient."""
        states, weight = self._head_operands(batch)
        return linear_logprob(states, weight, batch.targets, **self._head_arguments())

    def response_logps(self, batch: Batch) -> Tensor:
        """Log-probability (R,) of every response, summed over tokens, nats, fp64; no gradient."""
        logps = self.token_logps(batch)
        total = logps.new_zeros(len(batch.response_lengths), dtype=torch.float64)
        return total.index_add_(0, batch.response_ids, logps.double())

    def loss(
        self,
        batch: Batch,
        ref_logps: Tensor,
        loss_function: Any,
        comparisons_in_step: int,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor, Tensor, Any]:
        """This batch's share of a step's mean loss, the responses' log-probabilities, and per-token
        statistics.
        """
        states, weight = self._head_operands(batch)
        indices = batch.host or batch
        loss, logps, *stats = linear_dpo_loss(
            states,
            weight,
            batch.targets,
            indices.response_ids,
            indices.comparisons,
            ref_logps,
            loss_type=loss_function,
            comparison_weights=batch.weights / comparisons_in_step,
            response_lengths=batch.response_lengths,
            outputs=outputs,
            **self._head_arguments(),
        )
        return loss, logps, stats[0] if stats else None
