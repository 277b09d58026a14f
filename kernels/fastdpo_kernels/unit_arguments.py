"""What `linear_loss` is asked for: the loss, and the units that it is of."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from . import library
from .arguments import check_constants, check_problem, check_units
from .losses import Loss, get_loss
from .losses.registry import Kind, check_options
from .problem import add_sums

UnitArguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""response_ids (T,), units (U, k), ref_logps (R,), weights (U,) and response_lengths (R,)."""


def unit_arguments(
    hidden: Tensor,
    scored: Tensor,
    response_ids: Tensor,
    units: Tensor,
    ref_logps: Tensor | None,
    name: str | None,
    given: library.Given,
    unit_weights: Tensor | None,
    response_lengths: Tensor | None,
) -> UnitArguments:
    """The units of `linear_loss`, checked; `scored` (T,) says which tokens are, `name` is that of a
    registered loss.
    """
    loss, ref_token_logps, constants = given
    constants = constants or {}
    prompt = name is not None and get_loss(name).prompt
    check_units(hidden, response_ids, units, loss.kind, prompt)
    check_constants(hidden, units, loss.kind, constants, unit_weights, ref_token_logps)
    if name is not None:
        _check_given(name, constants, ref_logps is not None or ref_token_logps is not None)
    units = units.unsqueeze(1) if units.ndim == 1 else units
    if ref_logps is None:
        ref_logps = _reference_sums(scored, response_ids, units, response_lengths, ref_token_logps)
    rest = (response_ids, units, ref_logps, unit_weights, response_lengths)
    check_problem(hidden, *rest)
    return rest


def loss_of(
    loss: str | Loss | Callable[[Any], Tensor],
    kind: Kind,
    beta: float,
    label_smoothing: float,
    options: dict[str, Any],
) -> Loss:
    """The loss that `linear_loss` is asked for, with its options."""
    if isinstance(loss, str):
        check_options(loss, options)
        return Loss.named(loss, beta=beta, label_smoothing=label_smoothing, **options)
    if options:
        raise ValueError(f"{', '.join(options)}: options of a registered loss, not of a function")
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        raise ValueError(f"loss: expected the name of a loss or a function, got {loss!r}")
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
    return Loss(loss, kind=kind)


def _check_given(name: str, given: Mapping[str, Tensor], has_reference: bool) -> None:
    """`ValueError` where a registered loss needs what is not there."""
    registered = get_loss(name)
    sampled = registered.kind == "tokens" and "logp" in given
    if registered.reference and not (has_reference or sampled):
        raise ValueError(f"{name}: needs ref_logps, the reference's log-probabilities")
    for column in registered.columns:
        if column not in given:
            raise ValueError(f"{name}: needs given[{column!r}], one number a unit")


def _reference_sums(
    scored: Tensor,
    response_ids: Tensor,
    units: Tensor,
    lengths: Tensor | None,
    ref_token_logps: Tensor | None,
) -> Tensor:
    """(R,) sums of `ref_token_logps` over `scored` tokens (T,), zeros without them."""
    if lengths is not None:
        count = lengths.shape[0]
    else:
        count = 1 + max((int(t.max()) for t in (response_ids, units) if t.numel()), default=-1)
    sums = torch.zeros(count, dtype=torch.float64, device=scored.device)
    if ref_token_logps is not None:
        values = ref_token_logps.double().where(scored, 0)
        add_sums(sums, values, response_ids.to(sums.device))
    return sums
