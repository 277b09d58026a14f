"""The regimes as operators of `torch.library`, opaque to compilers, with fake and autograd rules.

Options are keyword-only, so that an autograd rule answers for tensors alone. Outputs that are not
asked for are empty. A gradient that the forward forms is kept in its tensor's own dtype, but in
fp32 for fp16: the scale of the loss, which keeps fp16 from underflowing, arrives later.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from . import kept, one_tile, regimes
from .arguments import check_problem
from .call import begin, inside_operator, names, once, refuse, wide
from .fakes import dtypes_of, fake_gradients, fake_outputs, kept_dtypes, or_empty
from .gradients import Needs
from .head import OUTPUTS
from .losses import Loss, Responses
from .problem import Problem

_HEAD = (
    "float? softcap, float logit_scale, float temperature, int ignore_index, ScalarType dtype, "
    "str backend, int? workspace_mib"
)
_OUTPUTS = ", ".join(f"Tensor {name}" for name in OUTPUTS)
_NAMESPACE = __package__.replace(".", "_")
"""Of the operators: two copies of the package under two names live beside each other."""
_RESULTS = ("response_logps", "token_logps", *OUTPUTS)
"""Of `linear_dpo_loss`, beside the loss; they have no gradient."""
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


class Given(NamedTuple):
    """A loss, and what its units are given beyond the operator's own tensors."""

    loss: Loss
    ref_token_logps: Tensor | None = None
    constants: Mapping[str, Tensor] | None = None


def _negative(responses: Responses) -> Tensor:
    return -responses.logps


NLL = "<nll>"
_given: dict[str, Given] = {NLL: Given(Loss(_negative, kind="response"))}
"""Each under a name of its own while an operator uses it; −logp of a response for good."""


@contextmanager
def named(given: Given) -> Iterator[str]:
    """A name that stands for a loss that is not registered, or is given more, as the `loss_type` of
    the operator, for as long as this lasts.
    """
    name = f"<loss {id(given)}, {len(_given)}>"
    _given[name] = given
    try:
        yield name
    finally:
        del _given[name]


@custom_op(
    f"{_NAMESPACE}::linear_logprob",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, *, {_HEAD}, str outputs, "
    f"bool keep_gradient) -> (Tensor logprob, {_OUTPUTS}, Tensor grad_hidden)",
)
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    outputs: str,
    keep_gradient: bool,
    **head: Any,
) -> tuple[Tensor, ...]:
    """Log-probabilities (T,), lse and `outputs`, and with `keep_gradient`, for a head without
    gradient, ∂logp_t/∂x_t (T, H).
    """
    with inside_operator(hidden):
        call = begin(hidden, weight, bias, targets, **head, outputs=names(outputs))
        dtype = kept_dtypes(hidden, weight, bias).hidden
        if keep_gradient:
            stats, gradient = regimes.score_with_gradient(
                call.tiles, call.hidden, call.targets, names(outputs), dtype
            )
            gradient = call.spread(gradient)
        else:
            stats = one_tile.score(call, outputs)
            gradient = hidden.new_empty(0, dtype=dtype)
        logprob = call.spread(stats["logprob"])
        return logprob, *call.outputs(stats, outputs + ",lse"), gradient


@linear_logprob.register_fake
def _(hidden, weight, bias, targets, *, dtype, outputs, keep_gradient, **_):
    logprob = hidden.new_empty(hidden.shape[0], dtype=wide(dtype))
    needs, dtypes = (keep_gradient, False, False), kept_dtypes(hidden, weight, bias)
    gradient = fake_gradients(hidden, weight, bias, needs, dtypes)[0]
    return logprob, *fake_outputs(hidden, dtype, outputs + ",lse"), gradient


@custom_op(
    f"{_NAMESPACE}::linear_logprob_backward",
    mutates_args=(),
    schema="(Tensor? grad_logprob, Tensor? grad_lse, Tensor hidden, Tensor weight, Tensor? bias, "
    f"Tensor targets, Tensor logprob, Tensor lse, *, {_HEAD}, bool[] needs) -> ({_GRADIENTS})",
)
def linear_logprob_backward(
    grad_logprob: Tensor | None,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logprob: Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
    **head: Any,
) -> tuple[Tensor, ...]:
    """Gradients of Σ grad_logprob_t·logp_t + grad_lse_t·lse_t, None for 0."""
    with inside_operator(hidden):
        call = begin(hidden, weight, bias, targets, **head)
        dtypes = dtypes_of(hidden, weight, bias)
        stats = {"logprob": call.take(logprob), "lse": call.take(lse)}
        given = torch.zeros_like(logprob) if grad_logprob is None else grad_logprob
        coefficients = call.take(given).to(logprob.dtype)
        of_lse = None if grad_lse is None else call.take(grad_lse).to(logprob.dtype)
        grad_hidden, *others = regimes.logprob_gradients(
            *(call.tiles, call.hidden, call.targets, stats, coefficients),
            *(Needs(*needs), dtypes, of_lse),
        )
        if grad_hidden is not None:
            grad_hidden = call.spread(grad_hidden)
        return or_empty((grad_hidden, *others), hidden, dtypes)


@linear_logprob_backward.register_fake
def _(grad_logprob, grad_lse, hidden, weight, bias, targets, logprob, lse, *, needs, **_):
    return fake_gradients(hidden, weight, bias, needs, dtypes_of(hidden, weight, bias))


def _logprob_context(ctx, inputs, keyword_only_inputs, output):
    hidden, weight, bias, targets = inputs
    logprob, *others, grad_hidden = output
    ctx.set_materialize_grads(False)
    ctx.options, ctx.hidden_dtype = dict(keyword_only_inputs), hidden.dtype
    asked = names(ctx.options.pop("outputs"))
    ctx.frozen, again = ctx.options.pop("keep_gradient"), "lse" in asked
    fixed = [value for name, value in zip(OUTPUTS, others, strict=True) if name not in asked]
    # Those that are asked for have a gradient or, in `refuse`, an error in its place.
    ctx.mark_non_differentiable(*fixed, grad_hidden)
    lse = others[OUTPUTS.index("lse")]
    saved = (hidden, weight, bias, targets, logprob, lse)
    ctx.kept = kept.taken()
    ctx.save_for_backward(grad_hidden, *(saved if again or not ctx.frozen else ()))


def _logprob_gradients(ctx, grad_logprob, *others):
    grads = dict(zip(OUTPUTS, others, strict=False))
    grad_lse = grads.pop("lse")
    grad_logprob = refuse(grad_logprob, grads)
    if grad_logprob is None and grad_lse is None:
        return (None,) * 4
    gradients: tuple[Tensor | None, ...]
    with torch.no_grad():
        frozen, *saved = ctx.saved_tensors
        if ctx.frozen and grad_lse is None:
            gradient = frozen * grad_logprob.unsqueeze(1)
            gradients = (gradient.to(ctx.hidden_dtype), None, None)
        else:
            needs = ctx.needs_input_grad[:3]
            parts = one_tile.gradients(ctx, grad_logprob, grad_lse, saved, needs)
            if parts is None:
                parts = linear_logprob_backward(
                    grad_logprob, grad_lse, *saved, **ctx.options, needs=needs
                )
            gradients = tuple(g if need else None for g, need in zip(parts, needs, strict=True))
    return *once(*gradients), None


linear_logprob.register_autograd(_logprob_gradients, setup_context=_logprob_context)


@custom_op(
    f"{_NAMESPACE}::linear_dpo_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor response_ids, "
    "Tensor comparisons, Tensor ref_logps, Tensor? comparison_weights, Tensor? response_lengths, "
    f"*, {_HEAD}, str outputs, str loss_type, float beta, float label_smoothing, bool[] needs) -> "
    f"(Tensor loss, Tensor response_logps, Tensor token_logps, {_OUTPUTS}, {_GRADIENTS})",
)
def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    response_ids: Tensor,
    comparisons: Tensor,
    ref_logps: Tensor,
    comparison_weights: Tensor | None,
    response_lengths: Tensor | None,
    *,
    outputs: str,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    needs: Sequence[bool],
    **head: Any,
) -> tuple[Tensor, ...]:
    """Loss (), log-probabilities of responses (R,) and of tokens (T,), `outputs` (T,) and the
    gradients of the loss that are needed; `comparisons` are the units of the loss.
    """
    given = _given.get(loss_type)
    if given is None:
        given = Given(Loss.named(loss_type, beta=beta, label_smoothing=label_smoothing))
    ref_token_logps = given.ref_token_logps
    with inside_operator(hidden):
        measured = regimes.measured(given.loss, names(outputs))
        call = begin(hidden, weight, bias, targets, **head, outputs=measured)
        rest = (comparisons, ref_logps, comparison_weights, response_lengths)
        check_problem(hidden, response_ids, *rest)
        if ref_token_logps is not None:
            ref_token_logps = call.take(ref_token_logps)
        problem = Problem.build(
            call.targets,
            call.take(response_ids),
            *rest,
            given.loss,
            ref_token_logps,
            given.constants,
        )
        dtypes = kept_dtypes(hidden, weight, bias)
        result = regimes.preference_loss(
            call.tiles, call.hidden, problem, measured, Needs(*needs), dtypes
        )
        grad_hidden, *others = result.gradients
        if grad_hidden is not None:
            grad_hidden = call.spread(grad_hidden)
        dtype = wide(call.hidden.dtype)
        return (
            result.loss.to(dtype),
            result.logps.to(dtype),
            call.spread(result.stats["logprob"]),
            *call.outputs(result.stats, outputs),
            *or_empty((grad_hidden, *others), hidden, dtypes),
        )


@linear_dpo_loss.register_fake
def _(hidden, weight, bias, targets, ids, pairs, ref, *_, dtype, outputs, needs, **__):
    loss = hidden.new_empty((), dtype=wide(dtype))
    logps = hidden.new_empty(ref.shape[0], dtype=wide(dtype))
    token_logps = hidden.new_empty(hidden.shape[0], dtype=wide(dtype))
    gradients = fake_gradients(hidden, weight, bias, needs, kept_dtypes(hidden, weight, bias))
    return loss, logps, token_logps, *fake_outputs(hidden, dtype, outputs), *gradients


def times(kept: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """kept·factor as `dtype`; in place where nobody can ask again, for a (V, H) more or less."""
    plain = type(kept) is Tensor and type(factor) is Tensor  # not while a compiler looks on
    if not plain or torch._C._autograd._get_current_graph_task_keep_graph():
        return (kept * factor).to(dtype)
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return kept.to(dtype)
    return kept.mul_(factor).to(dtype)


def _dpo_context(ctx, inputs, keyword_only_inputs, output):
    ctx.set_materialize_grads(False)
    asked = ("response_logps", "token_logps", *names(keyword_only_inputs["outputs"]))
    results = zip(_RESULTS, output[1:-3], strict=True)
    fixed = [value for name, value in results if name not in asked]
    ctx.mark_non_differentiable(*fixed, *output[-3:])
    ctx.needs = keyword_only_inputs["needs"]
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.save_for_backward(*output[-3:])


def _dpo_gradients(ctx, grad_loss, *others):
    grad_loss = refuse(grad_loss, dict(zip(_RESULTS, others, strict=False)), scalar=True)
    gradients: list[Tensor | None] = [None] * 3
    if grad_loss is not None:
        with torch.no_grad(), inside_operator(grad_loss):
            for place, kept in enumerate(ctx.saved_tensors):
                if ctx.needs[place]:
                    gradients[place] = times(kept, grad_loss, ctx.dtypes[place])
    return *once(*gradients), *(None,) * 6


linear_dpo_loss.register_autograd(_dpo_gradients, setup_context=_dpo_context)
