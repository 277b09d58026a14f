"""A real model of a few layers with the plan of a step on it, for any loss."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counted import Saved, peak_bytes
from fastdpo_kernels.tiles import release_workspace
from transformers import AutoConfig, AutoModelForCausalLM

from fastdpo import TrainConfig
from fastdpo.data.groups import Group
from fastdpo.data.plan import make_plan
from fastdpo.devices import Device, named
from fastdpo.losses import TrainingLoss, loss_of
from fastdpo.memory import components, estimate
from fastdpo.memory import planner as planning
from fastdpo.memory.shapes import ModelShape, RowShape, meta_model, mismatched_shapes, step_shapes
from fastdpo.model.adapter import add_adapter
from fastdpo.model.attention import NAME, register
from fastdpo.model.head import find_head
from fastdpo.model.layers import recompute_layers
from fastdpo.model.layout import Layout
from fastdpo.model.scorer import Scorer
from fastdpo.model.tiles import tile_layers
from fastdpo.training.metrics import StepSums
from fastdpo.training.step import Objective

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


CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 100000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 5,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def plan_of(folder: Path, device: Device | str, **keys: Any) -> planning.Planner:
    """A plan for a model of 1.5B parameters that is nowhere, and rows of assumed lengths."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    config = TrainConfig.from_dict({"model_name_or_path": str(folder), **keys})
    device = named(device) if isinstance(device, str) else device
    return planning.make_planner(config, device)


def a_group(loss: TrainingLoss) -> Group:
    """A prompt and two responses, as one comparison, two responses with what a loss may want to
    know of them, or one group; and two mismatched ones where the loss asks for such.
    """
    rng = np.random.default_rng(0)
    prompt, *responses = (rng.integers(3, 1000, n).astype(np.int32) for n in (200, 100, 117))
    logps = np.array([-3.0, -4.0])
    if loss.unit == "comparison":
        group = Group(prompt, responses, [(0, 1, 1.0)])
    else:
        known = {"label": [1.0, 0.0], "advantage": [1.0, -1.0], "rank": [0.0, 1.0]}
        given = {name: known[name] for one in loss.losses for name in one.columns}
        group = Group(prompt, responses, unit=loss.unit, items=[0, 1], rows=[0, 0], given=given)
    if loss.mismatched:
        group.responses += [rng.integers(3, 1000, n).astype(np.int32) for n in (130, 90)]
        group.mismatched, logps = [2, 3], np.array([-3.0, -4.0, -5.0, -6.0])
    if loss.by_tokens:
        group.ref_token_logps = [-np.ones(len(ids), np.float32) for ids in group.responses]
    else:
        group.ref_logps = logps
    return group


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
        loss = loss_of(config)
        group = a_group(loss)
        groups = [group] * pairs
        units = pairs * group.units
        steps = make_plan(groups, units_per_step=units, max_tokens=10**6, layout=layout)
        head = find_head(self.model)
        self.scorer = Scorer(
            self.model, head, Layout(layout, ""), self.autocast, config.head_workspace_mib
        )
        if config.layer_tile_tokens is not None:
            with self.scorer.precision():
                tile_layers(self.model, config.layer_tile_tokens)
        if config.gradient_checkpointing:
            recompute_layers(self.model, every=config.gradient_checkpointing_every)
        self.objective = Objective(self.scorer, loss, units)
        self.batches = self.objective.batches(groups, steps[0])
        (self.batch,) = self.batches.batches
        meta = meta_model(config, model_config)
        self.shape = ModelShape.of(meta, config)
        shapes = step_shapes(groups, steps, layout, prompt=loss.prompt)
        self.row = shapes[0][0]
        self.run = components.Run(
            config=config,
            loss=loss,
            compares=loss.reference,
            model=self.shape,
            probe=planning.probe_of(config, meta, "cpu", self.autocast),
            steps=shapes,
            kind="cpu",
            autocast=self.autocast,
            max_tokens=1024,
            mismatched=mismatched_shapes(groups, steps, layout),
        )
        self.terms = self.objective.terms(self.batches)

    def score_first(self) -> None:
        """The pass before the row."""
        self.objective.terms(self.batches)

    def step(self) -> None:
        """Forward and backward of the row."""
        sums = StepSums(torch.device("cpu"))
        units = self.batches.units
        self.objective.score(self.batch, units, sums, self.terms).backward()

    def held(self) -> int:
        """Bytes that autograd keeps of the decoder's forward, without weights and indices."""
        saved = Saved([*self.model.parameters(), self.batch.score_index])
        with saved.watching():
            states = self.scorer.scored_states(self.batch)
            del states
        return saved.total

    def peak(self, first: bool = False) -> int:
        """Most bytes alive in a row after the first one, weights and gradients included; or in the
        pass before it.
        """
        release_workspace()
        self.step()
        there = [p.grad for p in self.model.parameters() if p.grad is not None]
        there += list(self.model.parameters())
        work = self.score_first if first else self.step
        return peak_bytes(work) + sum(tensor.nbytes for tensor in there)

    def predicted_peak(self) -> int:
        """What is predicted for that, without optimizer states and the row's own tensors."""
        return self._alive(estimate.estimate(self.run), self.row)

    def predicted_first(self) -> int:
        """The same for the pass before the row, where the head has left no tile yet."""
        ((row,),) = self.run.first
        forward, head = estimate.scoring(self.run, row)
        tile = components.kept_workspace(self.run, row)
        return max(self._alive(forward, row) - tile, self._alive(head, row))

    def _alive(self, moment: estimate.Estimate, row: RowShape) -> int:
        tensors = components.row_tensors(self.run, row) - row.masked
        return moment.peak - moment.components["optimizer"] - tensors
