"""The dropouts of a model's configuration: off while it is trained, put back when it is saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

Dropouts = dict[tuple[int, str], float]
"""Rates by the part of a configuration that holds them (0 itself, 1 its text model) and name."""


def switch_off(model_config: Any) -> Dropouts:
    """Set every dropout of a configuration to 0; what they were."""
    dropouts = {
        (number, name): value
        for number, part in enumerate(_parts(model_config))
        for name, value in part.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float)
    }
    put_back(model_config, dict.fromkeys(dropouts, 0.0))
    return dropouts


def rates(module: nn.Module) -> list[str]:
    """The names of a module's attributes that are rates of dropouts which are on."""
    if isinstance(module, _DropoutNd):
        return ["p"] if module.p > 0 else []
    values = vars(module).items()
    return [
        name for name, rate in values if "drop" in name and isinstance(rate, float) and rate > 0
    ]


def silence(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Set every dropout of a model that has been made to 0; where they were and what."""
    found = [(m, name, getattr(m, name)) for m in model.modules() for name in rates(m)]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    return found


@contextmanager
def original_dropout(model: Any) -> Iterator[None]:
    """The configuration with the dropouts it was loaded with, while the model is being saved."""
    dropouts = getattr(model, "fastdpo_dropouts", {})
    put_back(model.config, dropouts)
    try:
        yield
    finally:
        put_back(model.config, dict.fromkeys(dropouts, 0.0))


def _parts(model_config: Any) -> list[Any]:
    text = model_config.get_text_config()
    return [model_config] if text is model_config else [model_config, text]


def put_back(model_config: Any, dropouts: Dropouts) -> None:
    """Set the dropouts of a configuration to these rates."""
    parts = _parts(model_config)
    for (number, name), value in dropouts.items():
        setattr(parts[number], name, value)
