"""`linear_logprob`, and what it shares with the losses: checks, defaults and shapes. The work is in
`library` and `naive`.
"""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import library, naive
from .arguments import check_head, scored_targets
from .backends import backend_name
from .call import no_autocast, wide
from .head import OUTPUTS
from .kept import keeping


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
    workspace_mib: int | None = None,
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
        outputs: any of "lse" (log Σ_v exp z_v), "entropy" (nats), "mean_logit", "is_top1",
            "log_sum_sq_prob". Only lse has a gradient, by one more pass over a head that gets none
            itself; where one is asked of another, `backward` raises a `RuntimeError` (compiled,
            gradients become NaN).
        backend: "triton" (fused kernels: CUDA, or any device under `TRITON_INTERPRET=1`), "torch"
            (the same in plain PyTorch, any device), "auto" (the first where it can, else the
            second) or "naive" (full logits, for tests).
        workspace_mib: MiB that a tile of logits may take; None grows with the memory of a GPU, from
            512 to 2048, the latter from 72 GiB on, and is 512 elsewhere.

    Returns:
        (...) fp32 (fp64 for fp64 inputs), differentiable in hidden, weight and bias; with
        `outputs`, a named tuple whose first field is `logprob`, all 0 where ignored.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown output or backend, a
            target outside the vocabulary.
    """
    backend = backend_name(backend)
    check_outputs(outputs)
    check_head(hidden, weight, bias, targets, softcap, temperature)
    options = head_options(hidden, weight, bias, softcap, logit_scale, temperature, ignore_index)
    if backend == "naive":
        stats = naive_stats(hidden, weight, bias, targets, **options)
        values = [stats[name] for name in ("logprob", *outputs)]
    else:
        needs = needs_of(hidden, weight, bias)
        operator: Callable[..., Any] = library.linear_logprob
        if any(needs[1:]) and not torch.compiler.is_compiling():
            operator = keeping(operator)
        flat = operator(
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


def check_outputs(outputs: tuple[str, ...]) -> None:
    unknown = set(outputs) - set(OUTPUTS)
    if unknown:
        raise ValueError(f"unknown outputs {sorted(unknown)}; known: {', '.join(OUTPUTS)}")


def needs_of(*tensors: Tensor | None) -> list[bool]:
    """Of which tensors a gradient is wanted."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]


def _has_autocast(device: str) -> bool:
    """Whether a type of device has autocast, which torch 2.11 cannot answer while it compiles."""
    if torch.compiler.is_compiling():
        return device != "meta"
    return torch.amp.is_autocast_available(device)


def head_options(
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
    elif _has_autocast(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "ignore_index": ignore_index,
        "dtype": dtype,
    }


def naive_stats(
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
