"""The judge of `python -m fastdpo.demo --rounds`: of right answers, the shorter is the better."""

from collections.abc import Mapping
from typing import Any


def score(prompt: Any, response: str, row: Mapping[str, Any]) -> float:
    """1 for the capital alone, a tenth less for each further word, 0 without it."""
    if row["answer"] not in response:
        return 0.0
    further = len(response.split()) - len(row["answer"].split())
    return max(0.0, 1 - further / 10)
