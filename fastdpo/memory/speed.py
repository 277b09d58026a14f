"""How long a step takes, from its operations: what the layers, attention and the head compute.

A multiplication and an addition are two operations. The rate is the device's peak times
`UTILISATION`, which is an assumption and no measurement: differences between two plans mean more
than either.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..data.ranks import Work
from ..devices import Device
from .components import Run, optimizer_states
from .shapes import ModelShape, RowShape

UTILISATION = 0.45
"""The share of a GPU's peak that a step is assumed to reach."""

_HOST_BANDWIDTH = 50e9
"""Bytes a second at which a host is assumed to update weights."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of the mean step by what is done in them."""

    layers: float = 0.0
    recomputed: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    reference: float = 0.0
    scoring: float = 0.0
    """Of the pass over responses that comes before the step's own rows."""
    transfers: float = 0.0
    update: float = 0.0
    waits: float = 0.0
    """For what other devices send."""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, item.name) for item in fields(self))


def step_seconds(run: Run, device: Device) -> Seconds | None:
    """The mean step of a run; None where the device's rates are not known."""
    peak = device.bf16 if run.head_dtype.itemsize == 2 else device.fp32
    if peak is None or device.bandwidth is None or device.host_link is None:
        return None
    rate, steps = peak * UTILISATION, len(run.steps)
    sums = dict.fromkeys(
        (f.name for f in fields(Seconds) if f.name not in ("update", "waits")), 0.0
    )
    for row in (row for step in run.steps for row in step):
        layers, recomputed, attention = layer_work(run, row)
        waits = transferred(run, row) / device.host_link * rate - layers - recomputed - attention
        sums["layers"] += layers / rate
        sums["recomputed"] += recomputed / rate
        sums["attention"] += attention / rate
        sums["head"] += head_work(run, row) / rate
        sums["reference"] += reference_work(run, row) / rate
        sums["transfers"] += max(0.0, waits) / rate
    for row in (row for step in run.first for row in step):
        sums["scoring"] += (forward_work(run, row) + reference_work(run, row)) / rate
    means = {name: value / steps for name, value in sums.items()}
    return Seconds(**means, update=update_seconds(run, device))


def layer_work(run: Run, row: RowShape) -> tuple[float, float, float]:
    """Operations of the layers' matrices, of their recomputation, and of attention.

    Matrices: 2·S·n forward, as many for the gradient of the input, and as many for that of each
    trained matrix. Attention: 4·heads·head_dim for each query-key pair, the backward 2.5 times as
    many. What is recomputed is computed forward once more; in tiles, all but attention another
    time.
    """
    model, config = run.model, run.config
    once = 2.0 * row.tokens * model.linear
    layers = 2 * once + 2.0 * row.tokens * model.linear_trained
    pairs = 4.0 * model.heads * model.head_dim * row.pairs * model.layers
    share = sum(run.checkpointed(number) for number in range(model.layers)) / model.layers
    recomputed = share * (once + pairs)
    if config.layer_tile_tokens is not None and row.tokens > config.layer_tile_tokens:
        recomputed += 2.0 * row.tokens * model.linear_tokenwise
    return layers, recomputed, 3.5 * pairs


def head_work(run: Run, row: RowShape) -> float:
    """6·T·V·H, of a frozen head 4·T·V·H."""
    products = 6.0 if run.model.head_trained else 4.0
    return products * row.scored * run.model.vocab * run.model.hidden


def reference_work(run: Run, row: RowShape) -> float:
    """A forward more; 0 where it is precomputed, or none is needed."""
    return forward_work(run, row) if run.online else 0.0


def forward_work(run: Run, row: RowShape) -> float:
    """2·S·n for the layers, 4·heads·head_dim for each query-key pair, 2·T·V·H for the head."""
    model = run.model
    pairs = 4.0 * model.heads * model.head_dim * row.pairs * model.layers
    return 2.0 * row.tokens * model.linear + pairs + 2.0 * row.scored * model.vocab * model.hidden


def transferred(run: Run, row: RowShape) -> float:
    """Bytes of checkpoints that go to the host and come back while the layers compute."""
    if not run.offloads:
        return 0.0
    count = sum(run.checkpointed(number) for number in range(run.model.layers))
    return 2.0 * count * run.layer(row).input


def update_seconds(run: Run, device: Device) -> float:
    """A device's weights, gradients and states are read once and all but the gradients written
    once; offloaded, gradients go to the host and weights come back, and the host reads and writes
    28 bytes an element.
    """
    assert device.bandwidth is not None and device.host_link is not None
    trained = run.spread.share(sum(size * count for count, size in run.model.trained))
    if run.config.optimizer_offload:
        elements = sum(count for count, _ in run.model.trained)
        return 2 * trained / device.host_link + 28 * elements / _HOST_BANDWIDTH
    states = run.spread.share(optimizer_states(run.model, run.config))
    return (3 * trained + 2 * states) / device.bandwidth


def step_work(model: ModelShape) -> Work:
    """What a plan over ranks has to know of a model: what a query and a key in attention, and a
    token in the head, cost beside a token in the layers.
    """
    token = 4.0 * model.linear + 2.0 * model.linear_trained
    products = 6.0 if model.head_trained else 4.0
    return Work(
        pair=14.0 * model.heads * model.head_dim * model.layers / token,
        scored=products * model.vocab * model.hidden / token,
    )
