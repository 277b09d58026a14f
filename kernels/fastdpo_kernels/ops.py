"""The public functions: shapes, checks and the choice of a backend; the work is in `chunked` and
`reference`.
"""

from collections import namedtuple
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import chunked, reference
from .losses import Comparisons, get_loss

BACKENDS = ("auto", "torch", "reference")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    backend: str = "auto",
    workspace_mib: int = chunked.WORKSPACE_MIB,
):
    """Log-probability of given tokens under a language-model head, without the (T, V) logits.

    logp_t = z_t,y − log Σ_v exp z_tv with z = cap·tanh(scale·(x·Wᵀ + b)/cap) / temperature.

    Args:
        hidden: (..., H), any floating dtype.
        weight: (V, H).
        targets: (...) int64 in [0, V) or `ignore_index`.
        bias: (V,) or None.
        softcap: cap of the tanh, None for none.
        logit_scale, temperature: multiply and divide the logits, before and after the soft cap.
        ignore_index: positions with this target give 0 and receive no gradient.
        outputs: any of "entropy" (nats), "mean_logit", "is_top1", "log_sum_sq_prob", "lse"; not
            differentiable.
        backend: "auto", "torch" (chunked) or "reference" (full logits, for tests).
        workspace_mib: MiB that a tile of logits may take.

    Returns:
        (...) fp32 (fp64 for fp64 inputs), differentiable in hidden, weight and bias; with
        `outputs`, a named tuple whose first field is `logprob`.

    Raises:
        ValueError: shapes that do not fit, an unknown output or backend, a target outside the
            vocabulary.
    """
    _check(hidden, weight, targets, bias, outputs, backend, ignore_index)
    head = chunked.Head(weight, bias, softcap, logit_scale, temperature)
    flat, shape = targets.reshape(-1), targets.shape
    if backend == "reference":
        stats = _reference_stats(hidden, head, targets, ignore_index)
        values = [stats[name] for name in ("logprob", *outputs)]
    else:
        valid = flat != ignore_index
        index = None if bool(valid.all()) else valid.nonzero().squeeze(1)
        x = hidden.reshape(-1, hidden.shape[-1])
        scored, labels = (x, flat) if index is None else (x[index], flat[index])
        values = list(
            chunked.LinearLogprob.apply(scored, weight, bias, labels, head, outputs, workspace_mib)
        )
        values = [_scatter(value, index, shape) for value in values]
    if not outputs:
        return values[0]
    return namedtuple("LinearLogprob", ("logprob", *outputs))(*values)


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
    loss_type: str | Callable[[Comparisons], Tensor] = "sigmoid",
    label_smoothing: float = 0.0,
    comparison_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    response_lengths: Tensor | None = None,
    outputs: tuple[str, ...] = (),
    workspace_mib: int = chunked.WORKSPACE_MIB,
):
    """DPO's loss over packed responses and its gradient, in one pass over the head (6TVH
    operations).

    logp_r = Σ_{t in r} logp_t; loss = Σ_c weight_c · ℓ(logp_winner, logp_loser, their reference
    values), with ℓ = −log σ(β·margin) for `loss_type="sigmoid"` (Rafailov et al. 2023, eq. 7).

    Args:
        hidden: (T, H) states that predict the scored tokens, repeats allowed.
        weight, bias: (V, H) and (V,) or None.
        targets: (T,) int64 in [0, V) or `ignore_index`.
        response_ids: (T,) int64 in [0, R), the response of each token, in any order.
        comparisons: (C, 2) int64, (winner, loser) as indices of responses.
        ref_logps: (R,) the reference's log-probability of each response, nats; fp64 is kept as
            such.
        beta, label_smoothing: handed to the loss.
        loss_type: a name of `fastdpo_kernels.losses.LOSSES`, or a function of `Comparisons` that
            returns (C,).
        comparison_weights: (C,), default 1/C each, which makes the loss a mean.
        response_lengths: (R,) tokens of each response, default: counted from `targets`.
        softcap, logit_scale, ignore_index, backend, workspace_mib, outputs: as in `linear_logprob`.

    Returns:
        `(loss, response_logps)`: a scalar differentiable in hidden, weight and bias, and (R,) fp32
        without gradient;
        with `outputs`, a third element: a named tuple of (T,) tensors, 0 where ignored.

    Raises:
        ValueError: as `linear_logprob`, and for an unknown loss.
    """
    _check(hidden, weight, targets, bias, outputs, backend, ignore_index)
    if comparisons.ndim != 2 or comparisons.shape[1] != 2:
        raise ValueError(f"comparisons: expected (C, 2), got {tuple(comparisons.shape)}")
    head = chunked.Head(weight, bias, softcap, logit_scale)
    dtype = head.compute_dtype(hidden)
    valid = targets != ignore_index
    if response_lengths is None:
        response_lengths = torch.zeros_like(ref_logps).index_add(
            0, response_ids, valid.to(ref_logps.dtype)
        )
    if comparison_weights is None:
        count = max(1, comparisons.shape[0])
        comparison_weights = ref_logps.new_full((comparisons.shape[0],), 1.0 / count)
    loss_function: Callable[[Comparisons], Tensor]
    if isinstance(loss_type, str):
        loss_function = partial(get_loss(loss_type), beta=beta, label_smoothing=label_smoothing)
    else:
        loss_function = loss_type
    ref, lengths = ref_logps.double(), response_lengths.double()
    weights = comparison_weights.double()
    if backend == "reference":
        stats = _reference_stats(hidden, head, targets, ignore_index)
        loss, logps = reference.dpo_loss(
            stats["logprob"], response_ids, comparisons, ref, loss_function, weights, lengths
        )
        loss, logps = loss.to(dtype), logps.to(dtype)
        extra = [stats[name] for name in outputs]
    else:
        index = None if bool(valid.all()) else valid.nonzero().squeeze(1)
        if index is not None:
            hidden, targets, response_ids = hidden[index], targets[index], response_ids[index]
        problem = chunked.Problem(
            targets, response_ids, comparisons, ref, lengths, weights, loss_function
        )
        loss, logps, *extra = chunked.LinearDPOLoss.apply(
            hidden, weight, bias, head, problem, outputs, workspace_mib
        )
        extra = [_scatter(value, index, valid.shape) for value in extra]
    logps = logps.detach()
    if not outputs:
        return loss, logps
    return loss, logps, namedtuple("TokenStats", outputs)(*extra)


def _reference_stats(hidden: Tensor, head: chunked.Head, targets: Tensor, ignore_index: int):
    dtype = head.compute_dtype(hidden)
    bias = None if head.bias is None else head.bias.to(dtype)
    logits = reference.logits_of(
        hidden.to(dtype),
        head.weight.to(dtype),
        bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        temperature=head.temperature,
    )
    return reference.token_stats(logits, targets, ignore_index)


def _scatter(value: Tensor, index: Tensor | None, shape: torch.Size) -> Tensor:
    if index is not None:
        value = value.new_zeros(shape.numel()).index_copy(0, index, value)
    return value.view(shape)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    outputs: tuple[str, ...],
    backend: str,
    ignore_index: int,
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    unknown = set(outputs) - set(chunked.OUTPUTS)
    if unknown:
        raise ValueError(f"unknown outputs {sorted(unknown)}; known: {', '.join(chunked.OUTPUTS)}")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected (V, {hidden.shape[-1]}), got {tuple(weight.shape)} for hidden "
            f"{tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected ({weight.shape[0]},), got {tuple(bias.shape)}")
    if targets.device.type == "cpu" and targets.numel():
        inside = (targets >= 0) & (targets < weight.shape[0]) | (targets == ignore_index)
        if not bool(inside.all()):
            worst = targets[~inside][0].item()
            raise ValueError(f"targets: {worst} is outside the vocabulary of {weight.shape[0]}")
