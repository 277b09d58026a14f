"""The portable head: the log-probability of given tokens, and DPO's gradient, a few thousand tokens
at a time.

For every scored token t with hidden state x_t and target y_t, `z_t = scale·(x_t·Wᵀ + b)` and
`logp_t = z_t,y − log Σ_v exp z_tv`. The gradient of `c_t·logp_t` with respect to the logits is
`c_t·(onehot(y_t) − softmax(z_t))`: one scalar per token times something the forward knows already.
Hence:

- no gradient: one product (2TVH operations), tile by tile;
- frozen head: `(onehot − softmax)·W` is formed in the forward and scaled by whatever c_t arrives
later (4TVH);
- comparisons that are whole inside a tile: c_t follows at once, so both gradients are formed from
the tile while it
  exists (6TVH); a comparison larger than the workspace is projected twice (8TVH);
- any other gradient: the backward projects again (8TVH).

A tile never holds more than `workspace_mib`. Tiles are fp32 (fp64 for fp64 inputs) whatever the
inputs are, because a log-probability is a difference of numbers that bf16 rounds by half a nat. The
sum over a response
and the loss are fp64: a response of some thousand nats has no more than four digits behind the
point in fp32, and the loss is made of differences of such sums.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .losses import Comparisons

OUTPUTS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob", "lse")
WORKSPACE_MIB = 512
_MAX_TILE_ROWS = 2048
_CACHE_BLOCK_BYTES = 3 << 20
_workspaces: dict[tuple[torch.device, torch.dtype], Tensor] = {}


@dataclass(frozen=True)
class Head:
    """A projection to the vocabulary: z = cap·tanh(scale·(x·Wᵀ + b)/cap) / temperature."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    def compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """fp64 if any input is, else fp32."""
        double = torch.float64 in (hidden.dtype, self.weight.dtype)
        return torch.float64 if double else torch.float32

    @property
    def gradient_scale(self) -> float:
        """d z / d (x·Wᵀ + b) without the soft cap's own factor."""
        return self.logit_scale / self.temperature

    def cast(self, dtype: torch.dtype) -> "Head":
        """The same head with weight and bias detached and in `dtype`."""
        weight = self.weight.detach().to(dtype)
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return Head(weight, bias, self.softcap, self.logit_scale, self.temperature)


def release_workspace() -> None:
    """Free the tile that is kept between calls (a fresh one costs more in page faults than its
    product does).
    """
    _workspaces.clear()


def _workspace(rows: int, columns: int, like: Tensor) -> Tensor:
    key = (like.device, like.dtype)
    buffer = _workspaces.get(key)
    if buffer is None or buffer.numel() < rows * columns:
        _workspaces.pop(key, None)
        buffer = _workspaces[key] = torch.empty(
            rows * columns, dtype=like.dtype, device=like.device
        )
    return buffer[: rows * columns].view(rows, columns)


def tile_rows(head: Head, workspace_mib: int) -> int:
    """How many tokens a tile of at most `workspace_mib` MiB holds."""
    row_bytes = head.weight.shape[0] * head.weight.element_size()
    return max(1, min(_MAX_TILE_ROWS, (workspace_mib << 20) // row_bytes))


def _project(
    head: Head, hidden: Tensor, targets: Tensor, tile: Tensor, outputs: tuple[str, ...], probs: bool
) -> dict[str, Tensor]:
    """Fill `tile` (t, V) with logits, reduce them to per-token statistics, leave softmax·(soft cap
    factor) if `probs`.

    After the product, the rows are worked on a few at a time so that all element-wise passes run in
    the cache.
    """
    torch.mm(hidden, head.weight.T, out=tile)
    t, vocab = tile.shape
    stats = {
        name: hidden.new_empty(t, dtype=torch.bool if name == "is_top1" else None)
        for name in ("logprob", *outputs)
    }
    rows = max(1, _CACHE_BLOCK_BYTES // (vocab * tile.element_size()))
    for start in range(0, t, rows):
        block = slice(start, min(start + rows, t))
        part = {name: value[block] for name, value in stats.items()}
        _reduce_block(head, tile[block], targets[block].unsqueeze(1), part, probs)
    return stats


def _reduce_block(
    head: Head, z: Tensor, target: Tensor, stats: dict[str, Tensor], probs: bool
) -> None:
    if head.bias is not None:
        z.add_(head.bias)
    if head.logit_scale != 1.0:
        z.mul_(head.logit_scale)
    slope = None
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = 1 - z * z if probs else None
        z.mul_(head.softcap)
    if head.temperature != 1.0:
        z.div_(head.temperature)
    peak = z.amax(-1, keepdim=True)
    z.sub_(peak)
    target_logit = z.gather(1, target).squeeze(1)
    if "is_top1" in stats:
        torch.ge(target_logit, 0, out=stats["is_top1"])
    if "mean_logit" in stats:
        torch.add(z.mean(-1), peak.squeeze(1), out=stats["mean_logit"])
    apart = {"entropy", "log_sum_sq_prob"} & stats.keys()
    e = z.exp() if apart else z.exp_()
    # torch.sum adds in a cascade; log_softmax adds one after the other and drifts by 1e-5.
    total = e.sum(-1)
    log_total = total.log()
    torch.sub(target_logit, log_total, out=stats["logprob"])
    if "lse" in stats:
        torch.add(log_total, peak.squeeze(1), out=stats["lse"])
    if "entropy" in stats:
        torch.sub(log_total, torch.linalg.vecdot(e, z) / total, out=stats["entropy"])
    if "log_sum_sq_prob" in stats:
        torch.sub(torch.linalg.vecdot(e, e).log(), 2 * log_total, out=stats["log_sum_sq_prob"])
    if probs:
        torch.div(e, total.unsqueeze(1), out=z)
        z.scatter_add_(1, target, z.new_full(target.shape, -1.0))
        if slope is not None:
            z.mul_(slope)


class _Gradients:
    """Accumulates the gradients of `Σ c_t·logp_t` from tiles of `softmax − onehot`, coefficients
    kept off the tile.
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool], hidden: Tensor) -> None:
        self.head = head
        self.hidden = torch.zeros_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(head.weight) if needs[1] else None
        bias = head.bias if needs[2] else None
        self.bias = None if bias is None else torch.zeros_like(bias)

    def add(self, rows: slice, tile: Tensor, hidden: Tensor, coefficients: Tensor) -> None:
        """Add the contribution of `rows`: tile (t, V) = softmax − onehot, hidden (t, H),
        coefficients (t,).
        """
        scaled = (coefficients * -self.head.gradient_scale).unsqueeze(1)
        if self.hidden is not None:
            torch.mm(tile, self.head.weight, out=self.hidden[rows]).mul_(scaled)
        if self.weight is not None:
            self.weight.addmm_(tile.T, hidden * scaled)
        if self.bias is not None:
            self.bias.addmv_(tile.T, scaled.squeeze(1))


def _tiles(start: int, stop: int, rows: int) -> Iterator[slice]:
    for first in range(start, stop, rows):
        yield slice(first, min(first + rows, stop))


class LinearLogprob(torch.autograd.Function):
    """Per-token log-probabilities, differentiable with any per-token gradient; optional outputs
    carry none.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head, outputs, workspace_mib):
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[:3]
        head = head.cast(head.compute_dtype(hidden))
        x = hidden.detach().to(head.weight.dtype)
        frozen = needs[0] and not (needs[1] or needs[2])
        grads = _Gradients(head, (frozen, False, False), x)
        stats: dict[str, list[Tensor]] = {name: [] for name in ("logprob", *outputs)}
        rows = tile_rows(head, workspace_mib)
        for tile_slice in _tiles(0, x.shape[0], rows):
            size = tile_slice.stop - tile_slice.start
            tile = _workspace(size, weight.shape[0], x)
            part = _project(head, x[tile_slice], targets[tile_slice], tile, outputs, frozen)
            for name, value in part.items():
                stats[name].append(value)
            if frozen:
                grads.add(tile_slice, tile, x[tile_slice], x.new_ones(size))
        result = [torch.cat(v) if v else x.new_empty(0) for v in stats.values()]
        ctx.head, ctx.workspace_mib = head, workspace_mib
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        ctx.save_for_backward(grads.hidden if frozen else hidden.detach(), targets)
        ctx.frozen = frozen
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, *_):
        if grad_logprob is None:
            return (None,) * 7
        saved, targets = ctx.saved_tensors
        grad_logprob = grad_logprob.to(ctx.head.weight.dtype)
        if ctx.frozen:
            return ((saved * grad_logprob.unsqueeze(1)).to(ctx.hidden_dtype), *(None,) * 6)
        head, x = ctx.head, saved.to(ctx.head.weight.dtype)
        grads = _Gradients(head, ctx.needs_input_grad[:3], x)
        for tile_slice in _tiles(0, x.shape[0], tile_rows(head, ctx.workspace_mib)):
            tile = _workspace(tile_slice.stop - tile_slice.start, head.weight.shape[0], x)
            _project(head, x[tile_slice], targets[tile_slice], tile, (), True)
            grads.add(tile_slice, tile, x[tile_slice], grad_logprob[tile_slice])
        return (*_cast(grads, ctx.hidden_dtype, ctx.weight_dtype), *(None,) * 4)


def _cast(grads: _Gradients, hidden_dtype: torch.dtype, weight_dtype: torch.dtype):
    dtypes = (hidden_dtype, weight_dtype, weight_dtype)
    parts = (grads.hidden, grads.weight, grads.bias)
    return tuple(None if g is None else g.to(dtype) for g, dtype in zip(parts, dtypes, strict=True))


@dataclass(frozen=True)
class Problem:
    """The comparisons of one call: everything of `linear_dpo_loss` that is not the head or the
    hidden states.
    """

    targets: Tensor  # (T,) int64
    response_ids: Tensor  # (T,) int64 in [0, R)
    comparisons: Tensor  # (C, 2) int64 of (winner, loser)
    ref_logps: Tensor  # (R,) fp64
    response_lengths: Tensor  # (R,) fp64
    weights: Tensor  # (C,) fp64
    loss_function: Callable[[Comparisons], Tensor]

    def loss(self, logps: Tensor, chosen: slice | Tensor) -> Tensor:
        """Σ weight·loss over the comparisons `chosen`, given the log-probabilities (R,) of the
        responses.
        """
        win, lose = self.comparisons[chosen].unbind(1)
        ref, length = self.ref_logps, self.response_lengths
        pairs = Comparisons(logps[win], logps[lose], ref[win], ref[lose], length[win], length[lose])
        return (self.weights[chosen] * self.loss_function(pairs)).sum()


def whole_comparisons(problem: Problem, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut the tokens where no response or comparison is cut, into pieces of at most `rows` tokens
    where possible.

    Yields the token slice and the indices of the comparisons inside it; together they cover
    everything once.
    """
    tokens, responses = problem.targets.shape[0], problem.ref_logps.shape[0]
    position = torch.arange(tokens)
    ids, pairs = problem.response_ids.cpu(), problem.comparisons.cpu()
    first = torch.full((responses,), tokens).scatter_reduce(0, ids, position, "amin")
    last = torch.full((responses,), -1).scatter_reduce(0, ids, position, "amax")
    begin = torch.cat([first, first[pairs].amin(1)])
    end = torch.cat([last, last[pairs].amax(1)])
    held = end >= begin
    crossed = torch.zeros(tokens + 2, dtype=torch.int64)
    crossed.index_add_(0, begin[held] + 1, torch.ones_like(begin[held]))
    crossed.index_add_(0, end[held] + 1, -torch.ones_like(end[held]))
    cuts = (crossed.cumsum(0)[: tokens + 1] == 0).nonzero().squeeze(1).tolist()
    pair_begin = first[pairs].amin(1).clamp(max=max(tokens - 1, 0))
    start = 0
    for here, following in zip(cuts, [*cuts[1:], None], strict=True):
        if here > start and (following is None or following - start > rows):
            inside = (pair_begin >= start) & (pair_begin < here)
            yield slice(start, here), inside.nonzero().squeeze(1).to(problem.comparisons.device)
            start = here
    if tokens == 0:
        yield slice(0, 0), torch.arange(pairs.shape[0], device=problem.comparisons.device)


class LinearDPOLoss(torch.autograd.Function):
    """Loss, response log-probabilities and both gradients in one pass over the head (6TVH)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, problem, outputs, workspace_mib):
        needs = ctx.needs_input_grad[:3]
        head = head.cast(head.compute_dtype(hidden))
        x = hidden.detach().to(head.weight.dtype)
        grads = _Gradients(head, needs, x)
        logps = x.new_zeros(problem.ref_logps.shape[0], dtype=torch.float64)
        stats = {name: x.new_zeros(x.shape[0], dtype=_dtype(name, x)) for name in outputs}
        loss = logps.new_zeros(())
        rows = tile_rows(head, workspace_mib)
        for piece, chosen in whole_comparisons(problem, rows):
            loss += _piece(head, x, problem, piece, chosen, logps, stats, grads, rows, any(needs))
        ctx.grads = _cast(grads, hidden.dtype, weight.dtype)
        loss, logps = loss.to(x.dtype), logps.to(x.dtype)
        ctx.mark_non_differentiable(logps, *stats.values())
        return loss, logps, *stats.values()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("linear_dpo_loss: backward a second time; call the function again")
        grads, ctx.grads = ctx.grads, None
        if grad_loss.is_cuda or grad_loss.item() != 1.0:
            grads = tuple(None if g is None else g.mul_(grad_loss) for g in grads)
        return (*grads, None, None, None, None)


def _dtype(name: str, like: Tensor) -> torch.dtype:
    return torch.bool if name == "is_top1" else like.dtype


def _piece(head, x, problem, piece, chosen, logps, stats, grads, rows, differentiate) -> Tensor:
    """One token slice that holds whole comparisons: fills `logps` and `stats`, adds to `grads`,
    returns its loss.
    """
    tiles = list(_tiles(piece.start, piece.stop, rows))
    single = len(tiles) == 1
    for part in tiles:
        tile = _workspace(part.stop - part.start, head.weight.shape[0], x)
        keep = differentiate and single
        result = _project(head, x[part], problem.targets[part], tile, tuple(stats), keep)
        logps.index_add_(0, problem.response_ids[part], result.pop("logprob").double())
        for name, value in result.items():
            stats[name][part] = value
    if not differentiate:
        return problem.loss(logps, chosen)
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        loss = problem.loss(leaf, chosen)
        gradient = torch.autograd.grad(loss, leaf)[0].to(x.dtype)
    for part in tiles:
        tile = _workspace(part.stop - part.start, head.weight.shape[0], x)
        if not single:
            _project(head, x[part], problem.targets[part], tile, (), True)
        grads.add(part, tile, x[part], gradient[problem.response_ids[part]])
    return loss.detach()
