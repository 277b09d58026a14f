"""The head under TRL's own trainers (1.15 and later), in the place of their chunked one.

TRL's function recomputes the logits in its backward and rounds them to the compute dtype before it
sums them. Every TRL trainer with a fused head (DPO, SFT, KTO, GRPO, RLOO) looks it up under one
name, which `patch_trl` points at `LinearLogProb`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import linear_logprob

OLDEST = "1.15"
NAME = "_ChunkedLogProbFunction"
_OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_prob",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
"""TRL's optional outputs, in the order in which it returns them, and our names of them."""

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def patch_trl(undo: bool = False) -> None:
    """Make TRL's trainers use this package's head instead of TRL's chunked one.

    To be called once, before or after the trainer is made; a second call changes nothing, and
    `undo=True` restores TRL's own. Losses and gradients stay the same to rounding. Under DeepSpeed
    ZeRO-3, where the head's weight is gathered for single calls, TRL's own function goes on to run.

    Raises:
        ImportError: TRL is missing, older than 1.15, or no longer has the function to replace.
    """
    utils = _trl_utils()
    current = getattr(utils, NAME)
    patched = isinstance(current, LinearLogProb)
    if undo and patched:
        setattr(utils, NAME, current.original)
    elif not undo and not patched:
        setattr(utils, NAME, LinearLogProb(current))


class LinearLogProb:
    """What TRL calls instead of its autograd function `original`: the same nine arguments, the same
    five results.
    """

    def __init__(self, original: type[torch.autograd.Function]) -> None:
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        self.original = original
        self._sharded: Callable[[], bool] = is_deepspeed_zero3_enabled

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(_OUTPUTS),
    ) -> Outputs:
        """Log-probabilities (N,) fp32 of `targets` (N,) under hidden (N, H), weight (V, H) and bias
        (V,), then entropy, log Σp², mean logit and top-1, None where not in `outputs`.

        Log-probabilities and entropy are differentiable in hidden, weight and bias, the others, as
        TRL's, are constants. Of equal logits at the top, TRL takes the first one for the argmax;
        here each counts as top-1.
        """
        options = (temperature, chunk_size, final_logit_softcapping, logit_scale)
        if self._sharded():
            return self.original.apply(hidden, weight, bias, targets, *options, outputs)
        wanted = [name for name in _OUTPUTS if name in outputs]
        result = linear_logprob(
            hidden,
            weight,
            targets,
            bias,
            # TRL caps at 1 when a model's configuration says 0.
            softcap=None if final_logit_softcapping is None else final_logit_softcapping or 1.0,
            logit_scale=logit_scale,
            temperature=temperature,
            outputs=tuple(_OUTPUTS[name] for name in wanted),
        )
        logprob, *stats = result if wanted else (result,)
        values: dict[str, Tensor] = {
            name: value.bool() if name == "is_top1" else value.detach().float()
            for name, value in zip(wanted, stats, strict=True)
        }
        if "entropy" in values:

            def entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                head = (hidden, weight, bias, targets.long())
                return self.original.apply(*head, *options, ("entropy",))[1]

            values["entropy"] = _Entropy.apply(hidden, weight, bias, values["entropy"], entropy)
        return (
            logprob.float(),
            values.get("entropy"),
            values.get("log_sum_sq_probs"),
            values.get("mean_logits"),
            values.get("is_top1"),
        )


class _Entropy(torch.autograd.Function):
    """The entropy that is known already, with TRL's gradient.

    Our head gives the entropy without one. Where a loss has it as a term, which is seldom, and only
    there, this backward runs, and computes the entropy once more through TRL's own function.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        value: Tensor,
        entropy: Callable[..., Tensor],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.entropy, ctx.autocast = entropy, _autocast(hidden.device.type)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        leaves = [None if tensor is None else tensor.detach() for tensor in ctx.saved_tensors]
        wanted = [
            leaf.requires_grad_()
            for leaf, need in zip(leaves, needs, strict=True)
            if need and leaf is not None
        ]
        with torch.enable_grad(), ctx.autocast():
            value = ctx.entropy(*leaves)
        gradients = iter(torch.autograd.grad(value, wanted, gradient))
        return (*(next(gradients) if need else None for need in needs), None, None)


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes a context of the autocast state of this moment."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


def _trl_utils() -> Any:
    try:
        import trl
    except ImportError as error:
        raise ImportError(f"patch_trl needs trl >= {OLDEST}, and trl cannot be imported") from error
    from packaging.version import Version

    if Version(trl.__version__) < Version(OLDEST):
        raise ImportError(
            f"patch_trl needs trl >= {OLDEST}, found {trl.__version__}; in TRL 0.28 to 1.13 put "
            "fastdpo_kernels.LinearDPOLoss in the place of LigerFusedLinearDPOLoss"
        )
    from trl.trainer import utils

    if getattr(utils, NAME, None) is None:
        raise ImportError(
            f"patch_trl: trl {trl.__version__} has no trl.trainer.utils.{NAME} here; 1.16 has it, "
            "and 1.15 where triton is installed"
        )
    return utils
