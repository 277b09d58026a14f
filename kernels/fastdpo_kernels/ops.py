"""The public functions: checks, defaults and shapes; the work is in `library` and `naive`."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import library, naive
from .arguments import check_head, check_problem, scored_targets
from .backends import backend_name
from .call import no_autocast, wide
from .head import OUTPUTS, WORKSPACE_MIB
from .losses import Comparisons, Loss
from .problem import Problem


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
    check_problem(hidden, *rest)
    if isinstance(loss_function, Loss) and loss_function.name is not None:
        loss_type, beta = loss_function.name, loss_function.beta
        label_smoothing, loss_function = loss_function.label_smoothing, None
    options = _head_options(hidden, weight, bias, softcap, logit_scale, 1.0, ignore_index)
    scalars = {"beta": beta, "label_smoothing": label_smoothing}
    if backend == "naive":
        objective = Loss(loss_function) if loss_function else Loss.named(loss_type, **scalars)
        loss, logps, stats = _naive_loss(hidden, weight, bias, targets, rest, objective, options)
    else:
        options |= {"backend": backend, "workspace_mib": workspace_mib}
        options |= {"outputs": ",".join(outputs), "needs": _needs(hidden, weight, bias)}
        constants = (None if t is None else t.detach() for t in (targets, *rest))
        tensors = (hidden, weight, bias, *constants)
        if loss_function is None:
            results = library.linear_dpo_loss(*tensors, loss_type=loss_type, **scalars, **options)
        else:  # a decorator would import the compiler with the package
            call = torch.compiler.disable(_with_function)
            results = call(*tensors, loss_function=loss_function, **scalars, **options)
        loss, logps, *others = results
        stats = dict(zip(OUTPUTS, others[: len(OUTPUTS)], strict=True))
    if not outputs:
        return loss, logps
    return loss, logps, namedtuple("TokenStats", outputs)(*(stats[name] for name in outputs))


def _with_function(*tensors: Tensor | None, loss_function: Callable, **options: Any):
    """The operator for a loss that is not registered."""
    with library.named(loss_function) as name:
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
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rest: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    loss: Loss,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    targets = scored_targets(targets, weight.shape[0], options["ignore_index"])
    stats = _naive_stats(hidden, weight, bias, targets, **options | {"ignore_index": -1})
    problem = Problem.build(targets, *rest, loss).to(targets.device)
    value, logps = naive.dpo_loss(stats["logprob"], problem)
    dtype = wide(options["dtype"])
    return value.to(dtype), logps.detach().to(dtype), stats


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
