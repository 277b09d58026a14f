"""Tiles in plain PyTorch, for the CPU and every other device.

A tile is fp32 (fp64 for fp64) whatever dtype the head computes in: hidden states and weight are
rounded to that, and everything after their product is as exact as the tile, because a
log-probability is a difference of numbers that bf16 rounds by half a nat. After the product, a tile
is worked on a few rows at a time, so that on a CPU all element-wise passes run in the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .head import OUTPUTS, Head, Layout, Stats, Tiles, WorkspaceBytes
from .kept import give_up
from .products import mm, widens

MAX_TILE_ROWS = 2048
_TARGET_ROWS = 64
TILE_SHARE = 0.98
FAR = 1e4  # nats beyond which exp is 0 in any dtype
_CACHE_BLOCK_BYTES = 3 << 20
_DEVICE_BLOCK_BYTES = 64 << 20
APART = {"entropy", "log_sum_sq_prob"}
"""Outputs that need the exponentials and the logits of a block at once."""
_workspaces: dict[torch.dtype, Tensor] = {}


def release_workspace() -> None:
    """Free the tile that is kept between calls on the CPU (a fresh one costs more in page faults
    than its product does).
    """
    give_up(torch.device("cpu"))
    _workspaces.clear()


def _kept_workspace(size: int, dtype: torch.dtype) -> Tensor:
    buffer = _workspaces.get(dtype)
    if buffer is None or buffer.numel() < size:
        _workspaces.pop(dtype, None)
        buffer = _workspaces[dtype] = torch.empty(size, dtype=dtype)
    return buffer[:size]


class TorchLayout(Layout):
    """`Layout` in plain PyTorch."""

    @property
    def tile_dtype(self) -> torch.dtype:
        """The dtype of a tile and of everything after it."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def native(self) -> bool:
        """Whether operands stay in `dtype`: a GPU multiplies bf16 and accumulates in fp32;
        elsewhere they are widened once.
        """
        return self.device == "cuda" and self.dtype == torch.bfloat16

    @property
    def rows(self) -> int:
        """On a CPU a tile and the blocks beside it stay within `workspace_mib` MiB."""
        budget = int((self.workspace_mib << 20) * TILE_SHARE)
        return max(1, min(MAX_TILE_ROWS, budget // self._row_bytes))

    @property
    def block_rows(self) -> int:
        """How many tokens of a tile are worked on at a time."""
        limit = _CACHE_BLOCK_BYTES if self.device == "cpu" else _DEVICE_BLOCK_BYTES
        return max(1, limit // self._row_bytes)

    def bytes(self, tokens: int, softcap: bool) -> WorkspaceBytes:
        rows = min(tokens, self.rows)
        states = rows * self.width * self.tile_dtype.itemsize
        # The slope of a soft cap; the exponentials and their products with something else.
        copies = int(softcap) + (2 if APART & set(self.outputs) else 0)
        blocks = copies * min(rows, self.block_rows) * self._row_bytes
        targets = 3 * min(rows, _TARGET_ROWS) * self.width * torch.float64.itemsize
        rounded = self.tile_dtype != self.dtype
        projected = targets + (states if rounded and not self.native else 0)
        # A product with the tile, and once more where it is rounded.
        product = states * (2 if rounded else 1)
        if self.native and widens(self.device, self.dtype):
            product += self.vocab * self.width * self.tile_dtype.itemsize  # the weight
        elif self.native:
            product += rows * self.vocab * self.dtype.itemsize
        return WorkspaceBytes(rows * self._row_bytes, max(blocks, projected, product))

    @property
    def _row_bytes(self) -> int:
        return self.vocab * self.tile_dtype.itemsize


class TorchTiles(Tiles):
    """`Tiles` in plain PyTorch; `head` is in the dtype that the head computes in."""

    def __init__(self, head: Head, workspace_mib: int, outputs: tuple[str, ...] = OUTPUTS) -> None:
        weight = head.weight
        vocab, width = weight.shape
        sizes = (vocab, width, weight.dtype, weight.device.type)
        self._lay_out(head, TorchLayout(*sizes, workspace_mib, outputs))

    def _lay_out(self, head: Head, layout: TorchLayout) -> None:
        self._operands, self._dtype = layout.dtype, layout.tile_dtype
        self.head = head.cast(layout.dtype if layout.native else self._dtype)
        self.vocab = layout.vocab
        self.rows, self.block_rows = layout.rows, layout.block_rows
        self._buffer: Tensor | None = None

    def empty_tile(self, tokens: int) -> Tensor:
        weight = self.head.weight
        give_up(weight.device)
        shape = tokens, weight.shape[0]
        size = shape[0] * shape[1]
        if weight.device.type == "cpu":
            return _kept_workspace(size, self._dtype).view(shape)
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None
            self._buffer = weight.new_empty(size, dtype=self._dtype)
        return self._buffer[:size].view(shape)

    def score(self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Stats:
        stats = self._empty_stats(targets, outputs)
        for start in range(0, targets.shape[0], self.rows):
            some = slice(start, start + self.rows)
            part = {name: value[some] for name, value in stats.items()}
            self._reduce(hidden[some], targets[some], part, None)
        return self._marked(stats, targets)

    def exponentials(
        self, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Stats]:
        stats = self._empty_stats(targets, outputs)
        row_scale = hidden.new_empty(targets.shape, dtype=self._dtype)
        tile = self._reduce(hidden, targets, stats, row_scale)
        self._mark(row_scale, targets)
        return tile, row_scale, self._marked(stats, targets)

    def probabilities(self, hidden: Tensor, targets: Tensor, stats: Stats) -> tuple[Tensor, Tensor]:
        logprob = stats["logprob"].masked_fill(targets < 0, -torch.inf).unsqueeze(1)
        index = self._index(targets)
        tile = self._products(hidden, index)
        for some in self._blocks(tile):
            self._normalise_block(tile[some], index[some], logprob[some])
        row_scale = torch.ones_like(stats["logprob"])
        self._mark(row_scale, targets)
        return tile, row_scale

    def _empty_stats(self, targets: Tensor, outputs: tuple[str, ...]) -> Stats:
        names = dict.fromkeys(("logprob", "lse", *outputs))
        dtypes = {name: torch.bool if name == "is_top1" else self._dtype for name in names}
        return {name: targets.new_empty(targets.shape, dtype=d) for name, d in dtypes.items()}

    def _products(self, hidden: Tensor, index: Tensor) -> Tensor:
        """x·Wᵀ in the workspace, (t, V), and x·W[y] from a sum in fp64: errors of the other entries
        average out in the log-sum-exp, the target's goes into the log-probability as it is.
        """
        weight = self.head.weight
        tile = self.empty_tile(hidden.shape[0])
        x = hidden.to(weight.dtype)
        mm(x, weight.T, self._dtype, operands=self._operands, out=tile)
        for start in range(0, tile.shape[0], _TARGET_ROWS):
            some = slice(start, start + _TARGET_ROWS)
            rows = weight[index[some, 0]].double()
            exact = torch.linalg.vecdot(x[some].double(), rows).to(tile.dtype)
            tile[some].scatter_(1, index[some], exact.unsqueeze(1))
        return tile

    def _blocks(self, tile: Tensor) -> Iterator[slice]:
        for start in range(0, tile.shape[0], self.block_rows):
            yield slice(start, start + self.block_rows)

    def _reduce(
        self, hidden: Tensor, targets: Tensor, stats: Stats, row_scale: Tensor | None
    ) -> Tensor:
        """Fill `stats`; with `row_scale`, fill it too and leave E in the tile."""
        index = self._index(targets)
        tile = self._products(hidden, index)
        for some in self._blocks(tile):
            part = {name: value[some] for name, value in stats.items()}
            scale = None if row_scale is None else row_scale[some]
            self._reduce_block(tile[some], index[some], part, scale)
        return tile

    def _reduce_block(
        self, z: Tensor, target: Tensor, stats: Stats, row_scale: Tensor | None
    ) -> None:
        slope = self._finish_logits(z, slope=row_scale is not None)
        peak = z.amax(-1, keepdim=True)
        target_logit = z.sub_(peak).gather(1, target)
        if "is_top1" in stats:
            torch.ge(target_logit.squeeze(1), 0, out=stats["is_top1"])
        if "mean_logit" in stats:
            torch.add(z.mean(-1), peak.squeeze(1), out=stats["mean_logit"])
        apart = APART & stats.keys()
        e = z.exp() if apart else z.exp_()
        moment = None
        if "entropy" in stats:  # where a logit is −∞, 0·log 0 = 0
            moment = torch.linalg.vecdot(e, z.clamp_(min=-FAR))
        square = torch.linalg.vecdot(e, e) if "log_sum_sq_prob" in stats else None
        # torch.sum adds in a cascade; log_softmax adds one after the other and drifts by 1e-5.
        rest = e.scatter_(1, target, 0.0).sum(-1, keepdim=True)
        total = rest + target_logit.exp()
        log_total = total.log()
        # As p → 1, log p is minus the sum of the other entries, which 1 + that sum would round off.
        logprob = torch.where(target_logit == 0, -rest.log1p(), target_logit - log_total)
        stats["logprob"].copy_(logprob.squeeze(1))
        torch.add(log_total, peak, out=stats["lse"].unsqueeze(1))
        if moment is not None:
            torch.sub(log_total.squeeze(1), moment / total.squeeze(1), out=stats["entropy"])
        if square is not None:
            torch.sub(square.log(), 2 * log_total.squeeze(1), out=stats["log_sum_sq_prob"])
        if row_scale is not None:
            torch.reciprocal(total.squeeze(1), out=row_scale)
            e.scatter_(1, target, -rest)
            if slope is not None:
                torch.mul(e, slope, out=z)
            elif apart:
                z.copy_(e)

    def _normalise_block(self, z: Tensor, target: Tensor, logprob: Tensor) -> None:
        slope = self._finish_logits(z, slope=True)
        # log p = (z − z_y) + log p_y: lse is too coarse a number where logits are large.
        p = z.sub_(z.gather(1, target)).add_(logprob).exp_()
        p.scatter_(1, target, logprob.expm1())
        if slope is not None:
            p.mul_(slope)

    def _finish_logits(self, z: Tensor, *, slope: bool) -> Tensor | None:
        """From x·Wᵀ to logits, in place; with `slope`, the soft cap's derivative."""
        head, factor = self.head, None
        if head.bias is not None:
            z.add_(head.bias)
        if head.logit_scale != 1.0:
            z.mul_(head.logit_scale)
        if head.softcap is not None:
            z.div_(head.softcap).tanh_()
            factor = z.square().neg_().add_(1) if slope else None
            z.mul_(head.softcap)
        if head.temperature != 1.0:
            z.div_(head.temperature)
        return factor

    def _index(self, targets: Tensor) -> Tensor:
        """Where every target is in the vocabulary (t, 1), anywhere for those that are not."""
        return targets.clamp(0, self.vocab - 1).unsqueeze(1)

    def _mark(self, values: Tensor, targets: Tensor) -> None:
        """Make values (t,) 0 where a token is ignored and NaN where its target does not exist."""
        values.masked_fill_(targets < 0, 0)
        values.masked_fill_(targets >= self.vocab, torch.nan)

    def _marked(self, stats: Stats, targets: Tensor) -> Stats:
        self._mark(stats["logprob"], targets)
        ignored = targets < 0
        return {name: value.masked_fill_(ignored, 0) for name, value in stats.items()}
