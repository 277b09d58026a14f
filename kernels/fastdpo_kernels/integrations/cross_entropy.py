"""`linear_cross_entropy` under the calls of Liger's `LigerFusedLinearCrossEntropyLoss` and of
PyTorch's own `torch.nn.functional.linear_cross_entropy` (2.13).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cross_entropy import cross_entropy_terms


@dataclass
class CrossEntropyOutput:
    """What `LinearCrossEntropyLoss` returns where it is asked for more than the loss."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LinearCrossEntropyLoss(torch.nn.Module):
    """Cross entropy from hidden states, in the place of `LigerFusedLinearCrossEntropyLoss`.

        from fastdpo_kernels import LinearCrossEntropyLoss as LigerFusedLinearCrossEntropyLoss

    Args:
        ce_weight: weights of the classes (V,).
        ignore_index: target of positions that count nothing.
        lse_square_scale: weight of the z-loss λ·lse².
        label_smoothing: share that is spread over the vocabulary; not together with a soft cap.
        reduction: "mean", "sum" or "none".
        softcap: cap of the tanh, None for none.
        return_z_loss, return_token_accuracy: also give the z-loss (0 where its weight is), the
            share of tokens whose target is the most probable one.
        accum_dtype: accepted and not needed, gradients are accumulated in fp32.
        use_token_scaling: multiply the loss of each token by its probability, as a constant.
        return_predicted_tokens: refused, the head does not keep the most probable token.
        backend: as in `linear_logprob`.

    Raises:
        ValueError: an option out of its range, or one that is refused.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if return_predicted_tokens:
            raise ValueError("return_predicted_tokens: the head does not keep the most probable")
        self.ce_weight, self.ignore_index, self.reduction = ce_weight, ignore_index, reduction
        self.lse_square_scale, self.label_smoothing = lse_square_scale, label_smoothing
        self.softcap, self.use_token_scaling, self.backend = softcap, use_token_scaling, backend
        self.return_z_loss, self.return_token_accuracy = return_z_loss, return_token_accuracy

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss of (N, H) states and (N,) targets under (V, H) and (V,), fp32."""
        found = cross_entropy_terms(
            _input,
            lin_weight,
            target,
            bias,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            class_weights=self.ce_weight,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            token_scaling=self.use_token_scaling,
            outputs=("is_top1",) if self.return_token_accuracy else (),
            backend=self.backend,
        )
        if not (self.return_z_loss or self.return_token_accuracy):
            return found.loss
        output = CrossEntropyOutput(found.loss)
        if self.return_z_loss:
            zero = torch.zeros_like(found.loss)
            output.z_loss = zero if found.z_loss is None else found.z_loss
        if self.return_token_accuracy:
            counted = (target != self.ignore_index).sum()
            output.token_accuracy = found.stats["is_top1"].sum() / counted.to(found.loss)
        return output


def torch_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
) -> Tensor:
    """In the place of `torch.nn.functional.linear_cross_entropy`: (H,) or (N, H) states, targets ()
    or (N,) that are classes; the loss in the dtype of `input`. `options`, which say how PyTorch
    cuts the work, are not needed.

    Raises:
        ValueError: targets that are probabilities, or a weight of more than two dimensions.
    """
    if target.is_floating_point():
        raise ValueError("target: expected classes, got probabilities; PyTorch's own takes those")
    if linear_weight.ndim != 2:
        raise ValueError(f"linear_weight: expected (V, H), got {tuple(linear_weight.shape)}")
    found = cross_entropy_terms(
        input,
        linear_weight,
        target,
        linear_bias,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        class_weights=weight,
        label_smoothing=label_smoothing,
    )
    return found.loss.to(input.dtype)
