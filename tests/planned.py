SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 2000, "tie_word_embeddings": False},
    "qwen2": {"vocab_size": 3000, "tie_word_embeddings": True},
    "gemma3_text": {
        "vocab_size": 2500,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 128,
    },
}


class Real:
    """A model with random weights, a packed row of pairs on it, and the plan of the same."""

    def __init__(
        self, family: str = "llama", *, pairs: int = 4, layout: str = "shared", **keys: Any
    ) -> None:
        model_config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
        keys = {"bf16": False, "lora_dropout": 0.0, "model_name_or_path": "m", **keys}
        self.config = config = TrainConfig.from_dict(keys | {"use_cpu": True})
        self.pairs, self.autocast = pairs, torch.bfloat16 if config.bf16 else None
        torch.manual_seed(0)
        dtype = getattr(torch, config.dtype)
        self.model: Any = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        register()
        self.model.set_attn_implementation(NAME)
        if config.use_peft:
            self.model = add_adapter(self.model, config)
        self.model.train()
        rng = np.random.default_rng(0)
        prompt, *responses = (rng.integers(3, 1000, n).astype(np.int32) for n in (200, 100, 117))
        group = Group(prompt, responses, [(0, 1, 1.0)], np.array([-3.0, -4.0]))
        steps = make_plan([group] * pairs, units_per_step=pairs, max_tokens=10**6, layout=layout)
        (row,) = steps[0].ranks[0]
        head = find_head(self.model)
        self.scorer = Scorer(
            self.model, head, Layout(layout, ""), self.autocast, config.head_workspace_mib
        )
        if config.layer_tile_tokens is not None:
            with self.scorer.precision():
                tile_layers(self.model, config.layer_tile_tokens)
        if config.gradient_checkpointing:
            recompute_layers(self.model, every=config.gradient_checkpointing_every)
        loss = make_loss(["sigmoid"], beta=0.1, label_smoothing=0.0, loss_weights=None)
        self.objective = Objective(self.scorer, loss, 0.1)
        self.batch = self.objective.batch([group] * pairs, row)
        meta = meta_model(config, model_config)
        self.shape = ModelShape.of(meta, config)
        probe = planning.probe_of(config, meta, "cpu", self.autocast)
        shapes = step_shapes([group] * pairs, steps, layout)
        self.row = shapes[0][0]
        self.run = estimate.Run(config, self.shape, probe, shapes, "cpu", self.autocast, 1024)

    def step(self) -> None:
        """Forward and backward of the row."""
        sums = StepSums(torch.device("cpu"))
        self.objective.score(self.batch, self.pairs, sums).backward()

    def held(self) -> int:
        """Bytes that autograd keeps of the decoder's forward, without weights and indices."""
        saved = Saved([*self.model.parameters(), self.batch.score_index])
        with saved.watching():
            states = self.scorer.scored_states(self.batch)
            del states
        return saved.total

    def peak(self) -> int:
        """Most bytes alive in a row after the first one, weights and gradients included."""
        release_workspace()
        self.step()
        there = [p.grad for p in self.model.parameters() if p.grad is not None]
        there += list(self.model.parameters())
        return peak_bytes(self.step) + sum(tensor.nbytes for tensor in there)

    def predicted_peak(self) -> int:
        """What is predicted for that, without optimizer states and the row's own tensors."""
        found = estimate.estimate(self.run)
        return (
            found.peak
            - found.components["optimizer"]
            - 8 * (3 * self.row.tokens + 3 * self.row.scored + self.row.keys)
        )


