"""What the devices of a run send each other in a step, and how long a step waits for that.

Of N devices that exchange a buffer of B bytes, each sends and receives (N−1)/N·B to gather it, or
to add it up and keep a share; an all-reduce is both. The time is that of the bytes alone at
`LINK_UTILISATION` of the data sheet's rate: neither latencies nor slower devices are in it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..devices import LINKS, NETWORKS, Device
from .components import Run, gradients
from .shapes import RowShape
from .sharded import fp32, root_weights
from .speed import UTILISATION, forward_work, head_work, layer_work
from .spread import Spread

LINK_UTILISATION = 0.8
"""The share of a link's rate that an exchange is assumed to reach."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of the mean step that each device sends, and as many that it receives."""

    weights: float = 0.0
    """Gathered before the forward of each row, the layers' before its backward too."""
    gradients: float = 0.0
    """Added up among shards, each of which keeps its own, after the backward of each row."""
    sums: float = 0.0
    """Gradients added up over replicas, of whole models or of shares, once a step."""
    head: float = 0.0
    """Hidden states, and back their gradient, where the head is sharded over the vocabulary."""
    context: float = 0.0
    """Queries, keys, values and outputs among the devices that share a row."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class Links:
    """Bytes a second that arrive, each way: between devices of a host, and of each one's port.

    Attributes:
        names: of `LINKS` and `NETWORKS`.
    """

    link: float
    network: float
    names: tuple[str, str] = ("", "")

    @classmethod
    def of(cls, link: str, network: str) -> Links:
        """Those of `LINKS` and `NETWORKS`, as far as an exchange is assumed to reach them."""
        rates = LINKS[link] * LINK_UTILISATION, NETWORKS[network] * LINK_UTILISATION
        return cls(*rates, (link, network))

    def among(self, devices: int, local: int) -> float:
        """The rate of an exchange of so many devices. Over hosts it passes from device to device
        and, by the ports of all devices of a host at once, from host to host.
        """
        if devices <= local:
            return self.link
        return min(self.link, self.network * local) if local > 1 else self.network


def traffic(run: Run) -> Traffic:
    """The bytes of the mean step.

    Whole models add up their gradients in fp32 once: 2(R−1)/R of them for R replicas. N shards
    gather, for every row, (N−1)/N of the root's weights once and of the layers' twice, both once
    more for each forward of another kind (a reference at every step, a scoring pass), and share out
    (N−1)/N of the gradients in fp32; replicas of a share add those up once a step.
    """
    spread, model = run.spread, run.model
    trained = fp32(run, gradients(model))
    over, replicas = (spread.shards - 1) / spread.shards, spread.replicas
    rows, scored = rows_a_step(run)
    forwards = rows + scored + (rows if run.online else 0)
    layers, root = gathered_bytes(run)
    shared_out = trained
    if spread.vocabulary and model.head_trained and not model.tied:
        shared_out -= 4 * model.vocab * model.hidden
    return Traffic(
        weights=forwards * (layers + root) + rows * layers,
        gradients=over * rows * shared_out,
        sums=2 * (replicas - 1) / replicas * trained / spread.shards,
        head=sum(head_bytes(run, row) for step in run.steps for row in step) / len(run.steps),
        context=sum(context_bytes(run, row) for step in run.steps for row in step) / len(run.steps),
    )


def rows_a_step(run: Run) -> tuple[float, float]:
    """Rows of the mean step that are trained on, and those that are scored before them."""
    rows, scored = (sum(len(step) for step in some) for some in (run.steps, run.first))
    return rows / len(run.steps), scored / len(run.steps)


def gathered_bytes(run: Run) -> tuple[float, float]:
    """(N−1)/N of the weights of all layers, and of the root."""
    over = (run.spread.shards - 1) / run.spread.shards
    return over * (run.model.weights - run.model.root_weights), over * root_weights(run)


def head_bytes(run: Run, row: RowShape) -> float:
    """(N−1)/N of 2·N·T·H in the head's type: each device's T hidden states go to all others, and
    the gradients come back; two numbers a token (fp32) are added up.
    """
    spread = run.spread
    if not spread.vocabulary:
        return 0.0
    tokens = row.scored * spread.shards
    sent = 2 * tokens * run.model.hidden * run.head_dtype.itemsize
    return (spread.shards - 1) / spread.shards * (sent + 2 * 2 * 4 * tokens)


def context_bytes(run: Run, row: RowShape) -> float:
    """Attention by heads: of each layer (C−1)/C of the device's tokens' queries, keys, values and
    outputs in the forward, as many in the backward, and once more where it is recomputed.
    """
    size = run.spread.cp_size
    if size == 1:
        return 0.0
    model = run.model
    width = 2 * (model.heads + model.kv_heads) * model.head_dim * run.head_dtype.itemsize
    layers = sum(3 if run.checkpointed(number) else 2 for number in range(model.layers))
    return (size - 1) / size * row.tokens * width * layers


@dataclass(frozen=True)
class Waits:
    """Seconds of the mean step: of its exchanges, and those of them that nothing is computed in."""

    exchanged: float
    waited: float


def waits(run: Run, device: Device, links: Links) -> Waits:
    """How long a step's exchanges take, and how long it waits for them.

    The weights of a layer are gathered while the one before it computes, and its gradients shared
    out and added up while the next one's are computed; what is longer than the computation is
    waited for, and at least the root's. What follows the last row (whole models' gradients) and
    what a layer cannot do without (the head's and the context's) are waited for whole.
    """
    spread, sent = run.spread, traffic(run)
    shards, replicas = links.among(spread.shards, spread.local), _over_replicas(spread, links)
    forward, backward = _work(run, device)
    layers, root = gathered_bytes(run)
    rows = rows_a_step(run)[0]
    in_forward = (sent.weights - rows * layers) / shards
    in_backward = (rows * layers + sent.gradients) / shards
    alone = sent.head / shards + sent.context / links.among(spread.cp_size, spread.local)
    if spread.shards > 1:
        in_backward += sent.sums / replicas
    else:
        alone += sent.sums / replicas
    later = max(0.0, in_forward - forward) + max(0.0, in_backward - backward)
    exchanged = in_forward + in_backward + alone
    return Waits(exchanged, min(exchanged, alone + max(later, rows * root / shards)))


def _over_replicas(spread: Spread, links: Links) -> float:
    """Replicas of one share lie on different hosts, where there are several."""
    if spread.name == "hsdp" and spread.hosts > 1:
        return links.network
    return links.among(spread.devices, spread.local)


def _work(run: Run, device: Device) -> tuple[float, float]:
    """Seconds of the mean step's forwards and backwards."""
    peak = device.bf16 if run.head_dtype.itemsize == 2 else device.fp32
    assert peak is not None
    rate, steps = peak * UTILISATION, len(run.steps)
    forward = backward = 0.0
    for row in (row for step in run.steps for row in step):
        once = forward_work(run, row)
        forward += once * (2 if run.online else 1)
        backward += sum(layer_work(run, row)) + head_work(run, row) - once
    forward += sum(forward_work(run, row) for step in run.first for row in step)
    return forward / rate / steps, backward / rate / steps
