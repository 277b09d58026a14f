"""Heads whose rows are spread over ranks: problems that every rank makes alike, what a rank of a
group computes of them, and the same on one device.
"""

import math
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from fastdpo_kernels import vocab_parallel_logprob, vocab_parallel_loss
from fastdpo_kernels.products import bf16_is_faster
from fastdpo_kernels.sharded.tiles import ShardLayout, ShardTiles
from head_problems import differentiated, make, numbers, uneven
from loss_problems import LENGTHS, Task, make_task
from torch import Tensor

FAR_OUTPUTS = ("entropy", "lse", "is_top1")
_groups: dict[int, list[dist.ProcessGroup]] = {}


def in_one_group(packed: bytes) -> bytes:
    """Runs a function that gets the rank first; the group is made once, on the host: so Triton is
    to interpret there, which it reads when it is first imported.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    function, args, kwargs = pickle.loads(packed)
    return pickle.dumps(function(dist.get_rank(), *args, **kwargs))


def group_of(rank: int, size: int) -> tuple[dist.ProcessGroup, int]:
    """The group of `size` neighbours that a rank is in, and its rank there."""
    if size not in _groups:
        world = dist.get_world_size()
        starts = range(0, world, size)
        _groups[size] = [dist.new_group(list(range(s, s + size))) for s in starts]
    return _groups[size][rank // size], rank % size


@contextmanager
def small_tiles(rows: int | None, backend: str = "torch") -> Iterator[None]:
    """Tiles of few tokens, worked on three at a time, with NaN before they are written."""
    with ExitStack() as stack:
        for tiles, layout in _engines(backend):
            stack.enter_context(mock.patch.object(tiles, "empty_tile", _poisoned(tiles)))
            if rows is not None:
                stack.enter_context(mock.patch.object(layout, "rows", rows))
                stack.enter_context(mock.patch.object(layout, "block_rows", 3, create=True))
        yield


def _engines(backend: str) -> list[tuple[Any, Any]]:
    if backend != "triton":
        return [(ShardTiles, ShardLayout)]
    from fastdpo_kernels.triton.sharded import TritonShardLayout, TritonShardTiles

    return [(TritonShardTiles, TritonShardLayout)]


def _poisoned(tiles: Any) -> Any:
    original = tiles.empty_tile
    return lambda self, tokens: original(self, tokens).fill_(math.nan)


def shard(whole: Tensor, columns: Sequence[int], rank: int) -> Tensor:
    """The rows of a rank."""
    return whole.split(list(columns))[rank]


def logprob_problem(counts: Sequence[int], *, seed: int = 0, **sizes: Any) -> list[Any]:
    """Hidden states and targets of each rank, and the weight and bias that they share."""
    x, w, b, y = make(sum(counts), seed=seed, bias=True, **sizes)
    return [list(x.split(list(counts))), w, b, list(y.split(list(counts)))]


def logprobs(
    rank: int,
    counts: Sequence[int],
    columns: Sequence[int],
    train: tuple[bool, bool] = (True, True),
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    problem: list[Any] | None = None,
    sizes: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Everything that `vocab_parallel_logprob` gives a rank, for uneven coefficients."""
    group, own = group_of(rank, len(columns))
    x, w, b, y = problem or logprob_problem(counts, **sizes or {})
    leaves: dict[str, Tensor | None] = {
        "hidden": x[own].to(dtype, copy=True).requires_grad_(train[0]),
        "weight": shard(w, columns, own).to(dtype, copy=True).requires_grad_(train[1]),
        "bias": shard(b, columns, own).to(dtype, copy=True).requires_grad_(train[1])
        if bias
        else None,
    }
    with small_tiles(rows, options.get("backend", "torch")):
        out = vocab_parallel_logprob(targets=y[own], group=group, **leaves, **options)
        values = out._asdict() if options.get("outputs") else {"logprob": out}
        if any(train):
            c, d = (part.split(list(counts))[own] for part in uneven(sum(counts)))
            values |= differentiated(values, leaves, c, d)
    return numbers(values, leaves)


def tasks_of(
    kind: str, ranks: int, empty: Sequence[int], prompt: bool = False, **head: Any
) -> list[Task]:
    """One of each rank, with one head; those of the ranks `empty` have no tokens and no units."""
    tasks = [make_task(kind, prompt=prompt, seed=seed, **head) for seed in range(ranks)]
    shared = [replace(task, weight=tasks[0].weight, bias=tasks[0].bias) for task in tasks]
    return [_emptied(task) if rank in empty else task for rank, task in enumerate(shared)]


def _emptied(task: Task) -> Task:
    return replace(
        task,
        hidden=task.hidden[:0],
        targets=task.targets[:0],
        response_ids=task.response_ids[:0],
        units=task.units[:0],
        ref_token_logps=task.ref_token_logps[:0],
        unit_weights=task.unit_weights[:0],
        given={name: value[:0] for name, value in task.given.items()},
    )


def losses(
    rank: int,
    kind: str,
    columns: Sequence[int],
    train: tuple[bool, bool] = (True, True),
    *,
    empty: Sequence[int] = (),
    prompt: bool = False,
    head: dict[str, Any] | None = None,
    rows: int | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, Tensor]:
    """Everything that `vocab_parallel_loss` gives a rank, for three times the loss."""
    group, own = group_of(rank, len(columns))
    task = tasks_of(kind, len(columns), empty, prompt, **head or {})[own]
    leaves = {
        "hidden": task.hidden.to(dtype, copy=True).requires_grad_(train[0]),
        "weight": shard(task.weight, columns, own).to(dtype, copy=True).requires_grad_(train[1]),
        "bias": shard(task.bias, columns, own).to(dtype, copy=True).requires_grad_(train[1]),
    }
    with small_tiles(rows, options.get("backend", "torch")):
        result = vocab_parallel_loss(
            **leaves,
            targets=task.targets,
            response_ids=task.response_ids,
            units=task.units,
            unit_weights=task.unit_weights,
            ref_token_logps=task.ref_token_logps,
            response_lengths=torch.zeros(len(LENGTHS)) if own in empty else None,
            given=task.given,
            kind=kind,
            group=group,
            **task.head,
            **options,
        )
        if any(train):
            (3 * result.loss).backward()
    values = result._asdict()
    values |= values.pop("stats")._asdict()
    return numbers(values, leaves)


def squared_ratios(scored: Any) -> Tensor:
    """A loss of responses or groups of them."""
    if scored.members is None:
        return scored.logratios.square() / 9
    return scored.logratios.masked_fill(~scored.members, 0).square().sum(1) / 9


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Bytes that this rank hands to others or takes from them, the more of the two, of everything
    that is exchanged meanwhile; what stays on the rank does not count.
    """
    total = {"bytes": 0}

    def size(tensors: Sequence[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    def gathered(every: Tensor, mine: Tensor, **_: Any) -> int:
        return size([every]) - size([mine])

    def broadcast(part: Tensor, **_: Any) -> int:
        return size([part])

    def reduced(values: Tensor, **_: Any) -> int:
        return 2 * size([values])

    def sent(got: Tensor, given: Tensor, own: list[int], counts: list[int], **_: Any) -> int:
        return size([given[: sum(counts) - own[0]]])

    kinds = {
        "all_gather_single": gathered,
        "broadcast": broadcast,
        "all_reduce": reduced,
        "all_to_all_single": sent,
    }

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            total["bytes"] += kinds[name](*args, **kwargs)
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in kinds:
            stack.enter_context(mock.patch.object(dist, name, counting(name)))
        yield total


def costs(
    rank: int, case: str, columns: Sequence[int], width: int, dtype: torch.dtype, tokens: int
) -> tuple[int, float]:
    """Bytes exchanged, and operations for each token of all ranks and entry of this rank's shard,
    of `tokens` tokens a rank, forward and backward.
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings Triton, see in_one_group

    group, own = group_of(rank, len(columns))
    g = torch.Generator().manual_seed(own)
    x = torch.randn(tokens, width, generator=g).to(dtype).requires_grad_(case != "score")
    w = torch.randn(columns[own], width, generator=g).to(dtype)
    w.requires_grad_(case not in ("score", "frozen"))
    y = torch.randint(0, sum(columns), (tokens,), generator=g)
    bf16_is_faster()  # measures products of its own, once
    with counted_bytes() as total, FlopCounterMode(display=False) as flops:
        if case == "units":
            ids = torch.arange(tokens) * 4 // tokens
            pairs = torch.tensor([(0, 1), (2, 3)])
            ref = torch.zeros(4)
            vocab_parallel_loss(x, w, y, ids, pairs, ref, group=group).loss.backward()
        else:
            logprob = vocab_parallel_logprob(x, w, y, group=group)
            if logprob.requires_grad:
                logprob.sum().backward()
    each = tokens * len(columns) * columns[own] * width
    return total["bytes"], flops.get_total_flops() / max(1, each)


def refused(rank: int, case: str) -> str:
    """The error of a call that fits nothing, which every rank has to get."""
    group, own = group_of(rank, 4)
    x, w, y = torch.zeros(3, 6), torch.zeros(5, 6), torch.zeros(3, dtype=torch.int64)
    options: dict[str, Any] = {"group": group}
    if case == "start":
        options["vocab_start"] = 5 * own + (own == 2)
    elif case == "size":
        options["vocab_size"] = 21
    elif case == "options":
        options["softcap"] = 3.0 if own == 1 else 2.0
    elif case == "width":
        x, w = x[:, : 6 - own % 2], w[:, : 6 - own % 2]
    elif case == "dtype":
        x = x.bfloat16() if own == 3 else x
    elif case == "training":
        w.requires_grad_(own == 0)
    elif case == "targets":
        y = y + 20
    try:
        vocab_parallel_logprob(x, w, y, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def padded(rank: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the gradient of the weight where the last rows are no tokens."""
    group, own = group_of(rank, 4)
    x, w, _, y = make(9, vocab=95, seed=own, ignore=0.0)
    w = torch.cat([make(1, vocab=95)[1], torch.full((5, 24), 7.0)]).split(25)[own]
    leaf = w.clone().double().requires_grad_()
    options = {"vocab_start": 25 * own, "vocab_size": 95}
    logprob = vocab_parallel_logprob(x.view(3, 3, 24), leaf, y.view(3, 3), group=group, **options)
    logprob.sum().backward()
    assert leaf.grad is not None
    return logprob.detach().flatten(), leaf.grad


def far_apart(rank: int, dtype: torch.dtype, backend: str = "torch") -> dict[str, Tensor]:
    """Logits of hundreds of nats, targets in columns far below and far above the others, and one
    rank whose columns all are −∞.
    """
    group, own = group_of(rank, 4)
    x, w, b, y = far_problem()
    leaves = {
        "hidden": x.split(10)[own].to(dtype, copy=True).requires_grad_(),
        "weight": w.split(25)[own].to(dtype, copy=True).requires_grad_(),
        "bias": b.split(25)[own].to(dtype, copy=True).requires_grad_(),
    }
    options: dict[str, Any] = {"outputs": FAR_OUTPUTS, "group": group, "backend": backend}
    with small_tiles(None, backend):
        out = vocab_parallel_logprob(targets=y.split(10)[own], **leaves, **options)
        out.logprob.sum().backward()
        frozen = leaves | {"weight": leaves["weight"].detach(), "bias": leaves["bias"].detach()}
        again = vocab_parallel_logprob(targets=y.split(10)[own], **frozen, **options).logprob
        (gradient,) = torch.autograd.grad(again.sum(), leaves["hidden"])
    return numbers(out._asdict() | {"kept": gradient}, leaves)


def far_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """40 tokens, 100 columns, in fp64 that fp32 can hold."""
    x, w, _, y = make(40, vocab=100, seed=3, ignore=0.0)
    x, w = (x * 60).float().double(), w.float().double()
    b = torch.zeros(100, dtype=torch.float64)
    b[75:] = -math.inf
    logits = x @ w.T + b
    y[:10] = logits[:10, :75].argmin(1)
    y[10:30] = logits[10:30].argmax(1)
    y[30:] %= 75
    return x, w, b, y
