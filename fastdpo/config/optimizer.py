"""How weights are updated: the optimizer's keys."""

from dataclasses import dataclass, field

from .declare import NOT_NEGATIVE, POSITIVE, SHARE, key

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
