"""Which keys each query of a packed row may see, and the gather that lays those keys out.

A row is one token stream `[p0 r00 r01 | p1 r10 r11 | …]`. Every token is a query exactly once, in
place; the keys and values of a shared prompt are needed once per response. So the stream is cut
into segments whose keys are `stream[prefix] ++ stream[queries]`, a contiguous `[prompt, response]`
as if the response had been run alone, which is why sliding windows, soft caps and sinks stay
exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

Bound = tuple[int, int, int, int]


@dataclass(eq=False)
class Segments:
    """The attention pattern of a packed row: S tokens, N segments, T gathered keys.

    Segment `(q_start, q_end, prefix_start, prefix_end)`: the queries are `stream[q_start:q_end]`,
    the keys and values `stream[prefix_start:prefix_end] ++ stream[q_start:q_end]`, causal and
    aligned bottom-right. Two prefixes are equal or disjoint. Build it with `Segments.build`; pass
    it to the model's forward as `fastdpo_segments=`.

    Tensors are made once per row, masks once per row and shape; nothing is made per layer.
    Nothing changes a field, but the class is not frozen: torch 2.11 would compile a layer anew for
    each number of segments.
    """

    bounds: tuple[Bound, ...]
    """N segments in stream order, tiling the stream. `prefix_start == prefix_end`: no prefix."""
    cu_seqlens_q: torch.Tensor
    """int32 (N + 1,): cumulative query lengths."""
    cu_seqlens_k: torch.Tensor
    """int32 (N + 1,): cumulative key lengths, prefixes included."""
    kv_index: torch.Tensor | None
    """int64 (T,): the stream position of every gathered key; None where no segment has a prefix."""
    own_index: torch.Tensor | None
    """int64 (S,): where each stream token lies among the gathered keys, in its own segment; None
    in a `stretch`, which does not have them all.
    """
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """int64 `(stream positions, gathered positions)` of prompts, one pair per further response; in
    a `stretch` the segments' own ones before them.

    Positions are unique within a pair, so that adding gradients up is deterministic.
    """
    max_seqlen_q: int
    max_seqlen_k: int
    trace: list[dict[str, Any]] | None = None
    """Where the attention function notes its calls, for the start-up check; None in training."""
    opens: int = 0
    """Where the first segment's own keys begin: with its queries, but in a `stretch`."""
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Masks by (queries, keys, window, device), this row's tensors on other devices, and what
    `filled` and `stretch` made of it.
    """

    @property
    def length(self) -> int:
        """S, the number of tokens of the row; of a `stretch`, up to its end."""
        return self.bounds[-1][1]

    @property
    def query_lengths(self) -> list[int]:
        """Number of queries of each segment."""
        return [end - start for start, end, _, _ in self.bounds]

    @property
    def key_lengths(self) -> list[int]:
        """Number of keys of each segment, its prefix included."""
        lengths = [end - start + stop - first for start, end, first, stop in self.bounds]
        lengths[0] += self.bounds[0][0] - self.opens
        return lengths

    @classmethod
    def build(
        cls,
        bounds: Sequence[Bound],
        device: torch.device | str = "cpu",
        *,
        trace: list[dict[str, Any]] | None = None,
    ) -> Segments:
        """The segments of a row, with their index tensors on `device`.

        Raises ValueError if the segments do not tile the stream or a prefix is not before its
        segment.
        """
        checked = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in bounds)
        _validate(checked)
        segments = cls(checked, **_index_tensors(checked), trace=trace)
        return segments.to(device)

    def filled(self, length: int) -> Segments:
        """These segments and one more, of what `length` tokens have beyond the row; made once."""
        if length == self.length:
            return self
        if ("filled", length) not in self.cache:
            bounds = (*self.bounds, (self.length, length, self.length, self.length))
            made = Segments.build(bounds, self.cu_seqlens_q.device, trace=self.trace)
            self.cache["filled", length] = made
        return self.cache["filled", length]

    def stretch(self, start: int, end: int) -> Segments:
        """The queries `stream[start:end]` alone, with the keys that they see, to be gathered from
        the whole stream; made once.
        """
        if ("stretch", start, end) not in self.cache:
            inside = [b for b in self.bounds if b[0] < end and b[1] > start]
            opens = inside[0][0]
            bounds = tuple((max(start, a), min(end, b), c, d) for a, b, c, d in inside)
            tensors = _index_tensors(bounds, opens, whole=False)
            made = Segments(bounds, **tensors, trace=self.trace, opens=opens)
            self.cache["stretch", start, end] = made.to(self.cu_seqlens_q.device)
        return self.cache["stretch", start, end]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Segments:
        """These segments with their tensors on `device`; a copy is made once per device."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if self.cu_seqlens_q.device == device:
            return self
        if device not in self.cache:
            self.cache[device] = self._each(lambda t: t.to(device, non_blocking=non_blocking))
        return self.cache[device]

    def pin_memory(self) -> Segments:
        """These segments with their tensors in page-locked memory."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Segments:
        return Segments(
            self.bounds,
            function(self.cu_seqlens_q),
            function(self.cu_seqlens_k),
            None if self.kv_index is None else function(self.kv_index),
            None if self.own_index is None else function(self.own_index),
            tuple((function(stream), function(keys)) for stream, keys in self.copies),
            self.max_seqlen_q,
            self.max_seqlen_k,
            self.trace,
            self.opens,
        )

    def causal_mask(
        self, queries: int, keys: int, window: int | None, device: torch.device
    ) -> torch.Tensor:
        """Boolean (queries, keys), True where a query may look; aligned bottom-right."""
        name = (queries, keys, window, device)
        if name not in self.cache:
            distance = torch.arange(keys - queries, keys, device=device)[:, None]
            distance = distance - torch.arange(keys, device=device)
            seen = distance >= 0
            self.cache[name] = seen if window is None else seen & (distance < window)
        return self.cache[name]


def _validate(bounds: tuple[Bound, ...]) -> None:
    if not bounds:
        raise ValueError("segments: at least one is needed")
    position = 0
    for start, end, first, stop in bounds:
        if start != position or end <= start:
            raise ValueError(
                f"segments: expected a non-empty segment from {position}, got {start}:{end}"
            )
        if not 0 <= first <= stop or (stop > first and stop > start):
            raise ValueError(f"segments: prefix {first}:{stop} does not lie before {start}:{end}")
        position = end


def _index_tensors(
    bounds: tuple[Bound, ...], opens: int = 0, *, whole: bool = True
) -> dict[str, Any]:
    """The tensors of `Segments`; of the whole stream, or of a stretch of its queries."""
    begins = [opens, *(start for start, *_ in bounds[1:])]
    queries = torch.tensor([end - start for start, end, _, _ in bounds])
    keys = torch.tensor(
        [b[1] - begin + b[3] - b[2] for b, begin in zip(bounds, begins, strict=True)]
    )
    tensors: dict[str, Any] = {
        "cu_seqlens_q": F.pad(queries.cumsum(0), (1, 0)).to(torch.int32),
        "cu_seqlens_k": F.pad(keys.cumsum(0), (1, 0)).to(torch.int32),
        "max_seqlen_q": int(queries.max()),
        "max_seqlen_k": int(keys.max()),
    }
    if whole and torch.equal(queries, keys):
        return tensors | {"kv_index": None, "own_index": None, "copies": ()}
    offsets = tensors["cu_seqlens_k"].tolist()[:-1]
    kv_index, own, own_index = [], [], []
    rounds: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    uses: dict[tuple[int, int], int] = {}
    for (_, end, first, stop), begin, offset in zip(bounds, begins, offsets, strict=True):
        kv_index += [torch.arange(first, stop), torch.arange(begin, end)]
        own.append(torch.arange(begin, end))
        own_index.append(torch.arange(end - begin) + offset + stop - first)
        if stop > first:
            nth = uses.get((first, stop), 0)
            uses[first, stop] = nth + 1
            if nth == len(rounds):
                rounds.append(([], []))
            rounds[nth][0].append(torch.arange(first, stop))
            rounds[nth][1].append(torch.arange(stop - first) + offset)
    if not whole:
        rounds.insert(0, (own, own_index))
    copies = tuple((torch.cat(stream), torch.cat(gathered)) for stream, gathered in rounds)
    gather = {"kv_index": torch.cat(kv_index), "copies": copies}
    return tensors | gather | {"own_index": torch.cat(own_index) if whole else None}


class _Gather(torch.autograd.Function):
    """`x[kv_index]`, whose backward adds the copies of a prompt up in a fixed order.

    `index_select`'s own backward adds with atomics, in any order, on CUDA. Here the first copy is
    a plain read and each further response adds once per position. Nothing but the indices is kept
    for the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        assert segments.kv_index is not None
        ctx.segments, ctx.rows = segments, x.shape[0]
        return x.index_select(0, segments.kv_index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        segments: Segments = ctx.segments
        if segments.own_index is None:
            total = grad.new_zeros((ctx.rows, *grad.shape[1:]))
        else:
            total = grad.index_select(0, segments.own_index)
        for stream, gathered in segments.copies:
            total.index_add_(0, stream, grad.index_select(0, gathered))
        return total, None


def gather_keys(x: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Keys or values (S, H, D) of the stream → (T, H, D), `[prefix, own]` of every segment.

    Returns `x` itself where no segment has a prefix. The backward is deterministic, on CUDA too.
    """
    return x if segments.kv_index is None else _Gather.apply(x, segments)
