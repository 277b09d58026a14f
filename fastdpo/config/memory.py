"""What a run keeps in memory: the keys that trade it for time."""

from dataclasses import dataclass, field

from .declare import AT_LEAST_ONE, key


@dataclass(frozen=True, kw_only=True)
class MemoryKeys:
    """Which activations are kept, where, and how much of a layer is computed at once."""

    gradient_checkpointing: bool = field(
        default=True,
        metadata=key(
            "memory",
            "Recompute each layer in the backward pass instead of keeping its activations: "
            "less memory, slower steps.",
        ),
    )
    gradient_checkpointing_every: int = field(
        default=1,
        metadata=key(
            "memory",
            "Recompute every n-th layer only; the others keep their activations, which saves "
            "time where memory is left.",
            rule=AT_LEAST_ONE,
        ),
    )
    activation_offloading: bool = field(
        default=False,
        metadata=key(
            "memory",
            "Keep the inputs of recomputed layers in the host's memory and fetch each one a layer "
            "ahead in the backward pass, on a GPU. Needs gradient_checkpointing.",
        ),
    )
    layer_tile_tokens: int | None = field(
        default=None,
        metadata=key(
            "memory",
            "Run the MLP and the norms of each layer in tiles of this many tokens, recomputed in "
            "the backward pass, for very long rows. Unset runs them whole.",
            rule=AT_LEAST_ONE,
        ),
    )
