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
    load_in_4bit: bool = field(
        default=False,
        metadata=key(
            "adapters",
            "QLoRA: hold the linear layers of policy and reference in 4 bits (bitsandbytes), with "
            "adapters on them. Embeddings, norms and the head stay in dtype, whose float32 is what "
            "peft's prepare_model_for_kbit_training makes of them. Needs use_peft.",
        ),
    )
    bnb_4bit_quant_type: str = field(
        default="nf4",
        metadata=key("adapters", "The 4-bit type of the weights.", choices=("fp4", "nf4")),
    )
    use_bnb_nested_quant: bool = field(
        default=False,
        metadata=key("adapters", "Quantise the 4-bit weights' scales too, to 8 bits."),
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata=key(
            "adapters",
            "Type of the tensors that hold the packed 4-bit weights; unset is uint8. Changes no "
            "number.",
            choices=("float16", "float32", "int8", "uint8", "float64", "bfloat16"),
        ),
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
