"""The start-up proof of a row layout: log-probabilities against separate sequences.

Two short prompts with three and two random responses go through the model in the layout to be
proved, and every prompt with every response on its own through the model's stock attention. A
wrong position, a leaked neighbour or a dropped keyword moves log-probabilities by hundreds of times
what rounding does in fp32. In bf16 rounding can move a token by a whole nat, and only gross
mistakes (a lost prompt, an ordinary causal row) are told from it with certainty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from fastdpo.errors import ModelError
from fastdpo.model.attention import NAME, Segments
from fastdpo.model.frozen import compute_dtype, frozen_state, probe_tokens
from fastdpo.model.head import base_causal_lm, find_head, hidden_states

LENGTHS = ((5, (6, 3, 4)), (7, (2, 5)))
"""Prompt and response lengths of the probe: 32 tokens in a shared row."""

ATTEMPTS = 3
"""Probes to try before a layout counts as wrong."""

Group = tuple[list[int], list[list[int]]]
"""A prompt and its responses, token ids."""


@dataclass(frozen=True)
class Row:
    """One forward pass and where to read its log-probabilities."""

    inputs: dict[str, Any]
    """Keyword arguments of the decoder's forward."""
    score_index: torch.Tensor
    """int64 (T,): which flattened hidden state predicts each target."""
    targets: torch.Tensor
    """int64 (T,): the responses' tokens, in order."""


def stream_row(
    groups: list[Group],
    *,
    share: bool,
    device: torch.device,
    trace: list[dict[str, Any]] | None = None,
) -> Row:
    """All groups in one stream; each prompt once (`share`) or before each of its responses."""
    tokens: list[int] = []
    positions: list[int] = []
    bounds: list[tuple[int, int, int, int]] = []
    score: list[int] = []
    for prompt, responses in groups:
        for nth, response in enumerate(responses):
            if nth == 0 or not share:
                start, prefix = len(tokens), (0, 0)
                tokens += prompt
                positions += range(len(prompt))
                begin = start
            else:
                begin, prefix = len(tokens), (start, start + len(prompt))
            score += [start + len(prompt) - 1, *range(len(tokens), len(tokens) + len(response) - 1)]
            tokens += response
            positions += range(len(prompt), len(prompt) + len(response))
            bounds.append((begin, len(tokens), *prefix))
    inputs = {
        "input_ids": torch.tensor([tokens], device=device),
        "position_ids": torch.tensor([positions], device=device),
        "fastdpo_segments": Segments.build(bounds, device, trace=trace),
    }
    return Row(inputs, torch.tensor(score, device=device), _targets(groups, device))


def padded_row(groups: list[Group], *, device: torch.device) -> Row:
    """Every prompt with every response as one line of a batch padded on the right."""
    lines = [(prompt, response) for prompt, responses in groups for response in responses]
    width = max(len(prompt) + len(response) for prompt, response in lines)
    ids = torch.full((len(lines), width), lines[0][0][0], device=device)
    mask = torch.zeros_like(ids)
    score: list[int] = []
    for line, (prompt, response) in enumerate(lines):
        length = len(prompt) + len(response)
        ids[line, :length] = torch.tensor(prompt + response, device=device)
        mask[line, :length] = 1
        score += range(line * width + len(prompt) - 1, line * width + length - 1)
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if len(lines) > 1 else {})
    return Row(inputs, torch.tensor(score, device=device), _targets(groups, device))


def _targets(groups: list[Group], device: torch.device) -> torch.Tensor:
    tokens = [token for _, responses in groups for response in responses for token in response]
    return torch.tensor(tokens, device=device)


@dataclass(frozen=True)
class Probe:
    """Random groups and what separate sequences say about them."""

    groups: list[Group]
    expected: torch.Tensor
    """(T,) log-probabilities of the responses' tokens, in order."""
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
        try:
            with _quiet():
                for seed in range(ATTEMPTS):
                    probe = self._probe(seed)
                    difference = self._difference(layout, probe)
                    if difference <= probe.tolerance:
                        self.verdict = f"log-probabilities within {difference:.1e} of separate ones"
                        return None
        except torch.OutOfMemoryError:
            raise
        except ModelError as error:
            return str(error)
        except Exception as error:  # An unknown architecture may fail in any way; it falls back.
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            self.base.set_attn_implementation(self.stock)
        away = f"log-probabilities are {difference:.1e} away from separate ones"
        return f"{away}, expected at most {probe.tolerance:.1e}"

    def _difference(self, layout: str, probe: Probe) -> float:
        """The largest rms difference of a response; raises ModelError for what it cannot show."""
        if layout == "padded":
            logps = self._logps(padded_row(probe.groups, device=self.device))
        else:
            trace: list[dict[str, Any]] = []
            share = layout == "shared"
            row = stream_row(probe.groups, share=share, device=self.device, trace=trace)
            self.base.set_attn_implementation(NAME)
            logps = self._logps(row)
            self._check_calls(trace)
            # Dropout inside the attention function shows, as an error, only in training.
            self._logps(row, training=True)
        sizes = [n for _, responses in LENGTHS for n in responses]
        return max(_rms(part) for part in (logps - probe.expected).split(sizes))

    def _probe(self, seed: int) -> Probe:
        self.base.set_attn_implementation(self.stock)
        if seed not in self._probes:
            sizes = [n for prompt, responses in LENGTHS for n in (prompt, *responses)]
            pieces = iter(probe_tokens(self.base, sum(sizes), seed).split(sizes))
            groups: list[Group] = [
                (next(pieces).tolist(), [next(pieces).tolist() for _ in responses])
                for _, responses in LENGTHS
            ]
            pairs = [(prompt, response) for prompt, answers in groups for response in answers]
            expected = torch.cat([self._separate(*pair) for pair in pairs])
            self._probes[seed] = Probe(groups, expected, self._tolerance(groups, expected))
        return self._probes[seed]

    def _tolerance(self, groups: list[Group], expected: torch.Tensor) -> float:
        """Half the digits of what a wrong prompt changes, or some roundings of the numbers.

        Both scale with the model's own log-probabilities: tiny random models have small ones.
        """
        dtype = compute_dtype(self.model, self.head.weight.dtype)
        # Norms and rotary embeddings round to fp32 in fp64 models too.
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        (one, answers), (other, others) = groups
        swapped = self._separate(other, answers[0]), self._separate(one, others[-1])
        right = expected[: len(answers[0])], expected[-len(others[-1]) :]
        effect = _rms(torch.cat(swapped) - torch.cat(right))
        return max(2 * eps**0.5 * effect, 8 * eps * expected.std().item())

    def _separate(self, prompt: list[int], response: list[int]) -> torch.Tensor:
        """(T,) log-probabilities of one response after one prompt, alone in its forward."""
        return self._logps(padded_row([(prompt, [response])], device=self.device))

    def _logps(self, row: Row, *, training: bool = False) -> torch.Tensor:
        """(T,) log-probabilities of the targets, in fp32 at least."""
        with frozen_state(self.model, training=training):
            states = hidden_states(self.model, **row.inputs).flatten(0, 1)
            logits = self.head.logits(states[row.score_index.to(states.device)])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            targets = row.targets.to(logits.device)
            return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

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
