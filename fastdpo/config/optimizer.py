"""How weights are updated: the optimizer's keys."""

from .declare import NOT_NEGATIVE, POSITIVE, SHARE, key, one_of, section

TORCHAO = ("adamw_torch_8bit",)
"""Values of `optim` that torchao provides."""

BITSANDBYTES = ("adamw_bnb_8bit", "paged_adamw_8bit")
"""Values of `optim` that bitsandbytes provides."""

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", *TORCHAO, *BITSANDBYTES)

OFFLOADED = ("adamw_torch_fused", "adamw_torch")
"""Values of `optim` whose states `optimizer_offload` moves to the host."""


@section("training")
class OptimizerKeys:
    """The optimizer and its numbers."""

    optim: str = key(
        "adamw_torch_fused",
        "Optimizer: torch's own, or AdamW with moments in 8 bits (2 bytes a weight instead of "
        "8) from torchao (adamw_torch_8bit) or bitsandbytes (adamw_bnb_8bit; paged_adamw_8bit "
        "moves them to the host where the GPU is full).",
        one_of(*OPTIMIZERS),
    )
    weight_decay: float = key(
        0.0, "Weight decay; biases and norms are left out of it.", NOT_NEGATIVE
    )
    adam_beta1: float = key(0.9, "Decay of AdamW's first moment.", SHARE)
    adam_beta2: float = key(0.999, "Decay of AdamW's second moment.", SHARE)
    adam_epsilon: float = key(1e-8, "Keeps AdamW's division away from zero.", POSITIVE)
    max_grad_norm: float = key(
        1.0, "Gradients with a larger norm are scaled down to it; 0 is off.", NOT_NEGATIVE
    )
