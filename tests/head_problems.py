"""Heads to score, engines to score them with, and both evaluated to numbers that can be compared.

An engine is added to all exactness tests of the head by a line in `ENGINES`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from fastdpo_kernels import call, linear_dpo_loss, linear_logprob
from fastdpo_kernels.backends import make_tiles
from fastdpo_kernels.head import OUTPUTS, Tiles
from torch import Tensor


@dataclass(frozen=True)
class Engine:
    """A backend on a device, and the widest dtype that it computes in."""

    backend: str
    exact: torch.dtype
    device: str = "cpu"

    @property
    def tolerance(self) -> float:
        """Rounding of some hundred sums of some hundred terms; of fp64 there is plenty."""
        return 1e-10 if self.exact == torch.float64 else 400 * torch.finfo(self.exact).eps


ENGINES = [Engine("torch", torch.float64)]
"""`tests/test_triton.py` has the fused kernels, which take their time in the interpreter."""
NAIVE = Engine("naive", torch.float64)

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"logit_scale": 0.37},
    "softcap": {"softcap": 3.0},
    "everything": {"softcap": 5.0, "logit_scale": 1.7, "temperature": 0.8, "bias": True},
}


class Case(NamedTuple):
    """A packed problem on the CPU, in fp64 whose values `dtype` of `packed` could hold."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    response_ids: Tensor
    comparisons: Tensor
    ref_logps: Tensor


def make(tokens, hidden=24, vocab=101, seed=0, bias=False, dtype=torch.float64, ignore=0.2):
    """Random hidden states, weight, bias and targets (some ignored); logits with a spread of
    several nats.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=g, dtype=torch.float64) * 0.5
    y = torch.randint(0, vocab, (tokens,), generator=g)
    y[torch.rand(tokens, generator=g) < ignore] = -100
    b = torch.randn(vocab, generator=g, dtype=torch.float64) if bias else None
    return [None if t is None else t.to(dtype) for t in (x, w, b)] + [y]


def packed(responses=7, seed=0, dtype=torch.float64, bias=False, longest=8):
    """A packed problem with uneven responses, one of them empty, several comparisons a response."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (responses,), generator=g)
    lengths[responses // 2] = 0
    ids = torch.repeat_interleave(torch.arange(responses), lengths)
    x, w, b, y = make(len(ids), seed=seed, dtype=dtype, bias=bias, ignore=0.1)
    pairs = torch.tensor([(a, a + 1) for a in range(0, responses - 1, 2)] + [(2, 0), (0, 1)])
    ref = -torch.rand(responses, generator=g, dtype=torch.float64) * 40
    return Case(x, w, b, y, ids, pairs, ref.to(dtype))


def leaves(
    case: Case, engine: Engine, train: tuple[bool, bool], dtype: torch.dtype | None = None
) -> dict[str, Tensor | None]:
    """Hidden states, weight and bias as an engine gets them; `train`: the first, the other two."""
    needs = (train[0], train[1], train[1])
    return {
        name: None
        if t is None
        else t.detach().to(engine.device, dtype or engine.exact, copy=True).requires_grad_(need)
        for name, t, need in zip(("hidden", "weight", "bias"), case[:3], needs, strict=True)
    }


def numbers(values: dict[str, Tensor], tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Results and the gradients of leaves in fp64 on the CPU, by name."""
    for name, leaf in tensors.items():
        if leaf is not None and leaf.grad is not None:
            values[f"gradient of {name}"] = leaf.grad
    return {name: value.detach().double().cpu() for name, value in values.items()}


def evaluate_logprob(case, engine, train=(True, True), dtype=None, outputs=OUTPUTS, **options):
    """Everything that `linear_logprob` gives, and the gradients for uneven coefficients."""
    tensors = leaves(case, engine, train, dtype)
    options |= {"outputs": outputs, "backend": engine.backend}
    out = linear_logprob(targets=case.targets.to(engine.device), **tensors, **options)
    values = out._asdict() if outputs else {"logprob": out}
    logprob = values["logprob"]
    if any(train):
        c, d = uneven(logprob.numel())
        values |= differentiated(values, tensors, c.view(logprob.shape), d.view(logprob.shape))
    return numbers(values, tensors)


def uneven(count: int) -> tuple[Tensor, Tensor]:
    """Coefficients of the log-probabilities and of lse of `count` tokens."""
    return torch.linspace(-1, 2, count), torch.linspace(2, -1.5, count)


def differentiated(
    values: dict[str, Tensor], tensors: dict[str, Tensor | None], c: Tensor, d: Tensor
) -> dict[str, Tensor]:
    """Leave the gradient of Σ c·logp at the leaves; returns that with Σ d·lse added, where there
    is one.
    """
    logprob, found = values["logprob"], {}
    total = (logprob * c.to(logprob)).sum()
    if "lse" in values:
        (total + (values["lse"] * d.to(logprob)).sum()).backward(retain_graph=True)
        for name, leaf in tensors.items():
            if leaf is not None and leaf.grad is not None:
                found[f"gradient of {name} with lse"], leaf.grad = leaf.grad, None
    total.backward()
    return found


def evaluate_loss(case, engine, train=(True, True), dtype=None, outputs=OUTPUTS, **options):
    """Everything that `linear_dpo_loss` gives, and the gradients of three times the loss."""
    tensors = leaves(case, engine, train, dtype)
    options |= {"outputs": outputs, "backend": engine.backend}
    names = ("targets", "response_ids", "comparisons", "ref_logps")
    rest = {name: getattr(case, name).to(engine.device) for name in names}
    loss, logps, *stats = linear_dpo_loss(**tensors, **rest, **options)
    if any(train):
        (3 * loss).backward()
    values = {"loss": loss, "logps": logps} | (stats[0]._asdict() if stats else {})
    return numbers(values, tensors)


def assert_same(ours: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    """Every number within `tolerance`, relative to itself, to the largest beside it, or to 1."""
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        largest = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        torch.testing.assert_close(
            ours[name],
            value,
            rtol=tolerance,
            atol=tolerance * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@contextmanager
def small_tiles(rows: int, block_rows: int = 3) -> Iterator[list[Tiles]]:
    """Tiles of few tokens, so that everything is cut, with NaN in a tile before it is written, and
    worked on `block_rows` tokens at a time.

    Yields the list of all tiles made meanwhile.
    """
    made: list[Tiles] = []

    def make_small(*arguments: Any) -> Tiles:
        engine: Any = make_tiles(*arguments)
        engine.rows, engine.block_rows = min(rows, engine.rows), block_rows
        poison(engine)
        made.append(engine)
        return engine

    with mock.patch.object(call, "make_tiles", make_small):
        yield made


def poison(engine: Any) -> Any:
    """Fill a tile with NaN whenever one is handed out."""
    original = engine.empty_tile
    engine.empty_tile = lambda tokens: original(tokens).fill_(math.nan)
    return engine
