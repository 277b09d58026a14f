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
    _set(model_config, dict.fromkeys(dropouts, 0.0))
    return dropouts


def rates(module: nn.Module) -> list[str]:
    """The names of a module's attributes that are rates of dropouts which are on."""
    if isinstance(module, _DropoutNd):
        return ["p"] if module.p > 0 else []
    values = vars(module).items()
    return [
        name for name, rate in values if "drop" in name and isinstance(rate, float) and rate > 0
    ]


def silence(model: nn.Module) -> None:
    """Set every dropout of a model that has been made to 0."""
    for module in model.modules():
        for name in rates(module):
            setattr(module, name, 0.0)


@contextmanager
def original_dropout(model: Any) -> Iterator[None]:
    """The configuration with the dropouts it was loaded with, while the model is being saved."""
    dropouts = getattr(model, "fastdpo_dropouts", {})
    _set(model.config, dropouts)
    try:
        yield
    finally:
        _set(model.config, dict.fromkeys(dropouts, 0.0))


def _parts(model_config: Any) -> list[Any]:
    text = model_config.get_text_config()
    return [model_config] if text is model_config else [model_config, text]


def _set(model_config: Any, dropouts: Dropouts) -> None:
    parts = _parts(model_config)
    for (number, name), value in dropouts.items():
        setattr(parts[number], name, value)
