"""Objectives of the papers in fp64, from the logits of transformers, a response a sequence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Response:
    """Log-probabilities (n,) of a response's tokens, nats, and what the data says of it."""

    tokens: Tensor
    ref: Tensor
    about: Mapping[str, float]

    @property
    def logratio(self) -> Tensor:
        """log π(y|x) − log π_ref(y|x)."""
        return self.tokens.sum() - self.ref.sum()


Row = list[Response]

Batches = Sequence[Sequence[Any]]
"""The batches of a step, each of units: a `Response`, or a tuple or list of them."""

Paper = Callable[[Batches], Tensor]
"""The mean loss of a step."""


class Models:
    """A policy and a reference in fp64."""

    def __init__(self, policy: Path, reference: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(policy)
        load = AutoModelForCausalLM.from_pretrained
        self.policy = load(policy, dtype=torch.float64)
        self.reference = load(reference, dtype=torch.float64).requires_grad_(False)

    def responses(self, prompt: str, texts: Sequence[str], **about: Sequence[float]) -> Row:
        """The responses `texts` to a prompt, each with EOS; `about` gives each a value by name.

        They begin where the first of them has other tokens than the prompt alone.
        """
        start = self.tokenizer(prompt).input_ids
        ids = [self.tokenizer(prompt + t + self.tokenizer.eos_token).input_ids for t in texts]
        cut = min(_shared(start, one) for one in ids)
        return [
            Response(
                self._tokens(self.policy, torch.tensor([one]), cut),
                self._tokens(self.reference, torch.tensor([one]), cut),
                {name: values[i] for name, values in about.items()},
            )
            for i, one in enumerate(ids)
        ]

    def _tokens(self, model: Any, ids: Tensor, cut: int) -> Tensor:
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        return logps.gather(1, ids[0, 1:, None])[cut - 1 :, 0]

    def loss_and_norm(self, loss: Tensor) -> tuple[float, float]:
        """A step's loss, and the norm of its gradient by the policy's weights."""
        weights = list(self.policy.parameters())
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        return loss.item(), torch.stack([g.norm() for g in gradients]).norm().item()


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    same = (a == b for a, b in zip(one, other, strict=False))
    return sum(1 for _ in takewhile(bool, same))


def steps_of(units: Sequence[Any], batch: int, accumulated: int) -> list[list[Sequence[Any]]]:
    """Units in batches, and those in steps."""
    batches = [units[i : i + batch] for i in range(0, len(units), batch)]
    return [batches[i : i + accumulated] for i in range(0, len(batches), accumulated)]


def mean_over(loss: Callable[[Any], Tensor]) -> Paper:
    """The mean over a step's units of a loss of one."""
    return lambda step: torch.stack([loss(unit) for batch in step for unit in batch]).mean()
