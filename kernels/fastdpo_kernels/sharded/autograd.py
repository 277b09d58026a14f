"""The sharded head as functions of autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import library
from ..call import inside_operator, refuse, wide
from ..problem import Problem
from . import regimes
from .call import ShardCall
from .exchange import Exchange
from .merge import ANCHOR, LOG_SHARE

_KNOWN = ("logprob", "lse", ANCHOR, LOG_SHARE)
"""What a second pass over a token needs to know."""


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
        ctx.call, ctx.outputs = call, outputs
        # The gradient of lse needs the row of the target, which another rank may hold.
        ctx.frozen = call.needs.hidden and not call.needs.head and "lse" not in outputs
        with inside_operator(hidden):
            tiles = call.make_tiles(weight, bias)
            if ctx.frozen:
                stats, gradient = regimes.score_with_gradient(call, tiles, outputs)
                ctx.save_for_backward(call.spread(gradient))
            else:
                stats, kept = regimes.score(call, tiles, outputs, keep=any(call.needs))
                ctx.save_for_backward(weight, bias, *(stats[name] for name in _KNOWN), *kept)
        ctx.set_materialize_grads(False)
        return call.spread(stats["logprob"]).clone(), *call.spread_all(stats, outputs)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call: ShardCall = ctx.call
        grads = dict(zip(ctx.outputs, others, strict=True))
        grad_lse = grads.pop("lse", None)
        refuse(grad_logprob, grads)
        if ctx.frozen:
            (kept,) = ctx.saved_tensors
            gradient = None if grad_logprob is None else kept * grad_logprob.unsqueeze(1)
            return None if gradient is None else gradient.to(call.input_dtypes.hidden), *(None,) * 4
        weight, bias, *saved = ctx.saved_tensors
        stats, states = dict(zip(_KNOWN, saved, strict=False)), saved[len(_KNOWN) :]
        logprob = stats["logprob"]

        def scored(gradient: Tensor | None) -> Tensor:
            if gradient is None:  # of this rank, which takes part all the same
                return torch.zeros_like(logprob)
            return call.take(gradient).to(logprob.dtype)

        with inside_operator(logprob):
            of_lse = scored(grad_lse) if "lse" in ctx.outputs else None
            tiles = call.make_tiles(weight, bias)
            parts = regimes.logprob_gradients(
                call, tiles, states, stats, scored(grad_logprob), of_lse
            )
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
        ctx.call, ctx.names = call, ("response_logps", "token_logps", *outputs)
        ctx.set_materialize_grads(False)
        with inside_operator(hidden):
            tiles = call.make_tiles(weight, bias)
            result = regimes.preference_loss(call, tiles, problem)
        ctx.save_for_backward(*_wanted(ctx, call, result.gradients))
        dtype = wide(call.hidden.dtype)
        values = (result.logps.to(dtype), call.spread(result.stats["logprob"]))
        return result.loss.to(dtype), *values, *call.spread_all(result.stats, outputs)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse(grad_loss, dict(zip(ctx.names, others, strict=True)))
        if grad_loss is None:
            return (None,) * 6
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
