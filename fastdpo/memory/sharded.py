"""What several devices need beside the model or their shares of it: what is whole for a while.

With FSDP2 a unit is a layer, or the root: embedding, last norm and head. The root is gathered from
a row's forward to the end of its backward, a layer while it is at work, and the next one ahead of
that. Sizes are bytes.
"""

from __future__ import annotations

from ..parallel.gradients import BUCKET_BYTES
from .components import Run, gradients, head_weight
from .layer import Bytes


def gathered(run: Run, layers: int) -> Bytes:
    """The weights of the root, and of so many layers: the one at work and the next."""
    if run.spread.shards == 1:
        return {}
    return {"gathered": root_weights(run) + min(layers, run.model.layers) * run.model.layer_weights}


def root_weights(run: Run) -> int:
    """Of the root; without a head that stays sharded over the vocabulary, unless it is tied to the
    embedding.
    """
    model = run.model
    apart = run.spread.vocabulary and not model.tied
    return model.root_weights - (head_weight(model) if apart else 0)


def exchanged(run: Run, layer: int | None) -> Bytes:
    """Whole gradients until each device has its share of their sum: the head's, through the whole
    backward; while a layer is at work, in fp32 those of the layer before it, its own being counted
    with it; at the end (None) those of the root, in the weights' type and, to be added up, in fp32.
    """
    if run.spread.shards == 1:
        return {}
    model, head = run.model, 0
    if model.head_trained and not (run.spread.vocabulary and not model.tied):
        head = 4 * model.vocab * model.hidden
    if layer is not None:
        before = fp32(run, model.layer_trained) if layer < model.layers - 1 else 0
        return {"exchanged": head + before}
    root = gradients(model) - model.layers * model.layer_trained
    if run.spread.vocabulary and model.head_trained and not model.tied:
        root -= head_weight(model)
    return {"exchanged": root + fp32(run, root)}


def summed(run: Run) -> Bytes:
    """The fp32 copies in which whole models add their gradients up: a bucket on its way, and the
    next one.
    """
    if run.spread.devices == 1 or run.spread.shards > 1:
        return {}
    sizes = [0]
    for count, size in run.model.trained:
        if sizes[-1] > BUCKET_BYTES:
            sizes.append(0)
        sizes[-1] += count * max(size, 4)
    return {"exchanged": max(sum(sizes[i : i + 2]) for i in range(len(sizes)))}


def fp32(run: Run, size: int) -> int:
    """Bytes in fp32 of gradients of so many bytes in the weights' own types."""
    whole = gradients(run.model)
    return size * 4 * sum(count for count, _ in run.model.trained) // whole
