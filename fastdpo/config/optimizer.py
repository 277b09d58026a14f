"""How weights are updated: the optimizer's keys, and what goes together with which of them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .declare import NOT_NEGATIVE, POSITIVE, SHARE, key

if TYPE_CHECKING:
    from . import TrainConfig

TORCHAO = ("adamw_torch_8bit",)
"""Values of `optim` that torchao provides."""

BITSANDBYTES = ("adamw_bnb_8bit", "paged_adamw_8bit")
"""Values of `optim` that bitsandbytes provides."""

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", *TORCHAO, *BITSANDBYTES)

OFFLOADED = ("adamw_torch_fused", "adamw_torch")
"""Values of `optim` whose states `optimizer_offload` moves to the host."""


@dataclass(frozen=True, kw_only=True)
class OptimizerKeys:
    """The optimizer and its numbers."""

    optim: str = field(
        default="adamw_torch_fused",
        metadata=key(
            "training",
            "Optimizer: torch's own, or AdamW with moments in 8 bits (2 bytes a weight instead of "
            "8) from torchao (adamw_torch_8bit) or bitsandbytes (adamw_bnb_8bit; paged_adamw_8bit "
            "moves them to the host where the GPU is full).",
            choices=OPTIMIZERS,
        ),
    )
    weight_decay: float = field(
        default=0.0,
        metadata=key(
            "training", "Weight decay; biases and norms are left out of it.", rule=NOT_NEGATIVE
        ),
    )
    adam_beta1: float = field(
        default=0.9, metadata=key("training", "Decay of AdamW's first moment.", rule=SHARE)
    )
    adam_beta2: float = field(
        default=0.999, metadata=key("training", "Decay of AdamW's second moment.", rule=SHARE)
    )
    adam_epsilon: float = field(
        default=1e-8,
        metadata=key("training", "Keeps AdamW's division away from zero.", rule=POSITIVE),
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata=key(
            "training",
            "Gradients with a larger norm are scaled down to it; 0 is off.",
            rule=NOT_NEGATIVE,
        ),
    )


def check_optimizer(config: "TrainConfig") -> None:
    """Raise `ConfigError` for optimizer keys that cannot go together."""
    if config.optimizer_in_backward and not config.optimizer_offload and config.max_grad_norm > 0:
        raise config.error(
            "optimizer_in_backward",
            f"needs max_grad_norm 0, got {config.max_grad_norm}: weights are stepped before the "
            "norm of all gradients is known",
        )
    if config.optimizer_offload and config.optim not in OFFLOADED:
        raise config.error(
            "optimizer_offload", f"expected optim {' or '.join(OFFLOADED)}, got {config.optim}"
        )
    if config.optimizer_in_backward and config.use_peft:
        raise config.error(
            "optimizer_in_backward",
            "is for training all weights: an adapter's gradients are too small to matter",
        )
    if config.stochastic_rounding and config.optim not in TORCHAO:
        raise config.error(
            "stochastic_rounding", f"expected optim {' or '.join(TORCHAO)}, got {config.optim}"
        )
    if config.stochastic_rounding and config.dtype != "bfloat16":
        raise config.error(
            "stochastic_rounding",
            f"expected dtype bfloat16, got {config.dtype}: other weights are not rounded",
        )
