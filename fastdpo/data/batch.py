"""A packed row as tensors: what one forward pass reads and what the head scores.

Shared:  `[prompt r0 r1 … | prompt' r0' …]`, position ids restarting at the prompt's length for
every response.
Packed:  `[prompt r0 | prompt r1 | …]`, every response with its own copy of the prompt.
Padded:  one sequence a line, padded on the right, with an attention mask.
The same tokens are scored in all three, and in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .groups import Group
from .packing import Part
from .segments import Segments


@dataclass(frozen=True)
class Batch:
    """One forward pass: S (or B×L) tokens, T of them scored, R responses, C comparisons."""

    layout: str
    input_ids: Tensor  # (1, S) int64; padded: (B, L)
    position_ids: Tensor | None  # (1, S) int64; padded: None
    attention_mask: Tensor | None  # padded: (B, L) int64
    segments: Segments | None
    score_index: Tensor  # (T,) int64 into the flattened states; the last prompt token repeats
    targets: Tensor  # (T,) int64
    response_ids: Tensor  # (T,) int64 in [0, R)
    comparisons: Tensor  # (C, 2) int64, (winner, loser)
    weights: Tensor  # (C,) fp32, the comparisons' own weights
    ref_logps: Tensor | None  # (R,) fp64, nats
    response_lengths: Tensor  # (R,) fp32, completion tokens, also those that nothing precedes
    computed_tokens: int
    pair_tokens: int  # tokens that two sequences per comparison would hold, without padding
    host: "Batch | None" = None  # where it was made, for plans that must not wait for a device

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; `host` stays behind. From pinned memory nothing waits."""
        moved = self._each(lambda value: value.to(device, non_blocking=True))
        return replace(self, host=self.host or self, **moved)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which a device copies by itself."""
        return replace(self, **self._each(lambda value: value.pin_memory()))

    def _each(self, function: Callable[[Any], Any]) -> dict[str, Any]:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: function(v) for name, v in values if isinstance(v, Tensor | Segments)}

    def lengths(self) -> list[int]:
        """Padded layout: the length of every line without its padding."""
        assert self.attention_mask is not None
        return self.attention_mask.sum(1).tolist()


class _Stream:
    """Collects one row: tokens, positions, attention segments and the tokens to score."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.bounds: list[tuple[int, int, int, int]] = []
        self.score: list[np.ndarray] = []
        self.size = 0

    def append(self, ids: np.ndarray, position: int) -> int:
        """Add tokens whose first position is `position`; returns where they start in the stream."""
        start = self.size
        self.tokens.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.size += len(ids)
        return start

    def score_response(self, start: int, length: int, before: int | None) -> None:
        """Score a response at [start, start + length): its first token is predicted from `before`,
        if anything is.
        """
        if length == 0:
            return
        index = np.arange(start - 1, start + length - 1)
        if before is None:
            index = index[1:]
        else:
            index[0] = before
        self.score.append(index)


def make_batch(groups: Sequence[Group], row: Sequence[Part], layout: str, pad_id: int = 0) -> Batch:
    """Tensors (on the CPU) of the parts of a row.

    Raises:
        KeyError: an unknown layout.
    """
    lay_out = {"shared": _shared, "packed": _packed, "padded": _padded}[layout]
    stream, ids = _Stream(), _ids(groups, row)
    sequences = [(groups[p.group].prompt, groups[p.group].responses[r]) for p, r in ids]
    tensors = lay_out(stream, groups, row, pad_id)
    index = np.concatenate(stream.score) if stream.score else np.zeros(0, np.int64)
    targets, owners = _targets(sequences)
    pairs, weights, refs = _comparisons(groups, row)
    pair_tokens = sum(len(sequences[r][0]) + len(sequences[r][1]) for pair in pairs for r in pair)
    return Batch(
        layout=layout,
        score_index=torch.from_numpy(index),
        targets=torch.from_numpy(targets),
        response_ids=torch.from_numpy(owners),
        comparisons=torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
        weights=torch.tensor(weights, dtype=torch.float32),
        ref_logps=None if refs is None else torch.tensor(refs, dtype=torch.float64),
        response_lengths=torch.tensor([len(r) for _, r in sequences], dtype=torch.float32),
        computed_tokens=tensors["input_ids"].numel(),
        pair_tokens=pair_tokens,
        **tensors,
    )


def _ids(groups: Sequence[Group], row: Sequence[Part]) -> list[tuple[Part, int]]:
    return [(part, response) for part in row for response in part.responses]


def _targets(sequences: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    scored = [r if len(p) else r[1:] for p, r in sequences]
    owners = np.repeat(np.arange(len(scored)), [len(r) for r in scored])
    targets = np.concatenate(scored) if scored else np.zeros(0)
    return targets.astype(np.int64), owners.astype(np.int64)


def _comparisons(groups: Sequence[Group], row: Sequence[Part]):
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    refs: list[float] = []
    known, base = True, 0
    for part in row:
        group = groups[part.group]
        place = {r: base + i for i, r in enumerate(part.responses)}
        base += len(part.responses)
        for comparison in part.comparisons:
            win, lose, weight = group.comparisons[comparison]
            pairs.append((place[win], place[lose]))
            weights.append(weight)
        if group.ref_logps is None:
            known = False
        else:
            refs += [float(group.ref_logps[r]) for r in part.responses]
    return pairs, weights, refs if known else None


def _shared(stream: _Stream, groups: Sequence[Group], row: Sequence[Part], pad_id: int) -> dict:
    for part in row:
        group = groups[part.group]
        prompt = len(group.prompt)
        first = stream.append(group.prompt, 0)
        last = first + prompt - 1 if prompt else None
        for number, r in enumerate(part.responses):
            start = stream.append(group.responses[r], prompt)
            stream.score_response(start, len(group.responses[r]), last)
            if number == 0:
                stream.bounds.append((first, stream.size, first, first))
            elif stream.size > start:
                stream.bounds.append((start, stream.size, first, first + prompt))
    return _stream_tensors(stream)


def _packed(stream: _Stream, groups: Sequence[Group], row: Sequence[Part], pad_id: int) -> dict:
    for part, r in _ids(groups, row):
        group = groups[part.group]
        prompt = len(group.prompt)
        first = stream.append(group.prompt, 0)
        start = stream.append(group.responses[r], prompt)
        stream.score_response(start, len(group.responses[r]), start - 1 if prompt else None)
        stream.bounds.append((first, stream.size, first, first))
    return _stream_tensors(stream)


def _stream_tensors(stream: _Stream) -> dict:
    bounds = tuple(b for b in stream.bounds if b[1] > b[0])
    tokens = np.concatenate(stream.tokens).astype(np.int64)
    positions = np.concatenate(stream.positions).astype(np.int64)
    return {
        "input_ids": torch.from_numpy(tokens).unsqueeze(0),
        "position_ids": torch.from_numpy(positions).unsqueeze(0),
        "attention_mask": None,
        "segments": Segments.build(bounds, "cpu"),
    }


def _padded(stream: _Stream, groups: Sequence[Group], row: Sequence[Part], pad_id: int) -> dict:
    lines = [
        np.concatenate([groups[p.group].prompt, groups[p.group].responses[r]])
        for p, r in _ids(groups, row)
    ]
    width = max(len(line) for line in lines)
    ids = np.full((len(lines), width), pad_id, np.int64)
    mask = np.zeros((len(lines), width), np.int64)
    for number, (line, (part, r)) in enumerate(zip(lines, _ids(groups, row), strict=True)):
        ids[number, : len(line)] = line
        mask[number, : len(line)] = 1
        prompt = len(groups[part.group].prompt)
        start = number * width + prompt
        length = len(groups[part.group].responses[r])
        stream.score_response(start, length, start - 1 if prompt else None)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": None,
        "attention_mask": torch.from_numpy(mask),
        "segments": None,
    }
