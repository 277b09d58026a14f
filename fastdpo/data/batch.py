"""A packed row as tensors: what one forward pass reads and what the head scores.

Shared:  `[prompt r0 r1 … | prompt' r0' …]`, position ids restarting at the prompt's length for
every response.
Packed:  `[prompt r0 | prompt r1 | …]`, every response with its own copy of the prompt.
Padded:  one sequence a line, padded on the right, with an attention mask.
The same tokens are scored in all three, and in the same order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .groups import Group
from .packing import Part
from .row_units import given_of, references_of, units_of
from .segments import Segments


@dataclass(frozen=True)
class Batch:
    """One forward pass: S (or B×L) tokens, T of them scored, R responses, U units.

    Where the prompt's own tokens are scored too, they are a response more for each part.
    """

    layout: str
    input_ids: Tensor  # (1, S) int64; padded: (B, L)
    position_ids: Tensor | None  # (1, S) int64; padded: None
    attention_mask: Tensor | None  # padded: (B, L) int64
    segments: Segments | None
    score_index: Tensor  # (T,) int64 into the flattened states; the last prompt token repeats
    targets: Tensor  # (T,) int64
    response_ids: Tensor  # (T,) int64 in [0, R)
    units: Tensor  # (U, 2) int64 of (winner, loser), with the prompt (U, 3); (U,); (U, G)
    places: Tensor  # (U,) int64, of the units in the step
    weights: Tensor  # (U,) fp32, the units' own weights
    given: dict[str, Tensor]  # (U,) or (U, G) fp64 by name
    ref_logps: Tensor | None  # (R,) fp64, nats
    ref_token_logps: Tensor | None  # (T,) fp64, nats
    response_lengths: Tensor  # (R,) fp32, completion tokens, also those that nothing precedes
    computed_tokens: int
    pair_tokens: int  # tokens that a sequence per response of a unit would hold, without padding
    host: "Batch | None" = None  # where it was made, for plans that must not wait for a device

    @property
    def idle(self) -> bool:
        """Whether it holds no unit; see `idle_batch`."""
        return len(self.places) == 0

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; `host` stays behind. From pinned memory nothing waits."""
        moved = self._each(lambda value: value.to(device, non_blocking=True))
        return replace(self, host=self.host or self, **moved)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which a device copies by itself."""
        return replace(self, **self._each(lambda value: value.pin_memory()))

    def _each(self, function: Callable[[Any], Any]) -> dict[str, Any]:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        found = {name: function(v) for name, v in values if isinstance(v, Tensor | Segments)}
        return found | {"given": {name: function(v) for name, v in self.given.items()}}

    def lengths(self) -> list[int]:
        """Padded layout: the length of every line without its padding."""
        assert self.attention_mask is not None
        return self.attention_mask.sum(1).tolist()


def idle_batch(layout: str) -> Batch:
    """A row of two tokens and no unit, for a rank that others wait for in their forward."""
    token = np.zeros(1, np.int64)
    return make_batch([Group(token, [token])], [Part(0, (0,))], layout)


class _Stream:
    """Collects one row: tokens, positions, attention segments and the tokens to score."""

    def __init__(self, scores_prompts: bool) -> None:
        self.scores_prompts = scores_prompts
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

    def score_prompt(self, start: int, length: int) -> None:
        """Score a prompt at [start, start + length), all but its first token, if prompts are."""
        if self.scores_prompts and length > 1:
            self.score.append(np.arange(start, start + length - 1))

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


def make_batch(
    groups: Sequence[Group],
    row: Sequence[Part],
    layout: str,
    pad_id: int = 0,
    *,
    constants: Mapping[str, np.ndarray] | None = None,
    prompt: bool = False,
    mismatched: bool = False,
) -> Batch:
    """Tensors (on the CPU) of the parts of a row.

    Args:
        constants: what the units of the step are given, by their places.
        prompt: whether prompts are scored too.
        mismatched: whether units are made of the mismatched responses.

    Raises:
        KeyError: an unknown layout.
    """
    lay_out = {"shared": _shared, "packed": _packed, "padded": _padded}[layout]
    stream, ids = _Stream(prompt), _ids(groups, row)
    tensors = lay_out(stream, groups, row, pad_id)
    index = np.concatenate(stream.score) if stream.score else np.zeros(0, np.int64)
    targets, owners = _targets(groups, row, prompt)
    sequences = [(groups[p.group].prompt, groups[p.group].responses[r]) for p, r in ids]
    lengths = [len(response) for _, response in sequences]
    if prompt:
        lengths += [max(0, len(groups[part.group].prompt) - 1) for part in row]
    units, counted = units_of(groups, row, prompt, mismatched)
    refs, token_refs = references_of(groups, row, prompt)
    return Batch(
        layout=layout,
        score_index=torch.from_numpy(index),
        targets=torch.from_numpy(targets),
        response_ids=torch.from_numpy(owners),
        units=units,
        places=torch.tensor([place for part in row for place in part.places], dtype=torch.int64),
        weights=torch.tensor(
            [groups[p.group].weight(unit) for p in row for unit in p.units], dtype=torch.float32
        ),
        given=given_of(groups, row, constants or {}),
        ref_logps=refs,
        ref_token_logps=token_refs,
        response_lengths=torch.tensor(lengths, dtype=torch.float32),
        computed_tokens=tensors["input_ids"].numel(),
        pair_tokens=sum(len(sequences[r][0]) + len(sequences[r][1]) for r in counted),
        **tensors,
    )


def _ids(groups: Sequence[Group], row: Sequence[Part]) -> list[tuple[Part, int]]:
    return [(part, response) for part in row for response in part.responses]


def _targets(
    groups: Sequence[Group], row: Sequence[Part], prompt: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The scored tokens, and the response of each."""
    scored: list[np.ndarray] = []
    owners: list[int] = []
    number, prompts = 0, sum(len(part.responses) for part in row)
    for part in row:
        group = groups[part.group]
        if prompt:
            scored.append(group.prompt[1:])
            owners.append(prompts)
            prompts += 1
        for r in part.responses:
            response = group.responses[r]
            scored.append(response if len(group.prompt) else response[1:])
            owners.append(number)
            number += 1
    targets = np.concatenate(scored) if scored else np.zeros(0)
    ids = np.repeat(np.array(owners, np.int64), [len(r) for r in scored])
    return targets.astype(np.int64), ids


def _shared(stream: _Stream, groups: Sequence[Group], row: Sequence[Part], pad_id: int) -> dict:
    for part in row:
        group = groups[part.group]
        prompt = len(group.prompt)
        first = stream.append(group.prompt, 0)
        last = first + prompt - 1 if prompt else None
        stream.score_prompt(first, prompt)
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
        if r == part.responses[0]:
            stream.score_prompt(first, prompt)
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
        if r == part.responses[0]:
            stream.score_prompt(number * width, prompt)
        start = number * width + prompt
        length = len(groups[part.group].responses[r])
        stream.score_response(start, length, start - 1 if prompt else None)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": None,
        "attention_mask": torch.from_numpy(mask),
        "segments": None,
    }
