"""What a packed row says of its units, as tensors: their responses, constants and references."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .groups import Group
from .packing import Part


def units_of(
    groups: Sequence[Group], row: Sequence[Part], prompt: bool, mismatched: bool
) -> tuple[Tensor, list[int]]:
    """The units as responses of the row, and every response that a unit names."""
    units: list[list[int]] = []
    counted: list[int] = []
    base = 0
    for number, part in enumerate(row):
        group = groups[part.group]
        place = {r: base + i for i, r in enumerate(part.responses)}
        base += len(part.responses)
        for unit in part.units:
            named = [place[r] for r in group.responses_of(unit, mismatched)]
            counted += named
            units.append([*named, -1 - number] if prompt else named)
    if prompt:  # behind all others
        units = [[*named, base - 1 - last] for *named, last in units]
    kind = groups[row[0].group].unit if row else "comparison"
    if kind == "response":
        return torch.tensor(counted, dtype=torch.int64), counted
    width = max(map(len, units), default=2)
    padded = [named + [-1] * (width - len(named)) for named in units]
    return torch.tensor(padded, dtype=torch.int64).view(-1, width), counted


def given_of(
    groups: Sequence[Group], row: Sequence[Part], constants: Mapping[str, np.ndarray]
) -> dict[str, Tensor]:
    places = np.array([place for part in row for place in part.places], np.int64)
    found = {name: torch.from_numpy(values[places]) for name, values in constants.items()}
    if not row or groups[row[0].group].unit == "comparison":
        return found
    for name in groups[row[0].group].given:
        values: list[list[float]] = []
        for part in row:
            group = groups[part.group]
            lists = group.lists if group.unit == "group" else [[i] for i in range(group.units)]
            values += [[group.given[name][item] for item in lists[unit]] for unit in part.units]
        width = max(map(len, values), default=1)
        table = torch.tensor(
            [line + [0.0] * (width - len(line)) for line in values], dtype=torch.float64
        )
        kind = groups[row[0].group].unit
        found[name] = table if kind == "group" else table.view(-1)
    return found


def references_of(
    groups: Sequence[Group], row: Sequence[Part], prompt: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The reference's log-probabilities of responses and of tokens, where they are known."""
    refs = token_refs = None
    sums = [(groups[part.group].ref_logps, part.responses) for part in row]
    known = [logps[list(named)] for logps, named in sums if logps is not None]
    if len(known) == len(row):
        values = np.concatenate([*known, np.zeros(len(row) if prompt else 0)])
        refs = torch.from_numpy(values.astype(np.float64))
    if all(groups[part.group].ref_token_logps is not None for part in row):
        pieces: list[np.ndarray] = []
        for part in row:
            group = groups[part.group]
            assert group.ref_token_logps is not None
            if prompt:
                pieces.append(np.zeros(max(0, len(group.prompt) - 1)))
            pieces += [group.ref_token_logps[r] for r in part.responses]
        joined = np.concatenate(pieces) if pieces else np.zeros(0)
        token_refs = torch.from_numpy(joined.astype(np.float64))
    return refs, token_refs
