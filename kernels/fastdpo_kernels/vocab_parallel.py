"""The head of `linear_logprob` and `linear_loss` with its weight spread over the ranks of a group
by rows, that is over the vocabulary, and never gathered. The work is in `sharded/`.
"""

from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import library, regimes
from .backends import choose_backend
from .call import wide
from .logprob import check_outputs, head_options, linear_logprob
from .loss import LinearLoss, linear_loss, named_stats
from .losses import Loss
from .losses.registry import Kind
from .problem import Problem
from .sharded import autograd
from .sharded.call import Ranks, ShardCall, begin, check_shard
from .sharded.exchange import Exchange
from .unit_arguments import UnitArguments, loss_of, unit_arguments


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    group: "dist.ProcessGroup",
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    backend: str = "auto",
    workspace_mib: int | None = None,
):
    """`linear_logprob` of this rank's tokens under a head whose rows are spread over a group.

    Every rank of the group calls this together, with tokens of its own, as many as it has (also
    none), and the same options; and so does the backward of every rank. A weight that is trained
    gets the gradient of all ranks' tokens, for the rows of this rank.

    Hidden states are gathered in the dtype that the head computes in, their gradients are added
    where they belong: 2·T·H numbers of 2 bytes, in bf16 and fp16, for T tokens of all ranks, and a
    few fp32 numbers a token. The states of all ranks are kept for the backward of a trained head.

    Args:
        hidden, targets: (..., H) and (...) of this rank, targets in [0, V).
        weight, bias: (rows, H) and (rows,) or None, the rows of this rank; the ranks of the group
            follow each other, with any number each (also none).
        group: of `torch.distributed`. One with a backend for the host too, as without a name of a
            backend, spares a wait for the device.
        vocab_start: the token of the first row, checked where it is given.
        vocab_size: V, where the last rows are padding and no token; default: all rows.
        softcap, logit_scale, temperature, ignore_index, outputs: as in `linear_logprob`.
        backend: as in `linear_logprob`; "naive" gathers the weight.
        workspace_mib: MiB that a tile of logits may take on a rank, with the states that are
            exchanged for it; None: what suits the device with the least memory.

    Returns:
        As `linear_logprob`.

    Raises:
        ValueError: as `linear_logprob`; on every rank, where shards do not follow each other or
            ranks disagree on the width, dtypes or options.
    """
    settings = {"temperature": temperature, "outputs": tuple(outputs), "kind": "logprob"}
    head, flat = _Head(softcap, logit_scale, ignore_index, backend, workspace_mib), hidden
    if hidden.ndim != 2:
        flat = hidden.reshape(-1, hidden.shape[-1])
    start = _start(
        (flat, weight, bias), targets.reshape(-1), group, vocab_start, vocab_size, head, settings
    )
    if start.naive:
        options = start.scalars | {"ignore_index": ignore_index, "outputs": outputs}
        full_weight, full_bias = start.gathered()
        return linear_logprob(hidden, full_weight, targets, full_bias, backend="naive", **options)
    found = torch.compiler.disable(_logprob)(start, targets.reshape(-1), outputs)
    values = [value.view(targets.shape) for value in found]
    return namedtuple("LinearLogprob", ("logprob", *outputs))(*values) if outputs else values[0]


def vocab_parallel_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    response_ids: Tensor,
    units: Tensor,
    ref_logps: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group: "dist.ProcessGroup",
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    loss: str | Loss | Callable[[Any], Tensor] = "sigmoid",
    kind: Kind = "comparison",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    given: Mapping[str, Tensor] | None = None,
    ref_token_logps: Tensor | None = None,
    unit_weights: Tensor | None = None,
    response_lengths: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    outputs: tuple[str, ...] = (),
    workspace_mib: int | None = None,
    **options: Any,
) -> LinearLoss:
    """`linear_loss` of this rank's units under a head whose rows are spread over a group.

    Every rank of the group calls this together, with units of its own; a loss of kind "step" sees
    those of this rank. The loss is this rank's share, as `unit_weights` make it. Of that share is
    the gradient of hidden states; the gradient of weight and bias is that of the sum of all shares,
    for the rows of this rank, and is formed here: every rank multiplies its share by the same
    factor, 1 as a rule, before it calls `backward`.

    Tokens go through the head in rounds of whole units of all ranks, each no larger than a tile, in
    6TVH operations (as in `linear_loss`, and with its exceptions), of which a rank does its share
    of the vocabulary. Bytes, and arguments that are not named here, as in `vocab_parallel_logprob`
    and `linear_loss`; nothing of other ranks is kept for the backward.

    Args:
        response_ids, units: of this rank, best on the host, where tokens may need to be cut.

    Raises:
        ValueError: as both.
    """
    made = loss_of(loss, kind, beta, label_smoothing, options)
    name = loss if isinstance(loss, str) else made.name
    constants = library.Given(made, ref_token_logps, given or {})
    scored = targets != ignore_index
    rest = unit_arguments(
        *(hidden, scored, response_ids, units, ref_logps, name, constants),
        unit_weights,
        response_lengths,
    )
    head = _Head(softcap, logit_scale, ignore_index, backend, workspace_mib)
    measured = regimes.measured(made, outputs)
    settings = {"temperature": 1.0, "outputs": measured, "kind": "loss"}
    operands = (hidden, weight, bias)
    start = _start(operands, targets, group, vocab_start, vocab_size, head, settings)
    if start.naive:
        full_weight, full_bias = start.gathered()
        response_ids, units, ref_logps, unit_weights, response_lengths = rest
        if made.kind in ("response", "tokens"):
            units = units.squeeze(1)
        return linear_loss(
            *(hidden, full_weight, targets, response_ids, units, ref_logps, full_bias),
            loss=made,
            given=given,
            ref_token_logps=ref_token_logps,
            unit_weights=unit_weights,
            response_lengths=response_lengths,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            backend="naive",
            outputs=outputs,
        )
    return torch.compiler.disable(_loss)(start, targets, rest, constants, outputs)


class _Head(NamedTuple):
    softcap: float | None
    logit_scale: float
    ignore_index: int
    backend: str
    workspace_mib: int | None


class _Start(NamedTuple):
    """A call whose shards are known to fit each other."""

    exchange: Exchange
    ranks: Ranks
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any]
    naive: bool

    @property
    def scalars(self) -> dict[str, Any]:
        return {name: self.options[name] for name in ("softcap", "logit_scale", "temperature")}

    def gathered(self) -> tuple[Tensor, Tensor | None]:
        """The whole head, whose gradient is added up where its rows lie."""
        columns, exact = self.ranks.shards.columns, wide(self.options["dtype"])
        weight = autograd.Gathered.apply(self.weight.to(exact), self.exchange, columns)
        if self.bias is None:
            return weight, None
        bias = autograd.Gathered.apply(self.bias.to(exact).unsqueeze(1), self.exchange, columns)
        return weight, bias.squeeze(1)

    def begin(self, targets: Tensor, kept: bool) -> ShardCall:
        operands = (self.hidden, self.weight, self.bias)
        with torch.no_grad():
            return begin(self.exchange, self.ranks, *operands, targets, kept, self.options)


def _start(
    operands: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    group: "dist.ProcessGroup",
    vocab_start: int | None,
    vocab_size: int | None,
    head: _Head,
    settings: dict[str, Any],
) -> _Start:
    """Check everything, with the other ranks of the group too."""
    check_outputs(settings["outputs"])
    hidden, weight, bias = operands
    options = head_options(
        *operands, head.softcap, head.logit_scale, settings["temperature"], head.ignore_index
    )
    backend = choose_backend(head.backend, hidden.device, options["dtype"], hidden.shape[-1])
    options |= {
        "workspace_mib": head.workspace_mib,
        "backend": backend,
        "outputs": settings["outputs"],
    }
    exchange = Exchange(group)
    told = settings | options | {"vocab_size": vocab_size}
    ranks = check_shard(exchange, *operands, targets, told, vocab_start)
    if vocab_size is not None:
        rows = ranks.shards.vocab
        if vocab_size > rows or vocab_size < 1:
            raise ValueError(f"vocab_size: expected 1 to {rows} rows, got {vocab_size}")
        ranks = ranks._replace(shards=ranks.shards.without_padding(vocab_size))
        count = ranks.shards.columns[exchange.rank]
        weight, bias = weight[:count], None if bias is None else bias[:count]
    return _Start(exchange, ranks, hidden, weight, bias, options, backend == "naive")


def _logprob(start: _Start, targets: Tensor, outputs: tuple[str, ...]) -> tuple[Tensor, ...]:
    call = start.begin(targets, kept=False)
    return autograd.Logprob.apply(start.hidden, start.weight, start.bias, call, outputs)


def _loss(
    start: _Start,
    targets: Tensor,
    rest: UnitArguments,
    given: library.Given,
    outputs: tuple[str, ...],
) -> LinearLoss:
    call = start.begin(targets, kept=True)
    reference = given.ref_token_logps
    reference = None if reference is None else call.take(reference)
    ids, units, ref_logps, weights, lengths = rest
    constants = (given.loss, reference, given.constants)
    problem = Problem.build(
        call.targets, call.take(ids), units, ref_logps, weights, lengths, *constants
    )
    operands = (start.hidden, start.weight, start.bias)
    value, logps, token_logps, *stats = autograd.Loss.apply(*operands, call, problem, outputs)
    found = named_stats(dict(zip(outputs, stats, strict=True)), outputs)
    return LinearLoss(value, logps, token_logps, found)
