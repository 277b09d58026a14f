"""The sharded head as functions of autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import library
from ..call import inside_operator, wide
from ..problem import Problem
from . import regimes
from .call import ShardCall
from .exchange import Exchange
from .merge import TARGET_LOGIT


class Gathered(torch.autograd.Function):
    """The rows of all ranks; every rank's gradient of them is added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange, counts: list[int]) -> Tensor:
        ctx.exchange, ctx.counts = exchange, counts
        return exchange.gather(rows, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.reduce(gradient, ctx.counts, False), None, None


class Logprob(torch.autograd.Function):
    """Log-probabilities (T,) and `outputs`: of a frozen head with ∂logp_t/∂x_t, else with a second
    pass in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: ShardCall,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.frozen = call, call.needs.hidden and not call.needs.head
        with inside_operator(hidden):
            tiles = call.make_tiles(weight, bias)
            if ctx.frozen:
                stats, gradient = regimes.score_with_gradient(call, tiles, outputs)
                ctx.save_for_backward(call.spread(gradient))
            else:
                stats, kept = regimes.score(call, tiles, outputs, keep=call.needs.head)
                ctx.save_for_backward(weight, bias, stats["logprob"], stats[TARGET_LOGIT], *kept)
        others = call.spread_all(stats, outputs)
        ctx.mark_non_differentiable(*others)
        return call.spread(stats["logprob"]).clone(), *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        call: ShardCall = ctx.call
        if ctx.frozen:
            (kept,) = ctx.saved_tensors
            gradient = kept * grad_logprob.unsqueeze(1)
            return gradient.to(call.input_dtypes.hidden), *(None,) * 4
        weight, bias, logprob, target, *states = ctx.saved_tensors
        with inside_operator(logprob):
            stats = {"logprob": logprob, TARGET_LOGIT: target}
            coefficients = call.take(grad_logprob).to(logprob.dtype)
            tiles = call.make_tiles(weight, bias)
            parts = regimes.logprob_gradients(call, tiles, states, stats, coefficients)
        return *_wanted(ctx, call, parts), None, None


class Loss(torch.autograd.Function):
    """Loss (), log-probabilities of responses (R,) and tokens (T,), and `outputs` (T,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: ShardCall,
        problem: Problem,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        ctx.call = call
        with inside_operator(hidden):
            tiles = call.make_tiles(weight, bias)
            result = regimes.preference_loss(call, tiles, problem, outputs)
        ctx.save_for_backward(*_wanted(ctx, call, result.gradients))
        dtype = wide(call.hidden.dtype)
        values = (result.logps.to(dtype), call.spread(result.stats["logprob"]))
        others = (*values, *call.spread_all(result.stats, outputs))
        ctx.mark_non_differentiable(*others)
        return result.loss.to(dtype), *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with inside_operator(grad_loss):
            pairs = zip(ctx.saved_tensors, ctx.call.input_dtypes, strict=True)
            parts = [None if t is None else library.times(t, grad_loss, d) for t, d in pairs]
        return *parts, None, None, None


def _wanted(
    ctx: Any, call: ShardCall, parts: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, all of this rank's, and of the head, where autograd asks."""
    hidden, *others = parts
    hidden = None if hidden is None else call.spread(hidden)
    asked = zip((hidden, *others), ctx.needs_input_grad[:3], strict=True)
    return tuple(part if need else None for part, need in asked)
