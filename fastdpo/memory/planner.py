"""What configurations of a run would need, predicted for one model, one data set and one device.

Nothing is trained and no weights are loaded: the model is built on the meta device, and of the data
the lengths count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ..config import TrainConfig
from ..data.dataset import load_data
from ..data.groups import Group, count_comparisons
from ..data.packing import longest_unit
from ..data.plan import epoch_plan, row_budget, units_per_step
from ..devices import Device
from ..model import tiles
from ..model.adapter import adopt_adapter
from ..model.head import base_causal_lm
from ..model.layout import expected_layout
from ..model.load import load_model_config, load_tokenizer
from ..model.precision import choose_precision
from .estimate import Estimate, Run, estimate
from .layer import LayerProbe
from .shapes import (
    ModelShape,
    RowShape,
    decoder_layers,
    is_base_linear,
    linears,
    meta_model,
    step_shapes,
)
from .speed import Seconds, step_seconds

_SHAPING = ("dtype", "use_peft", "load_in_4bit", "use_bnb_nested_quant", "layer_tile_tokens")
_ASSUMED_LENGTH = 1024


@dataclass(frozen=True)
class Prediction:
    """What one configuration needs."""

    config: TrainConfig
    estimate: Estimate
    seconds: Seconds | None
    max_tokens: int


@dataclass
class Planner:
    """Predicts configurations that differ in memory keys, for one model, data and device."""

    config: TrainConfig
    groups: Sequence[Group]
    device: Device
    autocast: torch.dtype | None
    model_config: Any
    assumed: str | None = None
    """What was assumed in place of data, in words."""
    _models: dict[Any, tuple[ModelShape, LayerProbe]] = field(default_factory=dict)
    _rows: dict[int, list[list[RowShape]]] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """The layout that the start-up check is expected to find, from the configuration alone."""
        return expected_layout(self.config, self.model_config)

    @property
    def longest(self) -> int:
        """Tokens of the longest single comparison: no row budget makes rows shorter."""
        return longest_unit(self.groups, self.layout)

    def predict(self, config: TrainConfig) -> Prediction:
        """Peak and time of a configuration."""
        max_tokens = row_budget(config, self.device.kind)
        model, probe = self._model(config)
        steps = self.steps(config)
        run = Run(config, model, probe, steps, self.device.kind, self.autocast, max_tokens)
        return Prediction(config, estimate(run), step_seconds(run, self.device), max_tokens)

    def fits(self, prediction: Prediction) -> bool:
        """Whether the peak is within the device's budget."""
        return prediction.estimate.peak <= self.device.budget

    def _model(self, config: TrainConfig) -> tuple[ModelShape, LayerProbe]:
        key = tuple(str(getattr(config, name)) for name in _SHAPING)
        if key not in self._models:
            model = meta_model(config, self.model_config)
            shape = ModelShape.of(model, config)
            self._models[key] = shape, probe_of(config, model, self.device.kind, self.autocast)
        return self._models[key]

    def steps(self, config: TrainConfig) -> list[list[RowShape]]:
        """The rows of every step of the first epoch."""
        max_tokens = row_budget(config, self.device.kind)
        if max_tokens not in self._rows:
            steps = epoch_plan(config, self.groups, layout=self.layout, max_tokens=max_tokens)
            self._rows[max_tokens] = step_shapes(self.groups, steps, self.layout)
        return self._rows[max_tokens]


def probe_of(
    config: TrainConfig, model: Any, kind: str, autocast: torch.dtype | None
) -> LayerProbe:
    """A probe of a model on the meta device; 4-bit matrices are in the type they multiply in."""
    if config.load_in_4bit:
        _unpack(model, autocast)
    tokens = config.layer_tile_tokens
    prepare = None if tokens is None else partial(_tile, tokens=tokens)
    flash = kind == "cuda" and config.attention_backend != "sdpa"
    return LayerProbe(model, flash, autocast, prepare)


def _unpack(model: Any, autocast: torch.dtype | None) -> None:
    """Matrices of 4 bits multiply in the type of the computation: no copy is made or kept."""
    dtype = autocast or model.get_output_embeddings().weight.dtype
    for layer in decoder_layers(model):
        for name, module in linears(layer):
            if is_base_linear(name):
                module.weight.data = module.weight.data.to(dtype)


def _tile(model: Any, tokens: int) -> None:
    """Tiles as `fastdpo.model.tiles` makes them, without its proof, which needs numbers."""
    for _, module in tiles.candidates(base_causal_lm(model)):
        if not hasattr(module, "experts"):
            tiles.run_in_tiles(module, tokens)


def assumed_groups(config: TrainConfig) -> tuple[list[Group], str]:
    """Groups for one step where there is no data: pairs whose sequences have `max_length` tokens,
    half of them the prompt's; and these words.
    """
    length = config.max_length or _ASSUMED_LENGTH
    prompt = np.zeros(length // 2, np.int32)
    response = np.zeros(length - length // 2, np.int32)
    group = Group(prompt, [response, response], [(0, 1, 1.0)])
    how = f"no data given: pairs of {length} tokens each are assumed, half of them the prompt's"
    return [group] * units_per_step(config), how


def make_planner(config: TrainConfig, device: Device) -> Planner:
    """A planner with the data that the configuration names, or with assumed lengths."""
    config.require("model_name_or_path")
    config = adopt_adapter(config)
    model_config, assumed = load_model_config(config), None
    if config.dataset_name is None:
        groups, assumed = assumed_groups(config)
    else:
        vocab_size = getattr(model_config.get_text_config(), "vocab_size", None)
        groups = load_data(config, load_tokenizer(config), vocab_size).train
    return Planner(config, groups, device, planned_precision(config, device), model_config, assumed)


def planned_precision(config: TrainConfig, device: Device) -> torch.dtype | None:
    """The autocast of a run on that device: every GPU of the table has bf16 units."""
    if device.kind == "cuda":
        return None if config.bf16 is False else torch.bfloat16
    return choose_precision(config.bf16, torch.device("cpu"))[0]


def describe_data(planner: Planner) -> str:
    """Comparisons, groups and lengths in one line."""
    if planner.assumed:
        return planner.assumed
    lengths = [
        len(group.prompt) + len(response)
        for group in planner.groups
        for response in group.responses
    ]
    return (
        f"{count_comparisons(list(planner.groups))} comparisons in {len(planner.groups)} groups; "
        f"sequences of {math.floor(np.median(lengths))} tokens (median), {max(lengths)} (longest)"
    )
