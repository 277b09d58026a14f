"""`linear_cross_entropy`: cross entropy out of a head, every token a unit of its own."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import library
from .arguments import check_head
from .backends import backend_name
from .logprob import head_options, linear_logprob, needs_of

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    return_lse: bool = False,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    logit_scale: float = 1.0,
    backend: str = "auto",
    workspace_mib: int | None = None,
    filter_eps: float | str | None = None,
    accum_e_fp32: bool = True,
    accum_c_fp32: bool = True,
    filter_e_grad: bool = False,
    filter_c_grad: bool = False,
    impl: object = None,
) -> Any:
    """Cross entropy of a language-model head, without the (T, V) logits, with the call of Apple's
    `cut_cross_entropy.linear_cross_entropy`.

    loss_t = −w_y·((1 − ε)·logp_t,y) − (ε/V)·Σ_v w_v·logp_tv + λ·lse_t², nats; ε `label_smoothing`,
    λ `lse_square_scale`, w `class_weights`. One pass over the head (6TVH operations) where loss_t
    is −w_y·logp_t and is summed here; a second one in the backward otherwise (8TVH).

    Args:
        e, c, bias: hidden states (..., T, H), weight (V, H) and bias (V,) or None, as in
            `linear_logprob`.
        targets: (..., T) integers in [0, V) or `ignore_index`, which counts nothing.
        reduction: "mean" over the tokens that count, each by its class weight (NaN where none
            does, as in PyTorch), "sum" or "none".
        shift: how many tokens later the target of a state stands; True is 1.
        return_lse: also give lse (..., T − shift), differentiable, 0 where ignored.
        class_weights: (V,) without gradient, default 1.
        label_smoothing: in [0, 1]; not together with a soft cap.
        lse_square_scale: weight of the z-loss; its mean is over the tokens, whatever their class.
        softcap, logit_scale, backend, workspace_mib: as in `linear_logprob`.
        filter_eps, accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad, impl: accepted and not
            needed: no gradient is left out, and all are accumulated in fp32.

    Returns:
        The loss in fp32 (fp64 for fp64): () or, for "none", (..., T − shift); `(loss, lse)` with
        `return_lse`.

    Raises:
        ValueError: as `linear_logprob`, and for an unknown reduction, a shift that leaves nothing,
            or a smoothing with a soft cap.
    """
    e, targets = _shifted(e, targets, shift)
    found = cross_entropy_terms(
        e,
        c,
        targets,
        bias,
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        logit_scale=logit_scale,
        backend=backend,
        workspace_mib=workspace_mib,
        outputs=("lse",) if return_lse else (),
    )
    return (found.loss, found.stats["lse"]) if return_lse else found.loss


class CrossEntropyTerms(NamedTuple):
    """The loss, its part λ·lse² (None where λ is 0), reduced alike, and per-token `outputs`."""

    loss: Tensor
    z_loss: Tensor | None
    stats: dict[str, Tensor]


def cross_entropy_terms(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    reduction: str,
    ignore_index: int = -100,
    softcap: float | None = None,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    token_scaling: bool = False,
    outputs: tuple[str, ...] = (),
    **head: Any,
) -> CrossEntropyTerms:
    """What `linear_cross_entropy` returns and more; `token_scaling` multiplies the loss of each
    token by its probability, which is a constant.
    """
    _check(weight, softcap, reduction, class_weights, label_smoothing)
    backend = backend_name(head.pop("backend", "auto"))
    head |= {"softcap": softcap, "ignore_index": ignore_index}
    counted = targets != ignore_index
    weights = counted.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    if class_weights is not None:
        weights = weights * class_weights.to(weights)[targets.where(counted, 0)]
    total = weights.sum()
    plain = not (label_smoothing or lse_square_scale or token_scaling or outputs)
    if plain and reduction != "none" and backend != "naive":
        if reduction == "mean":
            weights = weights / total.where(total != 0, 1)
        loss = _summed(hidden, weight, targets, bias, weights, backend=backend, **head)
        return CrossEntropyTerms(_nan_of_none(loss, total, reduction), None, {})
    names = tuple(dict.fromkeys((*outputs, "lse")))
    found = linear_logprob(hidden, weight, targets, bias, backend=backend, outputs=names, **head)
    loss = -weights * found.logprob
    if label_smoothing:
        uniform = _uniform(
            hidden, weight, bias, class_weights, found.lse, head.get("logit_scale", 1.0)
        )
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform.where(counted, 0)
    if token_scaling:
        loss = loss * found.logprob.detach().exp()
    stats, z_loss = found._asdict(), None
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = _nan_of_none(loss / total.where(total != 0, 1), total, reduction)
    if lse_square_scale:
        z_loss = lse_square_scale * found.lse.square()
        if reduction != "none":
            z_loss = z_loss.sum() / (counted.sum() if reduction == "mean" else 1)
        loss = loss + z_loss
    return CrossEntropyTerms(loss, z_loss, stats)


def _check(
    weight: Tensor,
    softcap: float | None,
    reduction: str,
    class_weights: Tensor | None,
    label_smoothing: float,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    if label_smoothing and softcap is not None:
        raise ValueError(
            "label_smoothing: the mean of capped logits has no gradient; leave one out"
        )
    if class_weights is not None and class_weights.shape != weight.shape[:1]:
        raise ValueError(
            f"class_weights: expected {tuple(weight.shape[:1])}, got {tuple(class_weights.shape)}"
        )


def _shifted(hidden: Tensor, targets: Tensor, shift: bool | int) -> tuple[Tensor, Tensor]:
    """States and the targets that stand `shift` tokens later."""
    shift = int(shift)
    if not shift:
        return hidden, targets
    if not 0 < shift < targets.shape[-1]:
        raise ValueError(f"shift: expected 0 to {targets.shape[-1] - 1}, got {shift}")
    return hidden[..., :-shift, :], targets[..., shift:]


def _nan_of_none(loss: Tensor, total: Tensor, reduction: str) -> Tensor:
    """A mean over nothing is NaN, its gradient 0."""
    return loss.masked_fill(total == 0, torch.nan) if reduction == "mean" else loss


def _summed(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    *,
    softcap: float | None,
    logit_scale: float = 1.0,
    ignore_index: int,
    **engine: Any,
) -> Tensor:
    """−Σ weights_t·logp_t in one pass: each token is a response and a unit of its own."""
    check_head(hidden, weight, bias, targets, softcap, 1.0)
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    options = head_options(hidden, weight, bias, softcap, logit_scale, 1.0, ignore_index)
    options |= {"outputs": "", "loss_type": library.NLL, "beta": 0.0, "label_smoothing": 0.0}
    options |= {"workspace_mib": None} | engine
    ids = torch.arange(len(targets))  # on the host, where the head sees where it may cut
    rest = (targets, ids, ids.unsqueeze(1), weights.new_zeros(len(ids)), weights.reshape(-1))
    lengths = weights.new_ones(len(ids))
    needs = needs_of(hidden, weight, bias)
    return library.linear_dpo_loss(hidden, weight, bias, *rest, lengths, **options, needs=needs)[0]


def _uniform(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    lse: Tensor,
    logit_scale: float,
) -> Tensor:
    """−Σ_v w_v·logp_v / V of every token: lse, less a product with the mean row of the weight."""
    shares = torch.ones(len(weight), device=weight.device, dtype=lse.dtype)
    if class_weights is not None:
        shares = class_weights.detach().to(lse.dtype)
    shares = shares / len(weight)
    row = shares @ weight.to(lse.dtype)
    mean = hidden.to(lse.dtype) @ row
    if bias is not None:
        mean = mean + shares @ bias.to(lse.dtype)
    return lse * shares.sum() - logit_scale * mean
