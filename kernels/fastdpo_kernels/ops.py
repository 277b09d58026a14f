"""The public functions: checks, defaults and shapes; the work is in `library` and `naive`."""

from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import library, naive
from .arguments import check_comparisons, check_head, check_problem, check_units, scored_targets
from .backends import backend_name
from .call import no_autocast, wide
from .head import OUTPUTS, WORKSPACE_MIB
from .losses import Comparisons, Loss, get_loss
from .losses.registry import Kind
from .problem import Problem, add_sums


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
    workspace_mib: int = WORKSPACE_MIB,
):
    """Log-probability of given tokens under a language-model head, without the (T, V) logits.

    logp_t = z_t,y − log Σ_v exp z_tv with z = cap·tanh(scale·(x·Wᵀ + b)/cap) / temperature.

    Tensors may have any strides and offsets, and lie on one device.

    Args:
        hidden: (..., H) in fp64, fp32, bf16 or fp16: what the head computes in, unless autocast is
            on or an input is fp64; weight and bias are rounded to it.
        weight: (V, H). It is read as it lies, and not copied, if its rows are contiguous or, as in
            the transpose of an (H, V) matrix, its columns; its gradient has the same layout.
        targets: (...) integers in [0, V) or `ignore_index`. Any other is a `ValueError` on a CPU;
            on a GPU, where looking would wait for the device, its log-probability is NaN, and so
            is every gradient that it has a part in.
        bias: (V,) or None.
        softcap: cap of the tanh, None for none.
        logit_scale, temperature: multiply and divide the logits, before and after the soft cap.
        ignore_index: positions with this target give 0 and receive no gradient.
        outputs: any of "entropy" (nats), "mean_logit", "is_top1", "log_sum_sq_prob", "lse"; not
            differentiable.
        backend: "triton" (fused kernels: CUDA, or any device under `TRITON_INTERPRET=1`), "torch"
            (the same in plain PyTorch, any device), "auto" (the first where it can, else the
            second) or "naive" (full logits, for tests).
        workspace_mib: MiB that a tile of logits may take.

    Returns:
        (...) fp32 (fp64 for fp64 inputs), differentiable in hidden, weight and bias; with
        `outputs`, a named tuple whose first field is `logprob`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown output or backend, a
            target outside the vocabulary.
    """
    backend = backend_name(backend)
    _check_outputs(outputs)
    check_head(hidden, weight, bias, targets, softcap, temperature)
    options = _head_options(hidden, weight, bias, softcap, logit_scale, temperature, ignore_index)
    if backend == "naive":
        stats = _naive_stats(hidden, weight, bias, targets, **options)
        values = [stats[name] for name in ("logprob", *outputs)]
    else:
        needs = _needs(hidden, weight, bias)
        flat = library.linear_logprob(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            targets.reshape(-1),
            **options,
            backend=backend,
            workspace_mib=workspace_mib,
            outputs=",".join(outputs),
            keep_gradient=needs == [True, False, False],
        )
        stats = dict(zip(("logprob", *OUTPUTS), flat[:-1], strict=True))
        values = [stats[name].view(targets.shape) for name in ("logprob", *outputs)]
    return namedtuple("LinearLogprob", ("logprob", *outputs))(*values) if outputs else values[0]


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
    workspace_mib: int = WORKSPACE_MIB,
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
        `(loss, response_logps)`: a scalar differentiable in hidden, weight and bias, and (R,) fp32
        without gradient; with `outputs`, a third element: a named tuple of (T,) tensors, 0 where
        ignored.

    Raises:
        ValueError: as `linear_logprob`, and for an unknown loss or one of another shape.
    """
    backend = backend_name(backend)
    _check_outputs(outputs)
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
        response_logps: (R,) log-probability of each response, nats; no gradient.
        token_logps: (T,) of each token, 0 where ignored; no gradient.
        stats: a named tuple of the `outputs` that were asked for, (T,) each.
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
    workspace_mib: int = WORKSPACE_MIB,
    **options: Any,
) -> LinearLoss:
    """Any loss of packed responses and its gradient: `linear_dpo_loss` for the whole family.

    loss = Σ_u weight_u · ℓ(what the loss sees of unit u). A unit is a comparison, a response or a
    group, see `fastdpo_kernels.losses.registry`. One pass over the head (6TVH operations); of a
    loss of kind "step", for which this call is the whole step, up to 8TVH.

    Args:
        hidden, weight, targets, response_ids, bias: as in `linear_dpo_loss`. For `ld_alpha` and
            losses of tokens, the tokens of a response stand in order and next to each other.
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
        ref_token_logps: (T,) the reference's log-probability of each token, nats, for `ld_alpha`
            and losses of tokens.
        unit_weights: (U,), default 1/U each, which makes the loss a mean.
        response_lengths: (R,) tokens of each response, default: counted from `targets`.
        softcap, logit_scale, ignore_index, backend, outputs, workspace_mib: as in
            `linear_logprob`.

    Raises:
        ValueError: as `linear_dpo_loss`, and for constants or a reference that the loss needs and
            that are missing.
    """
    made = _loss_of(loss, kind, beta, label_smoothing, options)
    given = given or {}
    check_units(hidden, response_ids, units, made.kind)
    if made.name is not None:
        _check_given(made.name, given, ref_logps is not None or ref_token_logps is not None)
    units = units.unsqueeze(1) if units.ndim == 1 else units
    if ref_logps is None:
        scored = (
            None if ref_token_logps is None else ref_token_logps.where(targets != ignore_index, 0)
        )
        ref_logps = _reference_sums(targets, response_ids, units, response_lengths, scored)
    rest = (response_ids, units, ref_logps, unit_weights, response_lengths)
    check_problem(hidden, *rest)
    head = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
    return _preference_loss(
        (hidden, weight, bias),
        targets,
        rest,
        library.Given(made, ref_token_logps, given),
        head,
        outputs=outputs,
        backend=backend,
        workspace_mib=workspace_mib,
    )


def _loss_of(
    loss: str | Loss | Callable[[Any], Tensor],
    kind: Kind,
    beta: float,
    label_smoothing: float,
    options: dict[str, Any],
) -> Loss:
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        return Loss.named(loss, beta=beta, label_smoothing=label_smoothing, **options)
    if options:
        raise ValueError(f"{', '.join(options)}: options of a registered loss, not of a function")
    return Loss(loss, kind=kind)


def _check_given(name: str, given: Mapping[str, Tensor], has_reference: bool) -> None:
    """`ValueError` where a registered loss needs what is not there."""
    registered = get_loss(name)
    if registered.reference and not has_reference and "logp" not in given:
        raise ValueError(f"{name}: needs ref_logps, the reference's log-probabilities")
    for column in registered.columns:
        if column not in given:
            raise ValueError(f"{name}: needs given[{column!r}], one number a unit")


def _reference_sums(
    targets: Tensor,
    response_ids: Tensor,
    units: Tensor,
    lengths: Tensor | None,
    ref_token_logps: Tensor | None,
) -> Tensor:
    """(R,) sums of `ref_token_logps`, zeros without them."""
    if lengths is not None:
        count = lengths.shape[0]
    else:
        count = 1 + max((int(t.max()) for t in (response_ids, units) if t.numel()), default=-1)
    sums = torch.zeros(count, dtype=torch.float64, device=targets.device)
    if ref_token_logps is not None:
        add_sums(sums, ref_token_logps.double(), response_ids.to(sums.device))
    return sums


def _preference_loss(
    operands: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    rest: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    given: library.Given,
    head: dict[str, Any],
    *,
    outputs: tuple[str, ...],
    backend: str,
    workspace_mib: int,
) -> LinearLoss:
    """The common part of the losses: the naive way, or the operator."""
    backend, loss = backend_name(backend), given.loss
    _check_outputs(outputs)
    hidden, weight, bias = operands
    check_head(hidden, weight, bias, targets, head["softcap"], 1.0)
    options = _head_options(*operands, temperature=1.0, **head)
    if backend == "naive":
        return _naive_loss(operands, targets, rest, given, options, outputs)
    options |= {"backend": backend, "workspace_mib": workspace_mib}
    options |= {"outputs": ",".join(outputs), "needs": _needs(*operands)}
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
    return LinearLoss(value, logps, token_logps, _named_stats(stats, outputs))


def _named_stats(stats: dict[str, Tensor], outputs: tuple[str, ...]) -> Any:
    return namedtuple("TokenStats", outputs)(*(stats[name] for name in outputs))


def _with_given(*tensors: Tensor | None, given: library.Given, **options: Any):
    """The operator for a loss that is not registered or is given more than its tensors."""
    with library.named(given) as name:
        return library.linear_dpo_loss(*tensors, loss_type=name, **options)


def _needs(*tensors: Tensor | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]


def _head_options(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
) -> dict[str, Any]:
    """What the operators want to know of a head, the dtype that it computes in included."""
    device, dtype = hidden.device.type, hidden.dtype
    if torch.float64 in (dtype, weight.dtype, None if bias is None else bias.dtype):
        dtype = torch.float64
    elif torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "ignore_index": ignore_index,
        "dtype": dtype,
    }


def _naive_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    dtype: torch.dtype,
    ignore_index: int,
    **scalars: Any,
) -> dict[str, Tensor]:
    targets = scored_targets(targets, weight.shape[0], ignore_index)

    def rounded(tensor: Tensor) -> Tensor:
        exact = tensor.to(wide(dtype))  # its gradient is not rounded to `dtype` on the way back
        error = (exact.to(dtype).to(exact.dtype) - exact).detach()
        return exact + error.nan_to_num(0.0, torch.inf, -torch.inf)  # −∞ − −∞ is no error

    b = None if bias is None else rounded(bias)
    with no_autocast(hidden):
        logits = naive.logits_of(rounded(hidden), rounded(weight), b, **scalars)
        return naive.token_stats(logits, targets, -1)


def _naive_loss(
    operands: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    rest: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    given: library.Given,
    options: dict[str, Any],
    outputs: tuple[str, ...],
) -> LinearLoss:
    targets = scored_targets(targets, operands[1].shape[0], options["ignore_index"])
    stats = _naive_stats(*operands, targets, **options | {"ignore_index": -1})
    problem = Problem.build(targets, *rest, *given).to(targets.device)
    value, logps = naive.preference_loss(stats, problem)
    dtype = wide(options["dtype"])
    token_logps = stats["logprob"].detach().to(dtype)
    found = _named_stats(stats, outputs)
    return LinearLoss(value.to(dtype), logps.detach().to(dtype), token_logps, found)


def _check_loss(loss_type: object) -> None:
    if not isinstance(loss_type, str):
        raise ValueError(
            f"loss_type: expected the name of a loss, got {loss_type!r}; a function is given as "
            "loss_function"
        )


def _check_outputs(outputs: tuple[str, ...]) -> None:
    unknown = set(outputs) - set(OUTPUTS)
    if unknown:
        raise ValueError(f"unknown outputs {sorted(unknown)}; known: {', '.join(OUTPUTS)}")
