"""The peak memory of a run before it runs: what is held at each moment of a step, by component.

A step forwards and backwards its rows one after the other and then updates the weights; for some
losses it scores responses without gradients before. The moments at which most is alive are few: the
end of the layers' forward, the head, the backward of each layer, the embedding's gradient, the
optimizer's step, that scoring pass; and before training, the reference pass. Each function here is
one moment, made of what `components` gives; the largest moment is the peak. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.plan import reference_budget
from .components import (
    Run,
    cast_weights,
    constant,
    dequantised,
    gradients,
    head_states,
    head_weights,
    head_workspace,
    held_by_layers,
    held_gradients,
    kept_workspace,
    rounded_head,
    row_tensors,
    scored_states,
)
from .layer import Bytes
from .shapes import RowShape, scaled
from .sharded import exchanged, gathered, summed

COMPONENTS = {
    "weights": "weights",
    "reference": "weights of the reference",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "checkpoints": "inputs of recomputed layers",
    "activations": "kept activations",
    "layer": "one layer at work",
    "attention": "attention",
    "head": "head",
    "rows": "index tensors",
}
"""Every component, in the order in which reports show them, and what it is called there."""

OF_SHARDS = {"gathered": "weights gathered to be used", "exchanged": "gradients not yet shared out"}
"""Those that a sharded model has besides."""


@dataclass(frozen=True)
class Estimate:
    """The bytes of every component at the moment of the peak."""

    moment: str
    components: Bytes
    row: RowShape | None

    @property
    def peak(self) -> int:
        """Bytes of all tensors together."""
        return sum(self.components.values())


def estimate(run: Run) -> Estimate:
    """The largest moment of a step over the rows that can be the largest."""
    moments = [optimizer_step(run)]
    if run.spread.devices > 1:
        moments.append(sum_over_devices(run))
    for row in largest_rows(run.steps):
        moments += [forward(run, row), head(run, row), *backward(run, row), embedding(run, row)]
        if run.second_model:
            moments.append(reference_row(run, row))
    for row in largest_rows(run.first):
        moments += scoring(run, row)
        if run.second_model:
            moments.append(reference_row(run, row))
    if run.precomputes:
        moments.append(precompute(run))
    return max(moments, key=lambda moment: moment.peak)


def largest_rows(steps: Sequence[Sequence[RowShape]]) -> list[RowShape]:
    """The rows with most tokens, most gathered keys, most scored tokens and the largest masks."""
    rows = [row for step in steps for row in step]
    names = ("tokens", "keys", "scored", "masked") if rows else ()
    return list(dict.fromkeys(max(rows, key=lambda row: getattr(row, n)) for n in names))


# The moments of a step


def forward(run: Run, row: RowShape) -> Estimate:
    """The last layer's forward: all that the layers hold, one layer's own forward, and the bf16
    copies that autocast keeps of the trained weights of checkpointed layers (others hold them
    themselves).
    """
    model, layer = run.model, run.layer(row)
    copies = cast_weights(run, sum(run.checkpointed(number) for number in range(model.layers)))
    return _moment(
        "forward of the last layer",
        run,
        row,
        {"gradients": held_gradients(run, 0, head=False), "layer": copies},
        held_by_layers(run, row, model.layers),
        layer.forward,
        gathered(run, 2),
    )


def head(run: Run, row: RowShape) -> Estimate:
    """The head: states and gradient of T tokens, the gradient of the weight, what is made beside a
    tile; and the tile itself, where it is not kept.
    """
    tile = head_workspace(run, row)
    inside = head_states(run, row) + head_weights(run) + tile.beside
    inside += 0 if run.kind == "cpu" else tile.tile
    return _moment(
        "head",
        run,
        row,
        {"gradients": held_gradients(run, 0, head=False), "head": inside},
        held_by_layers(run, row, run.model.layers),
        gathered(run, 0),
    )


def backward(run: Run, row: RowShape) -> list[Estimate]:
    """The backward of every layer, from the last one: what the layers before it hold, its own
    activations (recomputed where it is checkpointed) and the gradients so far.
    """
    model, layer, moments = run.model, run.layer(row), []
    extra = dequantised(run)
    for number in reversed(range(model.layers)):
        own = layer.recomputed if run.checkpointed(number) else layer.backward
        held = held_by_layers(run, row, number)
        if run.offloads and number:  # the next one is on its way in
            held["checkpoints"] = layer.input
        held["activations"] += layer.rest if not number else 0
        done = model.layers - 1 - number
        grads = {"gradients": held_gradients(run, done), "layer": extra}
        name = f"backward of layer {number + 1} of {model.layers}"
        whole = gathered(run, min(2, number + 1)) | exchanged(run, number)
        moments.append(_moment(name, run, row, grads, held, own, whole))
    return moments


def embedding(run: Run, row: RowShape) -> Estimate:
    """The end of the backward: all gradients, the gradient of the hidden states, and that of the
    embedding before it is added to the one that is there (of another row, or of a tied head).
    """
    model = run.model
    # Of a sharded model every row's gradients are made anew.
    before = run.accumulates and run.spread.shards == 1
    added = before or model.tied or run.config.optimizer_in_backward
    temporary = model.embedding_trained if added else 0
    whole = 0 if run.config.optimizer_in_backward else run.spread.share(gradients(model))
    inside = {"gradients": whole + temporary, "activations": run.layer(row).input}
    rest = gathered(run, 0) | exchanged(run, None)
    return _moment("backward of the embedding", run, row, inside, rest)


def optimizer_step(run: Run) -> Estimate:
    """Weights, gradients and states; adamw_torch makes two numbers for each element of one weight
    at a time.
    """
    whole = 0 if run.config.optimizer_in_backward else run.spread.share(gradients(run.model))
    largest = run.spread.share(max(size * count for count, size in run.model.trained))
    inside = {"gradients": whole + (2 * largest if run.config.optim == "adamw_torch" else 0)}
    return _moment("optimizer's step", run, None, inside)


def sum_over_devices(run: Run) -> Estimate:
    """What the optimizer's step finds, while whole models add their gradients up."""
    inside = {"gradients": run.spread.share(gradients(run.model))}
    return _moment("sum of the gradients", run, None, inside, summed(run))


def reference_row(run: Run, row: RowShape) -> Estimate:
    """The online reference's forward, ahead of the policy's."""
    inside = {"gradients": held_gradients(run, 0, head=False), "head": head_states(run, row)}
    of_layer = run.layer(row).forward
    return _moment("forward of the reference", run, row, inside, of_layer, gathered(run, 2))


def scoring(run: Run, row: RowShape) -> list[Estimate]:
    """The pass over a row before the step's own: a forward that keeps nothing for a backward, with
    the copies that autocast keeps of all trained weights, then the head without gradients. A GPU
    holds no gradients yet.
    """
    layer, tile = run.layer(row), head_workspace(run, row, measures=False)
    there = {"gradients": held_gradients(run, 0, head=False) if run.kind == "cpu" else 0}
    copies = {"layer": cast_weights(run, run.model.layers)}
    states = {"activations": layer.rest + layer.input}
    inside = scored_states(run, row) + rounded_head(run) + tile.beside
    inside += 0 if run.kind == "cpu" else tile.tile
    parts = (copies, states, layer.forward, gathered(run, 2))
    return [
        _moment("forward of the scoring pass", run, row, there, *parts),
        _moment("head of the scoring pass", run, row, there, {"head": inside}, gathered(run, 0)),
    ]


def precompute(run: Run) -> Estimate:
    """The reference pass before training: rows without a backward, four times as long on a GPU;
    neither gradients nor states are there, and no prompts are scored.
    """
    rows = [row for step in (*run.steps, *run.mismatched) for row in step]
    everything = sum(row.tokens for row in rows)
    largest = max(rows, key=lambda row: row.tokens)
    wanted = min(everything, max(largest.tokens, reference_budget(run.max_tokens, run.kind)))
    row = scaled(largest, wanted // largest.sequences * largest.sequences)
    layer = run.layer(row)
    inside = {
        "weights": run.spread.share(run.model.weights),
        "activations": layer.rest + layer.input,
        "head": (row.scored - row.prompts) * run.model.hidden * layer.states,
        "rows": row_tensors(run, row),
    }
    return _joined("reference pass", row, inside, layer.forward, gathered(run, 2))


def _moment(name: str, run: Run, row: RowShape | None, *parts: Bytes) -> Estimate:
    """A moment of training: what is there all the time and the bytes of `parts`."""
    always = constant(run)
    if row is not None:
        always |= {"rows": row_tensors(run, row), "head": kept_workspace(run, row)}
    return _joined(name, row, always, *parts)


def _joined(name: str, row: RowShape | None, *parts: Bytes) -> Estimate:
    total = dict.fromkeys(COMPONENTS, 0)
    for part in parts:
        for component, size in part.items():
            total[component] = total.get(component, 0) + size
    return Estimate(name, total, row)
