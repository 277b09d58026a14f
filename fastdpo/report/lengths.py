"""How long prompts and responses are, in tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.groups import Group

_LOOKED_AT = 20_000
_BARS = 30


def length_facts(groups: Sequence[Group], max_length: int | None) -> dict[str, Any]:
    """Histograms over evenly spaced groups; {} where there are none.

    Returns:
        "edges" of the bars in tokens, by "counts" of each kind ("prompt", "chosen", "rejected", or
        "response" where nothing is compared), their "medians" and "longest"; "longer_chosen", the
        share of comparisons whose chosen response is the longer one, a tie one half; "groups" and
        "of", how many were looked at; "max_length".
    """
    if not len(groups):
        return {}
    some = [groups[i] for i in spread(len(groups), _LOOKED_AT)]
    pairs = [(len(g.responses[w]), len(g.responses[r])) for g in some for w, r, *_ in g.comparisons]
    kinds = {"prompt": np.array([len(group.prompt) for group in some])}
    if pairs:
        kinds["chosen"], kinds["rejected"] = np.array(pairs).T
    else:
        kinds["response"] = np.array([len(r) for group in some for r in group.responses])
    top = max(int(np.percentile(values, 99)) for values in kinds.values())
    width = max(1, -(-(top + 1) // _BARS))
    edges = np.arange(0, width * (_BARS + 1), width)
    found = {
        "edges": edges.tolist(),
        "counts": {
            name: np.histogram(np.minimum(values, edges[-1]), edges)[0].tolist()
            for name, values in kinds.items()
        },
        "medians": {name: float(np.median(values)) for name, values in kinds.items()},
        "longest": {name: int(values.max()) for name, values in kinds.items()},
        "groups": len(some),
        "of": len(groups),
        "max_length": max_length,
    }
    if pairs:
        found["longer_chosen"] = sum((w > r) + 0.5 * (w == r) for w, r in pairs) / len(pairs)
    return found


def spread(count: int, wanted: int) -> list[int]:
    """So many numbers below `count`, evenly spaced."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]
