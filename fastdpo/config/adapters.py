"""Low-rank adapters instead of all weights."""

from dataclasses import dataclass, field

from .declare import AT_LEAST_ONE, NOT_BLANK, POSITIVE, SHARE, key


@dataclass(frozen=True, kw_only=True)
class AdapterKeys:
    """Low-rank adapters (peft)."""

    use_peft: bool = field(
        default=False,
        metadata=key(
            "adapters", "Train LoRA adapters instead of all weights; the other lora keys need it."
        ),
    )
    lora_r: int = field(
        default=16, metadata=key("adapters", "Rank of the adapters.", rule=AT_LEAST_ONE)
    )
    lora_alpha: int = field(
        default=32,
        metadata=key(
            "adapters",
            "Scale of the adapters: they are multiplied by lora_alpha / lora_r.",
            rule=POSITIVE,
        ),
    )
    lora_dropout: float = field(
        default=0.05,
        metadata=key(
            "adapters",
            "Dropout on the adapters' input while training.",
            rule=SHARE,
        ),
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata=key(
            "adapters",
            "Modules that get an adapter: names, all-linear, or one regular expression. "
            "Unset: peft's choice for the architecture.",
            rule=NOT_BLANK,
        ),
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata=key(
            "adapters", "Modules trained in full and saved beside the adapters.", rule=NOT_BLANK
        ),
    )
    use_rslora: bool = field(
        default=False,
        metadata=key("adapters", "Scale by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA)."),
    )
    use_dora: bool = field(
        default=False, metadata=key("adapters", "Learn magnitude and direction apart (DoRA).")
    )

    @property
    def lora_targets(self) -> str | list[str] | None:
        """`lora_target_modules` for peft: `all-linear` and a pattern are a text, names a list."""
        targets = self.lora_target_modules
        if targets is not None and len(targets) == 1:
            only = targets[0]
            if only == "all-linear" or any(sign in only for sign in "*+?|()[]^$\\"):
                return only
        return targets
