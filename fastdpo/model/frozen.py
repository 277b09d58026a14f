"""Running a model once or twice at start-up without leaving a trace on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def frozen_state(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Evaluation (or training) mode without gradients; modes and random states are put back.

    Each module's own mode is restored, since some code keeps parts of a model in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
            # Reentrant checkpointing warns that nothing needs a gradient, which is the point here.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def probe_tokens(model: nn.Module, count: int, seed: int = 0) -> torch.Tensor:
    """int64 (count,) on the model's device: fixed random tokens, the global generators untouched.

    They come from the middle of the vocabulary, where no special tokens (padding, images) are.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary, _ = embedding.weight.shape
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary // 4, 3 * vocabulary // 4, (count,), generator=generator)
    return tokens.to(embedding.weight.device)


def compare(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The largest difference, and the largest that passes for rounding: half of the digits of
    `dtype`.
    """
    difference = (ours.double() - theirs.double()).abs().max().item()
    return difference, 0.5 * torch.finfo(dtype).eps ** 0.5 * theirs.abs().max().item()


def compute_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The type that products are rounded to: autocast's where it is on, else `dtype`."""
    device = next(model.parameters()).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
