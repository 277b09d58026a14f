"""The start-up proof of a row layout: log-probabilities against separate sequences.

Two short prompts with three and two random responses go through the model in the layout to be
proved, in a row made as those of training are, and every prompt with every response on its own
through the model's stock attention. A
wrong position, a leaked neighbour or a dropped keyword moves log-probabilities by hundreds of times
what rounding does in fp32. In bf16 rounding can move a token by a whole nat, and of such mistakes
only gross ones (a lost prompt, an ordinary causal row) are told from it with certainty. A leak is
told in any dtype: a row in which other responses have other tokens is rounded like the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..data.batch import Batch, make_batch
from ..data.groups import Group
from ..data.packing import Part
from ..errors import ModelError, one_line
from .attention import NAME
from .forward import batch_states
from .frozen import compute_dtype, frozen_state, probe_tokens
from .head import base_causal_lm, find_head

LENGTHS = ((5, (6, 3, 4)), (7, (2, 5)))
"""Prompt and response lengths of the probe: 32 tokens in a shared row."""

ATTEMPTS = 3
"""Probes to try before a layout counts as wrong."""

LEAK = 0.01
"""How far other responses' tokens may move a response, as a share of what a wrong prompt does."""


@dataclass(frozen=True)
class Probe:
    """Random groups and what separate sequences say about them."""

    groups: list[Group]
    expected: torch.Tensor
    """(T,) log-probabilities of the responses' tokens, in order."""
    effect: float
    """How far a wrong prompt moves log-probabilities (rms over a response)."""
    tolerance: float
    """The largest difference (rms over a response) that passes for rounding."""


class ExactnessCheck:
    """Compares layouts of one model with separate sequences through its stock attention."""

    def __init__(self, model: nn.Module, stock: str) -> None:
        """`stock` is the attention implementation to compare with; `failure` leaves it set."""
        self.model = model
        self.stock = stock
        self.base = base_causal_lm(model)
        self.head = find_head(model)
        self.device = self.base.get_input_embeddings().weight.device
        self.verdict = ""
        """What the last successful check found, for the log."""
        self._probes: dict[int, Probe] = {}

    def failure(self, layout: str) -> str | None:
        """Why `layout` is not exact for this model, or None if it is.

        A wrong layout is far off on every probe; in bf16 rounding alone can be, on an unlucky one.
        So one probe that agrees is enough.
        """
        objection = None
        try:
            with _quiet():
                for seed in range(ATTEMPTS):
                    objection = self._objection(layout, seed)
                    if objection is None:
                        break
        except torch.OutOfMemoryError:
            raise
        except ModelError as error:
            return str(error)
        except Exception as error:  # An unknown architecture may fail in any way; it falls back.
            return one_line(error)
        finally:
            self.base.set_attn_implementation(self.stock)
        return objection

    def _objection(self, layout: str, seed: int) -> str | None:
        """What one probe says against `layout`; raises ModelError for what it cannot show."""
        probe = self._probe(seed)
        trace: list[dict[str, Any]] = []
        row = self._row(layout, probe.groups, trace)
        logps = self._logps(row)
        if layout != "padded":
            self._check_calls(trace)
            # Dropout inside the attention function shows, as an error, only in training.
            self._logps(row, training=True)
        difference = max(_rms(part) for part in _responses(logps - probe.expected))
        if difference > probe.tolerance:
            away = f"log-probabilities are {difference:.1e} away from separate ones"
            return f"{away}, expected at most {probe.tolerance:.1e}"
        self.verdict = f"log-probabilities within {difference:.1e} of separate ones"
        return None if layout == "padded" else self._leak(layout, seed)

    def _leak(self, layout: str, seed: int) -> str | None:
        """What the tokens of other responses do to a response, or None for next to nothing."""
        moved, allowed = self._moved(layout, seed), LEAK * self._probe(seed).effect
        if moved > allowed:
            # Experts round by what else they are given, so the model is asked how much it does.
            allowed = max(allowed, 4 * self._moved("padded", seed))
        if moved <= allowed:
            return None
        move = f"log-probabilities move by {moved:.1e} with the tokens of other responses"
        return f"{move}, expected at most {allowed:.1e}"

    def _row(
        self, layout: str, groups: list[Group], trace: list[dict[str, Any]] | None = None
    ) -> Batch:
        """The groups in one row of `layout`, for which the model's attention is set; calls of the
        attention function are noted in `trace`.
        """
        self.base.set_attn_implementation(self.stock if layout == "padded" else NAME)
        row = [Part(number, tuple(range(len(g.responses)))) for number, g in enumerate(groups)]
        batch = make_batch(groups, row, layout)
        if batch.segments is not None:
            batch = replace(batch, segments=replace(batch.segments, trace=trace))
        return batch.to(self.device)

    def _moved(self, layout: str, seed: int) -> float:
        """How far a response moves (rms) where every second one in its row has other tokens."""
        mine, others = self._groups(seed), self._groups(seed + ATTEMPTS)
        logps, moved = self._logps(self._row(layout, mine)), []
        for kept in (0, 1):
            number = count(kept)
            groups = [
                Group(
                    group.prompt,
                    [
                        pair[next(number) % 2]
                        for pair in zip(group.responses, other.responses, strict=True)
                    ],
                )
                for group, other in zip(mine, others, strict=True)
            ]
            parts = _responses(self._logps(self._row(layout, groups)) - logps)
            moved += [_rms(part) for part in parts[kept::2]]
        return max(moved)

    def _probe(self, seed: int) -> Probe:
        if seed not in self._probes:
            self.base.set_attn_implementation(self.stock)
            groups = self._groups(seed)
            pairs = [(group.prompt, response) for group in groups for response in group.responses]
            expected = torch.cat([self._separate(*pair) for pair in pairs])
            self._probes[seed] = Probe(groups, expected, *self._tolerance(groups, expected))
        return self._probes[seed]

    def _groups(self, seed: int) -> list[Group]:
        sizes = [n for prompt, responses in LENGTHS for n in (prompt, *responses)]
        tokens = probe_tokens(self.base, sum(sizes), seed).int().cpu()
        pieces = (piece.numpy() for piece in tokens.split(sizes))
        return [Group(next(pieces), [next(pieces) for _ in answers]) for _, answers in LENGTHS]

    def _tolerance(self, groups: list[Group], expected: torch.Tensor) -> tuple[float, float]:
        """What a wrong prompt changes; and half its digits, or some roundings of the numbers.

        Both scale with the model's own log-probabilities: tiny random models have small ones.
        """
        dtype = compute_dtype(self.model, self.head.weight.dtype)
        # Norms and rotary embeddings round to fp32 in fp64 models too.
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        one, other = groups
        first, last = one.responses[0], other.responses[-1]
        swapped = self._separate(other.prompt, first), self._separate(one.prompt, last)
        right = expected[: len(first)], expected[-len(last) :]
        effect = _rms(torch.cat(swapped) - torch.cat(right))
        return effect, max(2 * eps**0.5 * effect, 8 * eps * expected.std().item())

    def _separate(self, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
        """(T,) log-probabilities of one response after one prompt, alone in its forward."""
        return self._logps(self._row("padded", [Group(prompt, [response])]))

    def _logps(self, batch: Batch, *, training: bool = False) -> torch.Tensor:
        """(T,) log-probabilities of the targets, in fp32 at least."""
        with frozen_state(self.model, training=training):
            states = batch_states(self.model, batch).flatten(0, 1)
            logits = self.head.logits(states[batch.score_index])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]

    def _check_calls(self, trace: list[dict[str, Any]]) -> None:
        """Raise ModelError for layers that bypass the attention function or hide their window."""
        config = self.base.config.get_text_config()
        layers = config.num_hidden_layers
        called = {id(call["module"]) for call in trace}
        if len(called) < layers:
            raise ModelError(f"{len(called)} of {layers} layers call the attention function")
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        expected = kinds.count("sliding_attention") if kinds else (layers if window else 0)
        told = {id(call["module"]) for call in trace if call["sliding_window"] is not None}
        if len(told) < expected:
            raise ModelError(
                f"{len(told)} of {expected} sliding windows reach the attention function"
            )


def _responses(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The probe's tokens, response by response."""
    return x.split([n for _, responses in LENGTHS for n in responses])


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings: the check's own verdict says what matters."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
