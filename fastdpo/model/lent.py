"""A model of the caller's, for the time of a run."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .dropout import put_back, silence, switch_off
from .tiles import run_whole


@contextmanager
def lent(model: Any) -> Iterator[None]:
    """A transformers model without dropout; afterwards, whatever happened, it has its dropouts,
    attention, mode, forward and memory again. Its weights, device and adapters stay.
    """
    attention, training = model.config._attn_implementation, model.training
    recomputes = model.is_gradient_checkpointing
    dropouts, rates = switch_off(model.config), silence(model)
    model.fastdpo_dropouts = dropouts
    try:
        yield
    finally:
        run_whole(model)
        put_back(model.config, dropouts)
        for module, name, rate in rates:
            setattr(module, name, rate)
        model.set_attn_implementation(attention)
        if not recomputes and model.is_gradient_checkpointing:
            with warnings.catch_warnings():  # transformers 5.24 has another name for it
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_disable()
        model.zero_grad(set_to_none=True)
        model.train(training)
