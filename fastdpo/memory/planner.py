"""What configurations of a run would need, predicted for one model, one data set and one device.

Nothing is trained and no weights are loaded: the model is built on the meta device, and of the data
the lengths count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..config import TrainConfig
from ..data.batch import make_batch
from ..data.dataset import Data, load_data, needs_reference
from ..data.groups import Groups, count_units
from ..data.packing import PackedRow, longest_unit
from ..data.plan import epoch_plan, row_budget, units_per_step
from ..devices import Device
from ..losses import TrainingLoss, loss_of
from ..model import tiles
from ..model.adapter import adopt_adapter
from ..model.head import base_causal_lm
from ..model.layout import expected_layout
from ..model.load import load_model_config, load_tokenizer
from ..model.passes import HeadCalls, mean_passes
from ..model.precision import choose_precision
from .assumed import assumed_data
from .components import Run
from .estimate import Estimate, estimate
from .exchange import Links, waits
from .layer import LayerProbe
from .shapes import (
    ModelShape,
    RowShape,
    decoder_layers,
    is_base_linear,
    linears,
    meta_model,
    mismatched_shapes,
    scaled,
    step_shapes,
)
from .speed import Seconds, step_seconds
from .spread import ONE, Spread

_COUNTED_ROWS = 64
"""Of the first steps, whose passes through the head are counted."""
_SHAPING = ("dtype", "use_peft", "load_in_4bit", "use_bnb_nested_quant", "layer_tile_tokens")


@dataclass(frozen=True)
class Prediction:
    """What one configuration needs."""

    config: TrainConfig
    estimate: Estimate
    seconds: Seconds | None
    max_tokens: int


@dataclass
class _Rows:
    """Of every step the rows that are trained on, and those of mismatched responses."""

    steps: list[list[RowShape]]
    mismatched: list[list[RowShape]]
    first: list[PackedRow]
    """The first `_COUNTED_ROWS` that are trained on."""


@dataclass
class Planner:
    """Predicts configurations that differ in memory keys, for one model, loss, data and device."""

    config: TrainConfig
    data: Data
    device: Device
    autocast: torch.dtype | None
    model_config: Any
    assumed: str | None = None
    """What was assumed in place of data, in words."""
    spread: Spread = ONE
    """The devices of the run, `device` each."""
    links: Links | None = None
    """What joins them, where it is known."""
    _models: dict[Any, tuple[ModelShape, LayerProbe]] = field(default_factory=dict)
    _rows: dict[tuple[int, int], _Rows] = field(default_factory=dict)

    @property
    def groups(self) -> Groups:
        """What is trained on."""
        return Groups.of(self.data.train)

    @cached_property
    def loss(self) -> TrainingLoss:
        """What is trained with."""
        return loss_of(self.config)

    @cached_property
    def compares(self) -> bool:
        """Whether the loss reads log-probabilities of a reference."""
        return needs_reference(self.loss, self.data)

    @property
    def layout(self) -> str:
        """The layout that the start-up check is expected to find, from the configuration alone."""
        return expected_layout(self.config, self.model_config)

    @property
    def longest(self) -> int:
        """Tokens of the longest unit: no row budget makes rows shorter."""
        return longest_unit(self.groups, self.layout)

    def over(self, spread: Spread) -> Planner:
        """The same for other devices; what is known of the model is shared."""
        return replace(self, spread=spread)

    def predict(self, config: TrainConfig) -> Prediction:
        """Peak and time of a configuration on each device."""
        run = self.run(config)
        seconds = step_seconds(run, self.device)
        if seconds is not None and self.spread.devices > 1:
            links = self.links
            waited = None if links is None else waits(run, self.device, links).waited
            seconds = None if waited is None else replace(seconds, waits=waited)
        return Prediction(config, estimate(run), seconds, run.max_tokens)

    def run(self, config: TrainConfig) -> Run:
        """What is estimated of a configuration."""
        model, probe = self._model(config)
        rows, cp_size = self._rows_of(config), self.spread.cp_size
        return Run(
            config=config,
            loss=self.loss,
            compares=self.compares,
            model=model,
            probe=probe,
            steps=_stretches(rows.steps, cp_size),
            kind=self.device.kind,
            autocast=self.autocast,
            max_tokens=row_budget(config, self.device.kind),
            mismatched=_stretches(rows.mismatched, cp_size),
            spread=self.spread,
            workspace_mib=self.device.workspace_mib,
        )

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

    def head_passes(self, config: TrainConfig) -> float | None:
        """Of the first rows of an epoch, see `fastdpo_kernels.head_passes`; None where the head
        stays sharded: its devices score their tokens together.
        """
        run = self.run(config)
        if run.spread.vocabulary:
            return None
        calls = HeadCalls(
            run.model.vocab,
            run.model.hidden,
            run.head_dtype,
            torch.device(run.kind),
            run.model.head_trained,
            config.head_workspace_mib or run.workspace_mib,
            None if run.spread.cp_size == 1 else lambda count: -(-count // run.spread.cp_size),
        )
        rows = self._rows_of(run.config).first
        batches = [
            make_batch(self.groups, row, self.layout, prompt=self.loss.prompt) for row in rows
        ]
        return mean_passes(calls, batches, self.loss.loss)

    def steps(self, config: TrainConfig) -> list[list[RowShape]]:
        """The rows of every step of the first epoch, whole."""
        return self._rows_of(config).steps

    def _rows_of(self, config: TrainConfig) -> _Rows:
        max_tokens = row_budget(config, self.device.kind)
        units = units_of_a_rank(config, self.spread.ranks)
        if (max_tokens, units) not in self._rows:
            steps = epoch_plan(
                config, self.groups, layout=self.layout, max_tokens=max_tokens, units=units
            )
            first = islice((row for step in steps for row in step.ranks[0] if row), _COUNTED_ROWS)
            self._rows[max_tokens, units] = _Rows(
                step_shapes(self.groups, steps, self.layout, prompt=self.loss.prompt),
                mismatched_shapes(self.groups, steps, self.layout),
                list(first),
            )
        return self._rows[max_tokens, units]


def units_of_a_rank(config: TrainConfig, ranks: int) -> int:
    """Units of a step on each of the ranks with rows of their own. A plan takes them in the order
    of one device: that one rank of many has other rows, of as many tokens, is left out.
    """
    return -(-units_per_step(config, ranks) // ranks)


def _stretches(steps: list[list[RowShape]], cp_size: int) -> list[list[RowShape]]:
    """What each of the devices that share rows computes of them."""
    if cp_size == 1:
        return steps
    return [[scaled(row, -(-row.tokens // cp_size)) for row in step] for step in steps]


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


def make_planner(config: TrainConfig, device: Device) -> Planner:
    """A planner with the data that the configuration names, or with assumed lengths."""
    config.require("model_name_or_path")
    config = adopt_adapter(config)
    model_config, assumed = load_model_config(config), None
    if config.dataset_name is None and not config.datasets:
        data, assumed = assumed_data(config, loss_of(config))
    else:
        vocab_size = getattr(model_config.get_text_config(), "vocab_size", None)
        data = load_data(config, load_tokenizer(config), vocab_size)
    precision = planned_precision(config, device)
    return Planner(data.config, data, device, precision, model_config, assumed)


def planned_precision(config: TrainConfig, device: Device) -> torch.dtype | None:
    """The autocast of a run on that device: every GPU of the table has bf16 units."""
    if device.kind == "cuda":
        return None if config.bf16 is False else torch.bfloat16
    return choose_precision(config.bf16, torch.device("cpu"))[0]


def describe_data(planner: Planner) -> str:
    """Units of the loss, groups and lengths in one line."""
    if planner.assumed:
        return planner.assumed
    lengths = planner.groups.sequence_lengths()
    unit, count = planner.loss.unit, count_units(planner.groups)
    where = f"in {len(planner.groups)} groups"
    if unit == "group":
        where = f"of {len(lengths)} responses in all"
    return (
        f"{count} {unit}s {where}; "
        f"sequences of {math.floor(np.median(lengths))} tokens (median), {lengths.max()} (longest)"
    )
