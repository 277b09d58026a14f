"""The components of a run's memory: what is there all the time, and what a row adds. All sizes are
bytes, S is the tokens of a row, T those that are scored, H the hidden size, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from fastdpo_kernels import workspace_bytes
from fastdpo_kernels.head import WorkspaceBytes

from ..config import TrainConfig
from ..losses import TrainingLoss
from ..model.scorer import TOKEN_STATS
from .layer import Bytes, LayerBytes, LayerProbe
from .shapes import ModelShape, RowShape
from .spread import ONE, Spread

_OFFLOADED_BUFFERS = 2
_SMALL_STATE, _STATE_BLOCK, _LOOKUP = 4096, 256, 2048


@dataclass(frozen=True)
class Run:
    """What is estimated: a configuration, its loss, model and rows, on a kind of device."""

    config: TrainConfig
    loss: TrainingLoss
    compares: bool
    """Whether reference log-probabilities are read."""
    model: ModelShape
    probe: LayerProbe
    steps: Sequence[Sequence[RowShape]]
    kind: str
    """"cuda" or "cpu"."""
    autocast: torch.dtype | None
    max_tokens: int
    mismatched: Sequence[Sequence[RowShape]] = ()
    """Of every step, the rows of mismatched responses."""
    spread: Spread = ONE
    """How the model lies over devices; the rows are those of one of them."""
    workspace_mib: int | None = None
    """Of the head, where the configuration leaves it to the device."""

    @property
    def first(self) -> Sequence[Sequence[RowShape]]:
        """Of every step, the rows that are scored before its own are trained on, those included
        that are the same; none where the loss asks for no such pass.
        """
        if not self.loss.scores_first:
            return ()
        return self.mismatched if self.loss.mismatched else self.steps

    @property
    def precomputes(self) -> bool:
        """Whether there is a reference pass before training."""
        return self.compares and self.config.precomputes

    @property
    def online(self) -> bool:
        """Whether a reference is evaluated at every step."""
        return self.compares and not self.config.precomputes

    @property
    def second_model(self) -> bool:
        """Whether a reference model is in memory while training."""
        other = bool(self.config.ref_model_name_or_path) or not self.config.use_peft
        return self.online and other

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """What the head measures of every token that is trained on."""
        weighted = ("log_sum_sq_prob",) if self.loss.loss.use_weighting else ()
        return (*TOKEN_STATS, *weighted)

    @cached_property
    def accumulates(self) -> bool:
        """Whether rows find gradients from before: of other rows or, on a CPU, zeros."""
        return self.kind == "cpu" or any(len(rows) > 1 for rows in self.steps)

    @cached_property
    def head_dtype(self) -> torch.dtype:
        """What the head computes in."""
        return self.autocast or self.model.head_dtype

    @cached_property
    def offloads(self) -> bool:
        """Whether checkpoints go to the host."""
        return self.config.activation_offloading

    def layer(self, row: RowShape) -> LayerBytes:
        """The bytes of a row in one layer."""
        there = self.accumulates or self.config.optimizer_in_backward
        return self.probe.of_row(row, there and self.spread.shards == 1)

    def checkpointed(self, number: int) -> bool:
        """Whether a layer is recomputed in the backward."""
        config = self.config
        return config.gradient_checkpointing and number % config.gradient_checkpointing_every == 0


def constant(run: Run) -> Bytes:
    """Weights, the online reference's weights (as many; precomputed, or not needed: none) and
    optimizer states: a device's share of each.
    """
    weights = run.spread.share(run.model.weights)
    return {
        "weights": weights,
        "reference": weights if run.second_model else 0,
        "optimizer": run.spread.share(optimizer_states(run.model, run.config)),
    }


def optimizer_states(model: ModelShape, config: TrainConfig) -> int:
    """Two moments of the type of each weight (AdamW: 2·itemsize·n); sgd none; offloaded only those
    of weights under 4096 elements. With 8 bits 1 byte each, 4 for every 256 of them, and lookup
    tables of 2 KiB (torchao: for each weight) for weights of 4096 elements and more; but torchao
    leaves those that are no multiple of 256 as they are, bitsandbytes embeddings, and smaller ones,
    in fp32.
    """
    if config.optim == "sgd":
        return 0
    if config.optimizer_offload:
        return sum(2 * size * count for count, size in model.trained if count < _SMALL_STATE)
    if "8bit" not in config.optim:
        return sum(2 * size * count for count, size in model.trained)
    torchao, embeddings, total = "torch" in config.optim, list(model.embeddings), 0
    for weight in model.trained:
        count, size = weight
        wide = count < _SMALL_STATE or (torchao and count % _STATE_BLOCK)
        if not torchao and weight in embeddings:
            embeddings.remove(weight)
            wide = True
        if wide:
            total += 2 * (size if torchao else 4) * count
        else:
            total += 2 * (count + 4 * -(-count // _STATE_BLOCK)) + (_LOOKUP if torchao else 0)
    return total if torchao else total + _LOOKUP


def gradients(model: ModelShape) -> int:
    """One number of the weight's own type for each trained weight: itemsize·n."""
    return sum(size * count for count, size in model.trained)


def held_gradients(run: Run, layers_done: int, *, head: bool = True) -> int:
    """Gradients at a moment of the backward when that of the last `layers_done` layers is over: all
    of them in a row after the first one, else those so far; none with `optimizer_in_backward`. Of
    a sharded model the device's share.
    """
    if run.config.optimizer_in_backward:
        return 0
    if run.accumulates:
        return run.spread.share(gradients(run.model))
    # A sharded head's is whole until the end of the backward: `sharded.exchanged` has it.
    whole = head and run.model.head_trained and run.spread.shards == 1
    own = head_weight(run.model) if whole else 0
    return own + run.spread.share(layers_done * run.model.layer_trained)


def row_tensors(run: Run, row: RowShape) -> int:
    """Index tensors of a row: ids, positions and places of S tokens, three of T, one of the
    gathered keys, 8 bytes each; as many for the reference's log-probabilities of T tokens, where
    the loss reads those; and, where attention goes segment by segment, boolean masks.
    """
    masks = 0 if run.probe.flash else row.masked
    of_tokens = 4 if run.compares and run.loss.by_tokens else 3
    return 8 * (3 * row.tokens + of_tokens * row.scored + row.keys) + masks


# The layers


def held_by_layers(run: Run, row: RowShape, layers: int) -> Bytes:
    """What the first `layers` layers hold for their backward: a checkpointed one its input (S·H),
    with offloading two of them in all; any other one its activations.
    """
    layer = run.layer(row)
    checkpoints = [layer.input for number in range(layers) if run.checkpointed(number)]
    if run.offloads:
        checkpoints = checkpoints[-_OFFLOADED_BUFFERS:]
    plain = layers - sum(run.checkpointed(number) for number in range(layers))
    return {
        "checkpoints": sum(checkpoints),
        "activations": plain * layer.kept.get("layer", 0) + (layer.rest if layers else 0),
        "attention": plain * layer.kept.get("attention", 0),
    }


def cast_weights(run: Run, layers: int) -> int:
    """The copies that autocast keeps of the trained weights of so many layers; of a sharded model
    it keeps none beside the layer at work.
    """
    if run.autocast is None or run.autocast.itemsize >= 4:
        return 0
    if run.spread.shards > 1:
        layers = min(layers, 1)
    return layers * run.model.cast * run.autocast.itemsize


def dequantised(run: Run) -> int:
    """The largest matrix of a layer, unpacked from 4 bits to 2 bytes an element while in use."""
    return 2 * run.model.largest_linear if run.config.load_in_4bit else 0


# The head


def head_rows(run: Run) -> int:
    """Rows of the head's weight that a device computes with: V, sharded over the vocabulary V/N."""
    return run.spread.share(run.model.vocab) if run.spread.vocabulary else run.model.vocab


def head_tokens(run: Run, row: RowShape) -> int:
    """Scored tokens that a device's head sees: its own T, over the vocabulary those of all N."""
    return row.scored * (run.spread.shards if run.spread.vocabulary else 1)


def head_weight(model: ModelShape) -> int:
    """V·H·itemsize."""
    return model.vocab * model.hidden * model.head_dtype.itemsize


def head_states(run: Run, row: RowShape) -> int:
    """T·H: the scored states, their rounded copy where the head computes in another type, and their
    gradient.
    """
    gradient = head_tokens(run, row) * run.model.hidden * run.layer(row).states
    return scored_states(run, row) + gradient


def scored_states(run: Run, row: RowShape) -> int:
    """T·H: the scored states, and their rounded copy where the head computes in another type."""
    size, compute = run.layer(row).states, run.head_dtype.itemsize
    rounded = compute if compute != size else 0
    return head_tokens(run, row) * run.model.hidden * (size + rounded)


def head_weights(run: Run) -> int:
    """V·H: the weight rounded to the type of the computation, and its gradient, in fp32 while more
    than one tile is added up.
    """
    model, total = run.model, rounded_head(run)
    elements = head_rows(run) * model.hidden
    if model.head_trained:
        total += elements * 4
        total += elements * model.head_dtype.itemsize if model.head_dtype.itemsize < 4 else 0
    return total


def rounded_head(run: Run) -> int:
    """V·H: the weight rounded to the type of the computation, on a CPU widened again to fp32."""
    compute = run.head_dtype.itemsize
    elements, total = head_rows(run) * run.model.hidden, 0
    if compute != run.model.head_dtype.itemsize:
        total += elements * compute
    if run.kind == "cpu" and compute < 4:
        total += elements * 4
    return total


def kept_workspace(run: Run, row: RowShape) -> int:
    """On a CPU the head's tile is kept from one call to the next."""
    return head_workspace(run, row).tile if run.kind == "cpu" else 0


def head_workspace(run: Run, row: RowShape, *, measures: bool = True) -> WorkspaceBytes:
    """The head's tile, and what is made beside it; less where it `measures` log-probabilities
    alone.
    """
    return workspace_bytes(
        head_tokens(run, row),
        head_rows(run),
        run.model.hidden,
        run.head_dtype,
        torch.device(run.kind),
        workspace_mib=run.config.head_workspace_mib or run.workspace_mib,
        outputs=run.outputs if measures else (),
        softcap=run.model.softcap,
    )
