"""The losses of packed responses: checks, defaults and shapes. The work is in `library` and
`naive`.
"""

from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import library, naive
from .arguments import (
    check_comparisons,
    check_head,
    check_problem,
    scored_targets,
)
from .backends import backend_name
from .call import wide
from .head import OUTPUTS
from .logprob import check_outputs, head_options, naive_stats, needs_of
from .losses import Comparisons, Loss
from .losses.registry import Kind
from .problem import Problem
from .unit_arguments import UnitArguments, loss_of, unit_arguments


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    response_ids: Tensor,
    comparisons: Tensor,
    ref_logps: Tensor,
    bias: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    comparison_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    loss_function: Callable[[Comparisons], Tensor] | None = None,
    response_lengths: Tensor | None = None,
    outputs: tuple[str, ...] = (),
    workspace_mib: int | None = None,
):
    """DPO's loss over packed responses and its gradient, in one pass over the head (6TVH
    operations).

    logp_r = Σ_{t in r} logp_t; loss = Σ_c weight_c · ℓ(logp_winner, logp_loser, their reference
    values), with ℓ = −log σ(β·margin) for `loss_type="sigmoid"` (Rafailov et al. 2023, eq. 7).

    Args:
        hidden: (T, H) states that predict the scored tokens, repeats allowed.
        weight, bias, targets: (V, H), (V,) or None, and (T,), as in `linear_logprob`.
        response_ids: (T,) integers in [0, R), the response of each token, in any order.
        comparisons: (C, 2) integers, (winner, loser) as indices of responses. These two may lie on
            the host, where an index of no response is a `ValueError`; on a GPU it makes the loss
            NaN, or fails there as PyTorch's own indexing does.
        ref_logps: (R,) the reference's log-probability of each response, nats; fp64 is kept as
            such.
        loss_type: a name of `fastdpo_kernels.LOSSES`.
        beta, label_smoothing: handed to that loss.
        loss_function: in place of those three, a function of `Comparisons` that returns (C,).
        comparison_weights: (C,), default 1/C each, which makes the loss a mean.
        response_lengths: (R,) tokens of each response, default: counted from `targets`.
        softcap, logit_scale, ignore_index, backend, workspace_mib, outputs: as in `linear_logprob`.

    Returns:
        `(loss, response_logps)`: a scalar differentiable in hidden, weight and bias, and (R,) fp32;
        with `outputs`, a third element: a named tuple of (T,) tensors, 0 where ignored. Only the
        loss has a gradient: a `backward` that reaches another result is a `RuntimeError`.

    Raises:
        ValueError: as `linear_logprob`, and for an unknown loss or one of another shape.
    """
    backend = backend_name(backend)
    check_outputs(outputs)
    _check_loss(loss_type)
    check_head(hidden, weight, bias, targets, softcap, 1.0)
    rest = (response_ids, comparisons, ref_logps, comparison_weights, response_lengths)
    check_comparisons(comparisons)
    check_problem(hidden, *rest)
    if loss_function is None:
        loss = Loss.named(loss_type, beta=beta, label_smoothing=label_smoothing)
    elif isinstance(loss_function, Loss):
        loss = loss_function
    else:
        loss = Loss(loss_function)
    head = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    result = _preference_loss(
        (hidden, weight, bias),
        targets,
        rest,
        library.Given(loss.of_comparisons()),
        head,
        outputs=outputs,
        backend=backend,
        workspace_mib=workspace_mib,
    )
    if not outputs:
        return result.loss, result.response_logps
    return result.loss, result.response_logps, result.stats


class LinearLoss(NamedTuple):
    """What `linear_loss` returns.

    Attributes:
        loss: a scalar, differentiable in hidden, weight and bias.
        response_logps: (R,) log-probability of each response, nats.
        token_logps: (T,) of each token, 0 where ignored.
        stats: a named tuple of the `outputs` that were asked for, (T,) each.

    Only the loss has a gradient: a `backward` that reaches another result is a `RuntimeError` (but
    with `backend="naive"`, which differentiates everything).
    """

    loss: Tensor
    response_logps: Tensor
    token_logps: Tensor
    stats: Any


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    response_ids: Tensor,
    units: Tensor,
    ref_logps: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    loss: str | Loss | Callable[[Any], Tensor] = "sigmoid",
    kind: Kind = "comparison",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    given: Mapping[str, Tensor] | None = None,
    ref_token_logps: Tensor | None = None,
    unit_weights: Tensor | None = None,
    response_lengths: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    outputs: tuple[str, ...] = (),
    workspace_mib: int | None = None,
    **options: Any,
) -> LinearLoss:
    """Any loss of packed responses and its gradient: `linear_dpo_loss` for the whole family.

    loss = Σ_u weight_u · ℓ(what the loss sees of unit u). A unit is a comparison, a response or a
    group, see `fastdpo_kernels.losses.registry`. One pass over the head (6TVH operations); of a
    loss of kind "step", for which this call is the whole step, up to 8TVH.

    Args:
        hidden, weight, targets, response_ids, bias: as in `linear_dpo_loss`. For `ld_alpha` the
            tokens of a response stand in their order.
        units: the responses of each unit, integers: (U, 2) of (winner, loser) for comparisons, or
            (U, 3) with the prompt's own tokens as a response where the loss reads them; (U,) for
            responses; (U, G) for groups, -1 where a group has fewer than G.
        ref_logps: (R,) the reference's log-probability of each response, nats; None where the loss
            needs none or `ref_token_logps` has them.
        loss: a name of `fastdpo_kernels.LOSSES`, or a function of what its `kind` sees.
        kind: of a function that is not registered.
        beta, label_smoothing, options: handed to the loss by their names; and `ld_alpha`,
            `use_weighting`, `f_divergence_type`, `f_alpha_divergence_coef` for comparisons.
        given: constants (U,) by name, or (U, G) for groups, that the loss reads, such as "label".
            Tokens of a response in a batch or a step on average have defaults for which the call is
            a whole one.
        ref_token_logps: (T,) the reference's log-probability of each token, nats, for `ld_alpha`
            and losses of tokens.
        unit_weights: (U,), default 1/U each, which makes the loss a mean.
        response_lengths: (R,) tokens of each response, default: counted from `targets`.
        softcap, logit_scale, ignore_index, backend, outputs, workspace_mib: as in
            `linear_logprob`.

    Raises:
        ValueError: as `linear_dpo_loss`, and for constants or a reference that the loss needs and
            that are missing, an option that it does not take, or an unknown kind.
    """
    made = loss_of(loss, kind, beta, label_smoothing, options)
    constants = library.Given(made, ref_token_logps, given or {})
    rest = unit_arguments(
        hidden,
        targets != ignore_index,
        response_ids,
        units,
        ref_logps,
        loss if isinstance(loss, str) else made.name,
        constants,
        unit_weights,
        response_lengths,
    )
    head = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    return _preference_loss(
        (hidden, weight, bias),
        targets,
        rest,
        constants,
        head,
        outputs=outputs,
        backend=backend,
        workspace_mib=workspace_mib,
    )


def _check_loss(loss_type: object) -> None:
    if not isinstance(loss_type, str):
        raise ValueError(
            f"loss_type: expected the name of a loss, got {loss_type!r}; a function is given as "
            "loss_function"
        )


def _preference_loss(
    operands: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    rest: UnitArguments,
    given: library.Given,
    head: dict[str, Any],
    *,
    outputs: tuple[str, ...],
    backend: str,
    workspace_mib: int | None,
) -> LinearLoss:
    """The common part of the losses: the naive way, or the operator."""
    backend, loss = backend_name(backend), given.loss
    check_outputs(outputs)
    hidden, weight, bias = operands
    check_head(hidden, weight, bias, targets, head["softcap"], 1.0)
    options = head_options(*operands, temperature=1.0, **head)
    if backend == "naive":
        return _naive_loss(operands, targets, rest, given, options, outputs)
    options |= {"backend": backend, "workspace_mib": workspace_mib}
    options |= {"outputs": ",".join(outputs), "needs": needs_of(*operands)}
    options |= {"beta": loss.beta, "label_smoothing": loss.label_smoothing}
    constants = (None if t is None else t.detach() for t in (targets, *rest))
    tensors = (*operands, *constants)
    if loss.plain and not given.constants and given.ref_token_logps is None:
        results = library.linear_dpo_loss(*tensors, loss_type=loss.name, **options)
    else:  # a decorator would import the compiler with the package
        call = torch.compiler.disable(_with_given)
        results = call(*tensors, given=given, **options)
    value, logps, token_logps, *others = results
    stats = dict(zip(OUTPUTS, others[: len(OUTPUTS)], strict=True))
    return LinearLoss(value, logps, token_logps, named_stats(stats, outputs))


def named_stats(stats: dict[str, Tensor], outputs: tuple[str, ...]) -> Any:
    """Those of the outputs that were asked for, as a named tuple."""
    return namedtuple("TokenStats", outputs)(*(stats[name] for name in outputs))


def _with_given(*tensors: Tensor | None, given: library.Given, **options: Any):
    """The operator for a loss that is not registered or is given more than its tensors."""
    with library.named(given) as name:
        return library.linear_dpo_loss(*tensors, loss_type=name, **options)


def _naive_loss(
    operands: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    rest: UnitArguments,
    given: library.Given,
    options: dict[str, Any],
    outputs: tuple[str, ...],
) -> LinearLoss:
    targets = scored_targets(targets, operands[1].shape[0], options["ignore_index"])
    stats = naive_stats(*operands, targets, **options | {"ignore_index": -1})
    problem = Problem.build(targets, *rest, *given).to(targets.device)
    value, logps = naive.preference_loss(stats, problem)
    dtype = wide(options["dtype"])
    token_logps = stats["logprob"].to(dtype)
    return LinearLoss(value.to(dtype), logps.to(dtype), token_logps, named_stats(stats, outputs))
