"""The comparisons of one call and what they ask of the head: a coefficient for every token.

A loss sees a handful of log-probabilities, so its gradient is autograd's on those few numbers; the
head only has to know `∂loss/∂logp_t`, which is the same for all tokens of a response. Sums over a
response and the loss are fp64: a response of some thousand nats has no more than four digits behind
the point in fp32, and the loss is made of differences of such sums.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .arguments import indices
from .losses import Comparisons, Loss

Selection = slice | Tensor
"""Some of the comparisons: a range, or indices (n,) int64."""


@dataclass(frozen=True)
class Problem:
    """Everything of `linear_dpo_loss` that is not the head or the hidden states."""

    targets: Tensor  # (T,) int64, negative where ignored
    response_ids: Tensor  # (T,) int64 in [0, R)
    comparisons: Tensor  # (C, 2) int64 of (winner, loser)
    ref_logps: Tensor  # (R,) fp64
    response_lengths: Tensor  # (R,) fp64
    weights: Tensor  # (C,) fp64
    loss: Loss

    @staticmethod
    def build(
        targets: Tensor,
        response_ids: Tensor,
        comparisons: Tensor,
        ref_logps: Tensor,
        weights: Tensor | None,
        response_lengths: Tensor | None,
        loss: Loss,
    ) -> "Problem":
        """With the default weights, 1/C each, and lengths, counted from `targets`.

        Raises:
            ValueError: `response_ids` or `comparisons` on the host that name no response.
        """
        response_ids, comparisons = (
            _responses(name, values, ref_logps.shape[0])
            for name, values in (("response_ids", response_ids), ("comparisons", comparisons))
        )
        ref = ref_logps.to(targets.device, torch.float64)
        if weights is None:
            count = comparisons.shape[0]
            weights = ref.new_full((count,), 1.0 / max(1, count))
        if response_lengths is None:
            scored = (targets >= 0).double()
            response_lengths = torch.zeros_like(ref).index_add_(
                0, response_ids.to(ref.device), scored
            )
        return Problem(
            targets,
            response_ids,
            comparisons,
            ref,
            response_lengths.to(ref),
            weights.to(ref),
            loss,
        )

    def to(self, device: torch.device) -> "Problem":
        """The same with the two index tensors, which may lie on the host, on `device`."""
        return replace(
            self,
            response_ids=self.response_ids.to(device, non_blocking=True),
            comparisons=self.comparisons.to(device, non_blocking=True),
        )

    def total(self, logps: Tensor, selected: Selection) -> Tensor:
        """Σ weight·loss over the comparisons `selected`, given the responses' logps (R,)."""
        win, lose = self.comparisons[selected].unbind(1)
        ref, length = self.ref_logps, self.response_lengths
        pairs = Comparisons(logps[win], logps[lose], ref[win], ref[lose], length[win], length[lose])
        return (self.weights[selected] * self.loss(pairs)).sum()

    def loss_and_coefficients(
        self,
        tokens: slice,
        token_logps: Tensor,
        logps: Tensor,
        selected: Selection,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`Tiles.loss_and_coefficients` in plain PyTorch, on any device, deterministic."""
        ids = self.response_ids[tokens]
        if logps.is_cuda:  # sorts, where index_add_ would use atomics
            logps.index_put_((ids,), token_logps.double(), accumulate=True)
        else:
            logps.index_add_(0, ids, token_logps.double())
        if not differentiate:
            return self.total(logps, selected), None
        with _autograd_inside_an_op():
            leaf = logps.detach().requires_grad_()
            loss = self.total(leaf, selected)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient.to(token_logps.dtype)[ids]


def _responses(name: str, values: Tensor, count: int) -> Tensor:
    return indices(name, values, count, f"the {count} responses of ref_logps")


@contextmanager
def _autograd_inside_an_op() -> Iterator[None]:
    """Record operations although the body of a custom operator runs below autograd."""
    keys = torch._C.DispatchKey
    with ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def whole_comparisons(problem: Problem, rows: int) -> Iterator[tuple[slice, Selection]]:
    """Cut the tokens where no response or comparison is cut, into pieces of at most `rows` tokens
    where possible.

    Yields the token slice and the comparisons inside it; together they cover everything once. Works
    on the host: nothing waits for a device if `response_ids` and `comparisons` lie there.
    """
    tokens, responses = problem.targets.shape[0], problem.ref_logps.shape[0]
    ids = _responses("response_ids", problem.response_ids.cpu(), responses)
    pairs = _responses("comparisons", problem.comparisons.cpu(), responses)
    position = torch.arange(tokens)
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
            yield slice(start, here), _range_or_indices(inside, problem.targets.device)
            start = here
    if tokens == 0:
        yield slice(0, 0), slice(None)


def _range_or_indices(inside: Tensor, device: torch.device) -> Selection:
    indices = inside.nonzero().squeeze(1)
    count = indices.shape[0]
    if count == 0:
        return slice(0, 0)
    start = int(indices[0])
    if int(indices[-1]) - start + 1 == count:
        return slice(start, start + count)
    return indices.to(device)
