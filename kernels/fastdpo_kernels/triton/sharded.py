"""Tiles of a head whose vocabulary is spread over the ranks of a group, by the fused kernels.

The anchor of a token is its target's logit, as on one device: the rank that holds the target tells
it to the others before the product, and what the product sums is added up over ranks. Tokens whose
sum reaches the clamp are scored once more with the highest logit as the anchor, as
`sharded/tiles.py` does with all.
"""

import math

import torch
from torch import Tensor

from ..head import Head, Stats
from ..sharded.exchange import Exchange
from ..sharded.merge import ANCHOR, LOG_SHARE, merge
from ..sharded.shards import Shards
from . import exponential
from .anchor import anchors
from .layout import TritonShardLayout
from .logits import LN2, LOG2E
from .score import TOKENS_A_LAUNCH, extras, partial_sums
from .tiles import TritonTiles


class TritonShardTiles(TritonTiles):
    """`Tiles` of the whole head, of which `head` is what this rank holds; see `ShardTiles`."""

    def __init__(
        self,
        head: Head,
        workspace_mib: int,
        outputs: tuple[str, ...],
        shards: Shards,
        exchange: Exchange,
    ) -> None:
        super().__init__(head, workspace_mib)
        weight = head.weight
        sizes = (max(shards.columns), weight.shape[1], weight.dtype, weight.device.type)
        self.rows = TritonShardLayout(*sizes, workspace_mib, outputs).rows
        self._exchange, self._vocab = exchange, shards.vocab
        self._start, self._columns = shards.starts[exchange.rank], shards.columns[exchange.rank]

    def score(self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Stats:
        parts = []
        for start in range(0, max(1, len(targets)), TOKENS_A_LAUNCH):
            some = slice(start, start + TOKENS_A_LAUNCH)
            parts.append(self._score(hidden[some], targets[some], targets[some] >= 0, outputs))
        stats = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return self._marked(stats, targets)

    def exponentials(
        self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Stats]:
        if self.head.weight.dtype == torch.float16:
            # fp16 ends at exp(11); a softmax it can hold.
            stats = self.score(hidden, targets, outputs)
            return *self.probabilities(hidden, targets, stats), stats
        tile = self.empty_tile(len(targets))
        own, owned = self._own(targets)
        anchor = self._anchors(hidden, own)
        sums, clamp = self._anchored(hidden, own, tile, anchor, outputs)
        stats = _finished(sums, anchor, outputs)
        over = (sums["rest"] >= math.exp(clamp)) & (targets >= 0)
        again = self._score(hidden, targets, over, outputs)
        stats = {name: torch.where(over, again[name], value) for name, value in stats.items()}
        if self._columns:
            flagged = own.where(owned, self._columns).where(over, -1)
            exponential.again(self.head, hidden, flagged, tile, again[ANCHOR], again[LOG_SHARE])
            slope = self.head.slope(anchor * LN2.value)
            self._put_targets(tile, own, owned & ~over, -sums["rest"] * slope)
        row_scale = torch.where(over, 1.0, (1 + sums["rest"]).reciprocal())
        return tile, self._mark(row_scale, targets), self._marked(stats, targets)

    def probabilities(self, hidden: Tensor, targets: Tensor, stats: Stats) -> tuple[Tensor, Tensor]:
        tile = self.empty_tile(len(targets))
        own, _ = self._own(targets)
        if self._columns:
            lse = stats[ANCHOR] - stats[LOG_SHARE] * LOG2E.value
            exponential.normalised(self.head, hidden, own, tile, lse, stats["logprob"])
        return tile, self._mark(torch.ones_like(stats["logprob"]), targets)

    def _own(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets among this rank's columns (t,), -1 for others, and whether they are."""
        owned = (targets >= self._start) & (targets < self._start + self._columns)
        return (targets - self._start).where(owned, -1), owned

    def _anchors(self, hidden: Tensor, own: Tensor) -> Tensor:
        """The target's logit (t,) of every token, in bits."""
        if self._columns and len(own):
            return self._exchange.total(anchors(self.head, hidden, own))
        return self._exchange.total(hidden.new_zeros(own.shape, dtype=torch.float32))

    def _anchored(
        self, hidden: Tensor, own: Tensor, tile: Tensor, anchor: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Stats, float]:
        """E in the tile but for the targets; the sums of `exponential_kernel` over all ranks (t,)
        each, and the exponent that they end at.
        """
        flags = {**extras(outputs), "HAS_TOP1": "is_top1" in outputs}
        order = ("HAS_MEAN", "HAS_TOP1", "HAS_ENTROPY", "HAS_SQUARES")
        names = ["rest", *(flag for flag in order if flags[flag])]
        if self._columns:
            found, clamp, _ = exponential.anchored(self.head, hidden, own, tile, anchor, outputs)
            parts = {name: found[i].sum(0) for i, name in enumerate(names)}
            if "HAS_TOP1" in parts:
                parts["HAS_TOP1"] = found[names.index("HAS_TOP1")].amax(0)
        else:
            clamp = exponential.clamp_of(flags)
            parts = {name: torch.zeros_like(anchor) for name in names}
        highest = parts.pop("HAS_TOP1", None)
        total = self._exchange.total(torch.stack(list(parts.values())))
        sums = dict(zip(parts, total.unbind(0), strict=True))
        if highest is not None:
            sums["HAS_TOP1"] = self._exchange.highest(highest)
        if "HAS_MEAN" in sums:
            sums["HAS_MEAN"] = sums["HAS_MEAN"] / self._vocab
        return sums, clamp

    def _score(
        self, hidden: Tensor, targets: Tensor, wanted: Tensor, outputs: tuple[str, ...]
    ) -> Stats:
        """Statistics of the tokens `wanted` (t,), and of others whatever comes out."""
        own, owned = self._own(targets)
        flags, tokens = extras(outputs), len(targets)
        count = 3 + sum(flags.values())
        if self._columns and tokens:
            column = own.where(owned, self._columns).where(wanted, -1)
            partial = partial_sums(self.head, hidden, column, outputs)
        else:
            partial = hidden.new_zeros((count, 1, tokens), dtype=torch.float32)
            partial[0] = -math.inf
        lowest = torch.finfo(torch.float32).min
        peaks = partial[0].clamp(min=lowest)
        peak = peaks.amax(0)
        shift = (peaks - peak) * LN2.value
        shrink = shift.exp()
        target = torch.where(owned, partial[2].sum(0), 0)
        mass = (partial[1] * shrink).sum(0)
        rest = mass - torch.where(owned, (target - peak).exp2(), 0)
        sums = {"peak": peak, "target": target, "mass": mass, "rest": rest.clamp_(min=0)}
        if flags["HAS_ENTROPY"]:
            inner = partial[3] + torch.where(partial[1] > 0, shift, 0) * partial[1]
            sums["moment"] = (inner * shrink).sum(0)
        if flags["HAS_SQUARES"]:
            sums["square"] = (partial[3 + flags["HAS_ENTROPY"]] * shrink.square()).sum(0)
        if flags["HAS_MEAN"]:
            sums["mean"] = partial[-1].sum(0) / max(1, self._columns)
        sums["highest"] = self._exchange.highest(peak.clone())
        share = self._columns / self._vocab
        return merge(sums, self._exchange, share, outputs, unit=LN2.value)[0]

    def put_targets(self, tile: Tensor, targets: Tensor, values: Tensor) -> None:
        if self._columns:
            self._put_targets(tile, *self._own(targets), values)

    def _put_targets(self, tile: Tensor, own: Tensor, where: Tensor, values: Tensor) -> None:
        index = own.clamp(min=0).unsqueeze(1)
        before = tile.gather(1, index)
        tile.scatter_(1, index, torch.where(where[:, None], values[:, None].to(tile.dtype), before))

    def _mark(self, values: Tensor, targets: Tensor) -> Tensor:
        """0 where a token is ignored, NaN where its target does not exist."""
        return values.masked_fill(targets < 0, 0).masked_fill(targets >= self._vocab, torch.nan)

    def _marked(self, stats: Stats, targets: Tensor) -> Stats:
        marked = {name: value.masked_fill(targets < 0, 0) for name, value in stats.items()}
        return marked | {"logprob": self._mark(stats["logprob"], targets)}


def _finished(sums: Stats, anchor: Tensor, outputs: tuple[str, ...]) -> Stats:
    """Statistics from sums with the target's logit, in bits, as the anchor, as `finish_kernel` has
    them.
    """
    rest = sums["rest"]
    s, log_s = 1 + rest, rest.log1p()
    stats = {"logprob": -log_s, "lse": anchor * LN2.value + log_s}
    stats |= {ANCHOR: anchor, LOG_SHARE: -log_s}
    if "is_top1" in outputs:
        stats["is_top1"] = (sums["HAS_TOP1"] <= 1) & (rest == rest)
    if "entropy" in outputs:
        stats["entropy"] = log_s - sums["HAS_ENTROPY"] / s
    if "log_sum_sq_prob" in outputs:
        stats["log_sum_sq_prob"] = (sums["HAS_SQUARES"] + 1).log() - 2 * log_s
    if "mean_logit" in outputs:
        stats["mean_logit"] = sums["HAS_MEAN"]
    return stats
