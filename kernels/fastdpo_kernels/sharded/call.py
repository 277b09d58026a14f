"""What a call of the sharded head begins with: what the ranks have to know of each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ..arguments import check_head, check_packed, on_the_host, scored_targets
from ..call import wide
from ..gradients import Dtypes, Needs
from ..head import Head, Stats, Tiles, workspace_of
from ..logprob import needs_of
from .exchange import Exchange
from .rounds import Round
from .shards import Shards
from .tiles import ShardTiles


@dataclass(frozen=True)
class ShardCall:
    """The tokens of this rank, and how many the others have. Every rank has one, alike."""

    exchange: Exchange
    shards: Shards
    hidden: Tensor  # (t, H) scored tokens of this rank, in the dtype that the head computes in
    targets: Tensor  # (t,) int64, -1 where ignored
    index: Tensor | None  # (t,) into all tokens of this rank, None if all are scored
    tokens: int  # of this rank, ignored ones included
    counts: list[int]  # t of every rank
    every_target: list[Tensor]  # of every rank, (t,) each
    needs: Needs
    dtypes: Dtypes  # in which gradients are kept
    input_dtypes: Dtypes
    scalars: dict[str, float | None]
    workspace_mib: int
    outputs: tuple[str, ...]  # what is measured of every token
    backend: str  # "torch" or "triton"

    def make_tiles(self, weight: Tensor, bias: Tensor | None) -> Tiles:
        """The tiles of this rank's shard of the head."""
        head = Head(weight, bias, **self.scalars).cast(self.hidden.dtype)  # type: ignore[arg-type]
        engine = _triton_tiles() if self.backend == "triton" else ShardTiles
        return engine(head, self.workspace_mib, self.outputs, self.shards, self.exchange)

    def lengths(self, piece: Round) -> list[int]:
        """How many tokens of each rank are in a round."""
        return [own.stop - own.start for own in piece]

    def mine(self, piece: Round) -> slice:
        """Where this rank's tokens are in a round."""
        lengths, rank = self.lengths(piece), self.exchange.rank
        start = sum(lengths[:rank])
        return slice(start, start + lengths[rank])

    def states(self, piece: Round) -> Tensor:
        """The hidden states of a round, of all ranks."""
        return self.exchange.gather(self.hidden[piece[self.exchange.rank]], self.lengths(piece))

    def round_targets(self, piece: Round) -> Tensor:
        """The targets of a round, of all ranks."""
        return torch.cat([t[own] for t, own in zip(self.every_target, piece, strict=True)])

    def send_back(self, partial: Tensor, piece: Round, out: Tensor) -> None:
        """Put the sum over ranks of a round's gradient into this rank's, out (t, H)."""
        narrow = self.hidden.dtype.itemsize == 2
        own = self.exchange.reduce(partial, self.lengths(piece), narrow)
        out[piece[self.exchange.rank]] = own

    def take(self, values: Tensor) -> Tensor:
        """Those of this rank's values (T, ...) that are scored."""
        if self.index is None:
            return values.contiguous()
        return values.index_select(0, self.index.to(values.device))

    def spread(self, values: Tensor) -> Tensor:
        """The values (t, ...) of scored tokens among zeros, (T, ...)."""
        if self.index is None:
            return values
        zeros = values.new_zeros((self.tokens, *values.shape[1:]))
        return zeros.index_copy_(0, self.index, values)

    def spread_all(self, stats: Stats, outputs: tuple[str, ...]) -> list[Tensor]:
        return [self.spread(stats[name]) for name in outputs]


class Ranks(NamedTuple):
    """What all ranks of a group hold, and of which tensors any of them wants a gradient."""

    shards: Shards
    counts: list[int]  # tokens of each
    needs: Needs
    workspace_mib: int  # the least of all, where it is left to the devices


def begin(
    exchange: Exchange,
    ranks: Ranks,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept: bool,
    options: dict[str, Any],
) -> ShardCall:
    """Leave out ignored tokens where the host sees them, and tell all ranks the targets.

    `kept`: whether gradients are formed with the forward, where fp16 would round them to 0.
    """
    shards, counts, needs, workspace_mib = ranks
    kept = kept or not needs.head
    dtype = options["dtype"]
    dtypes = Dtypes(hidden.dtype, weight.dtype, (weight if bias is None else bias).dtype)
    targets = scored_targets(targets, shards.vocab, options["ignore_index"]).contiguous()
    index, tokens = None, len(targets)
    if counts[exchange.rank] < tokens:
        index = (targets >= 0).nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
    every = exchange.gather(targets.int(), counts).long().split(counts)
    return ShardCall(
        exchange,
        shards,
        hidden.detach().to(dtype),
        targets,
        index,
        tokens,
        counts,
        list(every),
        needs,
        Dtypes(*(wide(d) if kept and d == torch.float16 else d for d in dtypes)),
        dtypes,
        {name: options[name] for name in ("softcap", "logit_scale", "temperature")},
        workspace_mib,
        options["outputs"],
        options["backend"],
    )


def _triton_tiles() -> Callable[[Head, int, tuple[str, ...], Shards, Exchange], Tiles]:
    """Imported where it is first used, which takes time."""
    from ..triton.sharded import TritonShardTiles

    return TritonShardTiles


def check_shard(
    exchange: Exchange,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    settings: dict[str, Any],
    vocab_start: int | None,
) -> Ranks:
    """What all ranks have, out of what each has.

    Raises:
        ValueError: on this rank, arguments that do not fit each other; on every rank, shards that
            do not follow each other, `settings` that differ, or a head that is trained here and
            not there.
    """
    check_packed(hidden)
    empty = weight.ndim == 2 and weight.shape[0] == 0
    stand_in = weight.new_empty((1, weight.shape[1])) if empty else weight
    check_head(
        hidden,
        stand_in,
        None if empty else bias,
        targets,
        settings["softcap"],
        settings["temperature"],
    )
    same = crc32(repr((hidden.shape[1], bias is None, sorted(settings.items()))).encode())
    start = -1 if vocab_start is None else vocab_start
    count = len(targets)
    if on_the_host(targets):  # elsewhere, looking would wait for the device
        count = int((targets != settings["ignore_index"]).sum())
    needs = map(int, needs_of(hidden, weight, bias))
    workspace = workspace_of(settings["workspace_mib"], hidden.device)
    mine = [weight.shape[0], start, same, count, workspace, *needs]
    found = exchange.integers(mine, hidden.device)
    shards = Shards([row[0] for row in found])
    for rank, (expected, row) in enumerate(zip(shards.starts, found, strict=True)):
        _, given, other, *_ = row
        if given not in (-1, expected):
            raise ValueError(
                f"vocab_start: expected {expected} on rank {rank} of the group, got {given}"
            )
        if other != found[0][2]:
            raise ValueError(
                f"rank {rank} of the group was given another width, dtype, bias or option of the "
                "head than rank 0"
            )
        if row[6:] != found[0][6:]:
            raise ValueError(f"weight, bias: trained on rank {rank} of the group or on 0, not both")
    trained = Needs(any(row[5] for row in found), *map(bool, found[0][6:]))
    return Ranks(shards, [row[3] for row in found], trained, min(row[4] for row in found))
