"""The gradients of ranks that each hold the whole model, added up once a step."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 64 << 20
"""How much is sent at a time: the next bucket is filled meanwhile."""


@torch.no_grad()
def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Make each gradient its sum over all ranks, bit for bit the same on each of them.

    Sums are taken in fp32, or in fp64 for fp64. A rank whose rows left no gradient counts as zero.
    """
    sent = []
    for bucket in _buckets(parameters):
        wide = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = torch.cat([_gradient(p).reshape(-1).to(wide) for p in bucket])
        sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if len(sent) > 1:
            _receive(*sent.pop(0))
    for one in sent:
        _receive(*one)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _receive(bucket: Sequence[Tensor], flat: Tensor, work: dist.Work) -> None:
    work.wait()
    parts = flat.split([p.numel() for p in bucket])
    for parameter, total in zip(bucket, parts, strict=True):
        _gradient(parameter).copy_(total.view(parameter.shape))


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype, in their order, up to `BUCKET_BYTES` of fp32 together."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        size = 4 * sum(p.numel() for p in bucket)
        if bucket and (size > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
