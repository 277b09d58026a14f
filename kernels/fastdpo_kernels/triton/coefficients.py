"""From token log-probabilities to the loss and one coefficient per response, in two small launches.

    logp_r = Σ_{t in r} logp_t            loss = Σ_c weight_c · ℓ_c
    c_r = Σ_c weight_c · (∂ℓ_c/∂logp_w · [w_c = r] + ∂ℓ_c/∂logp_l · [l_c = r])

Every program owns one response and walks over all tokens, or all comparisons, in one order: no
atomics, the same bits each time, nothing read back by the host. Sums and losses are fp64. The
losses with a closed form here are those of `DERIVATIVES`; any other goes through autograd.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256

DERIVATIVES = {"sigmoid": 0, "ipo": 1, "hinge": 2, "robust": 3}
"""The registered losses that `loss_and_coefficients` knows, by their number in the kernel."""


@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=["logprob", "response_ids"],
)
def response_sums_kernel(logprob, response_ids, logps, tokens, BLOCK: tl.constexpr):
    """logps (R,) fp64 += the sum of the response's tokens; NaN if a token has no such response."""
    response = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(response_ids + at, mask=at < tokens, other=0)
        here = (at < tokens) & (ids == response)
        total += tl.load(logprob + at, mask=here, other=0.0).to(tl.float64)
        total += tl.where((ids >= 0) & (ids < tl.num_programs(0)), 0.0, float("nan"))
    tl.store(logps + response, tl.load(logps + response) + tl.sum(total, 0))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["comparisons", "weights"])
def coefficients_kernel(
    logps,
    ref_logps,
    lengths,
    comparisons,
    weights,
    loss,
    coefficients,
    count,
    BETA: tl.constexpr,
    SMOOTHING: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """coefficients (R,) fp64 = ∂loss/∂logps; response 0 also writes the loss (1,). All are NaN if a
    comparison names no response.
    """
    responses = tl.num_programs(0)
    response = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    slope = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = at < count
        win = tl.load(comparisons + 2 * at, mask=here, other=0)
        lose = tl.load(comparisons + 2 * at + 1, mask=here, other=0)
        weight = tl.load(weights + at, mask=here, other=0.0)
        known = (win >= 0) & (win < responses) & (lose >= 0) & (lose < responses)
        weight = tl.where(known, weight, float("nan"))
        win, lose = tl.where(known, win, 0), tl.where(known, lose, 0)
        chosen = tl.load(logps + win) - tl.load(ref_logps + win)
        rejected = tl.load(logps + lose) - tl.load(ref_logps + lose)
        per_chosen = 1.0 / tl.maximum(tl.load(lengths + win), 1.0)
        per_rejected = 1.0 / tl.maximum(tl.load(lengths + lose), 1.0)
        h = BETA * (chosen - rejected)
        if LOSS == 1:
            gap = chosen * per_chosen - rejected * per_rejected - 0.5 / BETA
            value = gap * gap
            d_chosen = 2.0 * gap * per_chosen
            d_rejected = -2.0 * gap * per_rejected
        else:
            if LOSS == 0:
                value = -(1.0 - SMOOTHING) * _log_sigmoid(h) - SMOOTHING * _log_sigmoid(-h)
                d_chosen = BETA * (SMOOTHING * _sigmoid(h) - (1.0 - SMOOTHING) * _sigmoid(-h))
            elif LOSS == 2:
                # A GPU's maximum of NaN and 0 is 0; a comparison with NaN is false.
                value = tl.where(h >= 1.0, 0.0, 1.0 - h)
                d_chosen = -BETA * (1.0 - (h >= 1.0).to(tl.float64))
            else:
                value = SMOOTHING * _log_sigmoid(-h) - (1.0 - SMOOTHING) * _log_sigmoid(h)
                d_chosen = -BETA * ((1.0 - SMOOTHING) * _sigmoid(-h) + SMOOTHING * _sigmoid(h))
                value = value / (1.0 - 2.0 * SMOOTHING)
                d_chosen = d_chosen / (1.0 - 2.0 * SMOOTHING)
            d_rejected = -d_chosen
        total += weight * value
        slope += weight * tl.where(win == response, d_chosen, 0.0)
        slope += weight * tl.where(lose == response, d_rejected, 0.0)
    tl.store(coefficients + response, tl.sum(slope, 0))
    if response == 0:
        tl.store(loss, tl.sum(total, 0))


def add_response_sums(logps: Tensor, logprob: Tensor, response_ids: Tensor) -> None:
    """logps (R,) fp64 += Σ logprob (T,) of each response; response_ids (T,) int64, in any order."""
    grid = (logps.shape[0],)
    ids = response_ids.contiguous()
    response_sums_kernel[grid](logprob, ids, logps, logprob.shape[0], BLOCK=_BLOCK)


def loss_and_coefficients(
    logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    comparisons: Tensor,
    weights: Tensor,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """`(loss, ∂loss/∂logps)`: a scalar and (R,), both fp64.

    logps, ref_logps, lengths (R,) fp64; comparisons (C, 2) int64; weights (C,) fp64; `loss_type` a
    key of `DERIVATIVES`. Responses that no comparison names get 0.
    """
    loss, result = logps.new_zeros(1), torch.zeros_like(logps)
    coefficients_kernel[(logps.shape[0],)](
        logps,
        ref_logps.contiguous(),
        lengths.contiguous(),
        comparisons.contiguous(),
        weights.contiguous(),
        loss,
        result,
        comparisons.shape[0],
        BETA=float(beta),
        SMOOTHING=float(label_smoothing),
        LOSS=DERIVATIVES[loss_type],
        BLOCK=_BLOCK,
    )
    return loss.squeeze(0), result
