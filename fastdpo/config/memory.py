"""What a run keeps in memory: the keys that trade it for time."""

from .declare import AT_LEAST_ONE, key, one_of, section


@section("memory")
class MemoryKeys:
    """Which activations, gradients and states are kept, where, and how much is computed at once."""

    memory: str = key(
        "manual",
        "auto predicts the run's peak of memory and turns on no more than it takes to fit the "
        "device: of the keys below, and of a lower max_tokens_per_batch and head_workspace_mib. It "
        "says what. A step that runs out of memory all the same is repeated with less. No number "
        "changes beyond rounding. manual changes nothing, and says what would help.",
        one_of("manual", "auto"),
    )
    gradient_checkpointing: bool = key(
        True,
        "Recompute each layer in the backward pass instead of keeping its activations: "
        "less memory, slower steps.",
    )
    gradient_checkpointing_every: int = key(
        1,
        "Recompute every n-th layer only; the others keep their activations, which saves "
        "time where memory is left.",
        AT_LEAST_ONE,
    )
    activation_offloading: bool = key(
        False,
        "Keep the inputs of recomputed layers in the host's memory and fetch each one a layer "
        "ahead in the backward pass; on a CPU, in a file in output_dir. Needs "
        "gradient_checkpointing.",
    )
    layer_tile_tokens: int | None = key(
        None,
        "Run the MLP and the norms of each layer in tiles of this many tokens, recomputed in "
        "the backward pass, for very long rows. Unset runs them whole.",
        AT_LEAST_ONE,
    )
    optimizer_offload: bool = key(
        False,
        "Keep AdamW's moments and a copy of the weights in the host's memory and take its "
        "steps there (torchao), on a GPU.",
    )
    optimizer_in_backward: bool = key(
        False,
        "Step each weight as soon as its gradient is complete and free the gradient at once; "
        "the same numbers. For training all weights, with steps that fit one row each and "
        "max_grad_norm 0. With optimizer_offload gradients go to the host at once, the steps "
        "follow there, and max_grad_norm may be set.",
    )
    stochastic_rounding: bool = key(
        False,
        "With dtype bfloat16 and optim adamw_torch_8bit: round each updated weight up or down "
        "by chance, so that it is right on average. Without it a bfloat16 weight stays where "
        "it is whenever the update is below 1/512 of it, as most of DPO's are; with dtype "
        "float32 the weights keep every update and bf16 computes with a rounded copy.",
    )
