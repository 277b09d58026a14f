"""What losses are given in their tests: units of every kind with random log-probabilities."""

from collections.abc import Iterable
from typing import Any

import torch
from fastdpo_kernels import LOSSES, Comparisons, Responses
from fastdpo_kernels.losses import Tokens

BETA, EPSILON, TAU = 0.3, 0.1, 0.05
OPTIONS = {
    "beta": BETA,
    "label_smoothing": EPSILON,
    "discopop_tau": TAU,
    "simpo_gamma": 0.4,
    "cpo_alpha": 0.7,
    "alpha": 0.25,
    "desirable_weight": 0.8,
    "undesirable_weight": 1.3,
    "epsilon": 0.2,
    "epsilon_high": 0.3,
    "max_completion_length": 40,
}
OF_PAIRS = sorted(name for name, loss in LOSSES.items() if loss.unit == "comparison")
OF_RESPONSES = sorted(name for name, loss in LOSSES.items() if loss.kind == "response")
OF_TOKENS = sorted(name for name, loss in LOSSES.items() if loss.kind == "tokens")


def one_of_each_kind(names: Iterable[str]) -> list[str]:
    """The first loss of those that are fed alike: what they see, and what is summed over a step."""
    first: dict[Any, str] = {}
    for name in names:
        loss = LOSSES[name]
        fed = (loss.kind, loss.reference, loss.terms, loss.running, loss.mismatched, loss.prompt)
        first.setdefault(fed, name)
    return list(first.values())


def random(seed: int):
    return torch.Generator().manual_seed(seed)


def pairs(count: int = 64, spread: float = 8.0) -> Comparisons:
    g = random(0)
    logps = [-40 + spread * torch.randn(count, generator=g, dtype=torch.float64) for _ in range(4)]
    lengths = [torch.randint(1, 30, (count,), generator=g).double() for _ in range(2)]
    given = {name: torch.full((count,), 17.5) for name in ("batch_chosen_tokens",)}
    given["batch_sequence_tokens"] = torch.full((count,), 26.0, dtype=torch.float64)
    prompt = -20 * torch.rand(count, generator=g, dtype=torch.float64)
    return Comparisons(*logps, *lengths, given, prompt_logps=prompt)


def responses(count: int = 64) -> Responses:
    g = random(1)
    logps, ref = (-40 + 8 * torch.randn(count, generator=g, dtype=torch.float64) for _ in "ab")
    lengths = torch.randint(1, 30, (count,), generator=g).double()
    given = {
        "label": (torch.rand(count, generator=g) > 0.5).double(),
        "kl": torch.full((count,), 1.7, dtype=torch.float64),
        "delta": torch.full((count,), -0.3, dtype=torch.float64),
        "win_rate": torch.rand(count, generator=g, dtype=torch.float64),
    }
    return Responses(logps, ref, lengths, given)


def tokens(count: int = 12) -> Responses:
    """Responses with their tokens, whose ratios lie on both sides of the clipping."""
    g = random(2)
    lengths = torch.randint(1, 9, (count,), generator=g)
    units = torch.arange(count).repeat_interleave(lengths)
    ref = -3 * torch.rand(len(units), generator=g, dtype=torch.float64)
    logps = ref + 0.4 * torch.randn(len(units), generator=g, dtype=torch.float64)
    each = Tokens(logps, ref, units)
    given = {
        "advantage": torch.randn(count, generator=g, dtype=torch.float64),
        "batch_tokens": torch.full((count,), 4.5, dtype=torch.float64),
        "step_tokens": torch.full((count,), 5.5, dtype=torch.float64),
    }
    sums = [each.sums(values, count) for values in (logps, ref)]
    return Responses(*sums, lengths.double(), given, tokens=each)
