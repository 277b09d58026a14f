"""Low-rank adapters instead of all weights."""

from .declare import AT_LEAST_ONE, NOT_BLANK, POSITIVE, SHARE, key, one_of, section


@section("adapters")
class AdapterKeys:
    """Low-rank adapters (peft)."""

    use_peft: bool = key(
        False, "Train LoRA adapters instead of all weights; the other lora keys need it."
    )
    lora_r: int = key(16, "Rank of the adapters.", AT_LEAST_ONE)
    lora_alpha: int = key(
        32, "Scale of the adapters: they are multiplied by lora_alpha / lora_r.", POSITIVE
    )
    lora_dropout: float = key(0.05, "Dropout on the adapters' input while training.", SHARE)
    lora_target_modules: list[str] | None = key(
        None,
        "Modules that get an adapter: names, all-linear, or one regular expression. "
        "Unset: peft's choice for the architecture.",
        NOT_BLANK,
    )
    lora_modules_to_save: list[str] | None = key(
        None, "Modules trained in full and saved beside the adapters.", NOT_BLANK
    )
    use_rslora: bool = key(False, "Scale by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA).")
    use_dora: bool = key(False, "Learn magnitude and direction apart (DoRA).")
    load_in_4bit: bool = key(
        False,
        "QLoRA: hold the linear layers of policy and reference in 4 bits (bitsandbytes), with "
        "adapters on them. Embeddings, norms and the head stay in dtype: float32, its default, is "
        "what peft's prepare_model_for_kbit_training makes of them. Needs use_peft.",
    )
    bnb_4bit_quant_type: str = key("nf4", "The 4-bit type of the weights.", one_of("fp4", "nf4"))
    use_bnb_nested_quant: bool = key(False, "Quantise the 4-bit weights' scales too, to 8 bits.")
    bnb_4bit_quant_storage: str | None = key(
        None,
        "Type of the tensors that hold the packed 4-bit weights; unset is uint8. Changes no "
        "number.",
        one_of("float16", "float32", "int8", "uint8", "float64", "bfloat16"),
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
