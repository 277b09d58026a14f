"""Tiles of a head whose vocabulary is spread over the ranks of a group, in plain PyTorch.

All ranks score the same tokens, each against its own columns. The anchor of a token is its highest
logit on this rank, m_r, so that the exponentials E = exp(z − m_r) are written once, before anything
is exchanged. Then, with the highest m of all m_r and f_r = exp(m_r − m),

    s = exp(z_y − m) + Σ_r f_r·Σ_{v≠y} E_v,      logp = z_y − m − log s,

and f_r/s is the tile's `row_scale`. On the rank that holds the target, its entry becomes
−(s − exp(z_y − m))/f_r, which makes the row softmax − onehot once f_r/s is multiplied in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..head import Head, Stats, WorkspaceBytes
from ..tiles import APART, FAR, MAX_TILE_ROWS, TILE_SHARE, TorchLayout, TorchTiles
from .exchange import Exchange
from .merge import ANCHOR, LOG_SHARE, merge
from .shards import Shards


@dataclass(frozen=True)
class ShardLayout(TorchLayout):
    """`TorchLayout` for the columns of the widest of `shards` ranks, the same on all of them."""

    shards: int = 1

    @property
    def rows(self) -> int:
        """A tile stays within `workspace_mib` MiB together with the states (t, H) of its tokens, as
        they come and widened, their product with the tile, and what of that is sent and received.
        """
        states = self._exchanged + 2 * self.width * self.tile_dtype.itemsize
        budget = int((self.workspace_mib << 20) * TILE_SHARE)
        return max(1, min(self.shards * MAX_TILE_ROWS, budget // (self._row_bytes + states)))

    def bytes(self, tokens: int, softcap: bool) -> WorkspaceBytes:
        tile, beside = super().bytes(tokens, softcap)
        return WorkspaceBytes(tile, beside + min(tokens, self.rows) * self._exchanged)

    @property
    def _exchanged(self) -> int:
        """Bytes of a token's states, and of their gradient as it is sent and received."""
        return 3 * self.width * self.dtype.itemsize


class ShardTiles(TorchTiles):
    """`Tiles` of the whole head, of which `head` is what this rank holds.

    Every rank makes the same calls with the same tokens. Statistics are those of the whole head;
    what is made from a tile is this rank's share, over the vocabulary, of what it is for the whole.
    """

    def __init__(
        self,
        head: Head,
        workspace_mib: int,
        outputs: tuple[str, ...],
        shards: Shards,
        exchange: Exchange,
    ) -> None:
        weight = head.weight
        sizes = (max(shards.columns), weight.shape[1], weight.dtype, weight.device.type)
        layout = ShardLayout(*sizes, workspace_mib, outputs, exchange.size)
        self._lay_out(head, layout)
        self._exchange = exchange
        self._start, self._columns = shards.starts[exchange.rank], shards.columns[exchange.rank]
        self.vocab = shards.vocab
        # Where this rank's logits of a token are so far below others that exp is 0, the target's
        # entry still counts: no anchor is further below than this.
        self._least = 1e-16 if self._dtype == torch.float32 else 1e-60

    def score(self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Stats:
        parts = []
        for start in range(0, max(1, targets.shape[0]), self.rows):
            some = slice(start, start + self.rows)
            _, sums = self._sums(hidden[some], targets[some], outputs, slope=False)
            parts.append(self._merge(sums, targets[some], outputs)[0])
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def exponentials(
        self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Stats]:
        tile, sums = self._sums(hidden, targets, outputs, slope=True)
        stats, rest, row_scale = self._merge(sums, targets, outputs)
        factor = (sums["peak"] - sums["highest"]).exp_()
        factor = torch.where(self._owned(targets), factor.clamp(min=self._least), factor)
        self.put_targets(tile, targets, -rest / factor * sums["slope"])
        row_scale = row_scale * factor
        self._mark(row_scale, targets)
        return tile, row_scale, stats

    def probabilities(self, hidden: Tensor, targets: Tensor, stats: Stats) -> tuple[Tensor, Tensor]:
        share = stats[LOG_SHARE].masked_fill(targets < 0, -torch.inf)
        logprob = stats["logprob"].masked_fill(targets < 0, -torch.inf)
        index = self._index(targets)
        tile = self._products(hidden, index)
        for some in self._blocks(tile):
            slope = self._finish_logits(tile[some], slope=True)
            # lse = a − LOG_SHARE is too coarse a number where logits are large.
            p = tile[some].sub_(stats[ANCHOR][some, None]).add_(share[some, None]).exp_()
            self.put_targets(p, targets[some], logprob[some].expm1())
            if slope is not None:
                p.mul_(slope)
        row_scale = torch.ones_like(logprob)
        self._mark(row_scale, targets)
        return tile, row_scale

    def _products(self, hidden: Tensor, index: Tensor) -> Tensor:
        return super()._products(hidden, index) if self._columns else self.empty_tile(len(hidden))

    def _sums(
        self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...], *, slope: bool
    ) -> tuple[Tensor, Stats]:
        """A tile of E with 0 for the targets, and what `merge` takes of each token; with `slope`,
        that of a soft cap is in the tile, and in "slope" that of the target's logit.
        """
        tile = self._products(hidden, self._index(targets))
        names = ["peak", "rest", "target", "slope"]
        names += ["mass", "moment"] if "entropy" in outputs else []
        names += ["square"] if "log_sum_sq_prob" in outputs else []
        names += ["mean"] if "mean_logit" in outputs else []
        sums = {name: hidden.new_zeros(targets.shape, dtype=self._dtype) for name in names}
        sums["slope"].fill_(1)
        if not self._columns:
            sums["peak"].fill_(torch.finfo(self._dtype).min)
            return tile, sums
        for some in self._blocks(tile):
            part = {name: value[some] for name, value in sums.items()}
            self._sum_block(tile[some], targets[some], part, slope)
        return tile, sums

    def _sum_block(self, z: Tensor, targets: Tensor, sums: Stats, keep_slope: bool) -> None:
        slope = self._finish_logits(z, slope=keep_slope)
        index, owned = self._index(targets), self._owned(targets)
        if slope is not None:
            sums["slope"].copy_(slope.gather(1, index).squeeze(1))
        target = z.gather(1, index).squeeze(1)
        torch.where(owned, target, sums["target"], out=sums["target"])
        # Columns may all be −∞, where a vocabulary is padded.
        peak = z.amax(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
        sums["peak"].copy_(peak.squeeze(1))
        z.sub_(peak)
        if "mean" in sums:
            torch.add(z.mean(1), peak.squeeze(1), out=sums["mean"])
        apart = APART & _needed_by(sums)
        e = z.exp() if apart else z.exp_()
        if "moment" in sums:  # where a logit is −∞, 0·log 0 = 0
            torch.sum(e, 1, out=sums["mass"])
            sums["moment"].copy_(torch.linalg.vecdot(e, z.clamp_(min=-FAR)))
        if "square" in sums:
            sums["square"].copy_(torch.linalg.vecdot(e, e))
        self.put_targets(e, targets, torch.zeros_like(target))
        torch.sum(e, 1, out=sums["rest"])
        if slope is not None:
            torch.mul(e, slope, out=z)
        elif apart:
            z.copy_(e)

    def _merge(
        self, sums: Stats, targets: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Stats, Tensor, Tensor]:
        """`merge`, with what is ignored marked."""
        sums["highest"] = self._exchange.highest(sums["peak"].clone())
        stats, rest, row_scale = merge(sums, self._exchange, self._columns / self.vocab, outputs)
        return self._marked(stats, targets), rest, row_scale

    def _owned(self, targets: Tensor) -> Tensor:
        """Whether this rank holds the target (t,)."""
        return (targets >= self._start) & (targets < self._start + self._columns)

    def _index(self, targets: Tensor) -> Tensor:
        """Where every target is among this rank's columns (t, 1), anywhere for others."""
        return (targets - self._start).clamp_(0, max(0, self._columns - 1)).unsqueeze(1)

    def put_targets(self, tile: Tensor, targets: Tensor, values: Tensor) -> None:
        """Put values (t,) into the targets' columns of a tile, where this rank has them."""
        if self._columns:
            index, owned = self._index(targets), self._owned(targets).unsqueeze(1)
            before = tile.gather(1, index)
            tile.scatter_(1, index, torch.where(owned, values.unsqueeze(1), before))


def _needed_by(sums: Stats) -> set[str]:
    names = {"moment": "entropy", "square": "log_sum_sq_prob"}
    return {output for name, output in names.items() if name in sums}
