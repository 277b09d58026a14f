"""What makes a run smaller, from cheap to dear, and the least of it that fits a device.

The first group changes memory and time and no number beyond rounding; `memory: auto` and the
handling of an out-of-memory error use it alone. The second changes what is computed: a plan names
it, and turning it on is up to the user.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig
from ..errors import ConfigError
from .plan import Planner, Prediction

Values = dict[str, Any]
_TILE, _SMALLEST_WORKSPACE = 4096, 64


@dataclass(frozen=True)
class Switch:
    """A change of keys: their values from the configuration and the planner, {} where nothing is
    left to change.
    """

    name: str
    exact: bool
    """Whether the run's numbers stay the same, rounding apart."""
    values: Callable[[TrainConfig, Planner], Values]


def _lower_budget(config: TrainConfig, planner: Planner) -> Values:
    longest = planner.longest
    now = planner.predict(config).max_tokens
    return {"max_tokens_per_batch": longest} if now > longest else {}


def _checkpoint(config: TrainConfig, planner: Planner) -> Values:
    if config.gradient_checkpointing and config.gradient_checkpointing_every == 1:
        return {}
    return {"gradient_checkpointing": True, "gradient_checkpointing_every": 1}


def _tiles(config: TrainConfig, planner: Planner) -> Values:
    now = config.layer_tile_tokens
    return {} if now is not None and now <= _TILE else {"layer_tile_tokens": _TILE}


def _offload(config: TrainConfig, planner: Planner) -> Values:
    if config.activation_offloading or planner.device.kind != "cuda":
        return {}
    return {"activation_offloading": True, "gradient_checkpointing": True}


def _workspace(config: TrainConfig, planner: Planner) -> Values:
    now = config.head_workspace_mib
    return {"head_workspace_mib": _SMALLEST_WORKSPACE} if now > _SMALLEST_WORKSPACE else {}


def _eight_bits(config: TrainConfig, planner: Planner) -> Values:
    plain = config.optim in ("adamw_torch", "adamw_torch_fused") and not config.optimizer_offload
    return {"optim": "adamw_torch_8bit"} if plain else {}


def _offload_optimizer(config: TrainConfig, planner: Planner) -> Values:
    if config.optimizer_offload or config.use_peft or planner.device.kind != "cuda":
        return {}
    optim = "adamw_torch" if config.optim == "adamw_torch" else "adamw_torch_fused"
    return {"optimizer_offload": True, "optim": optim}


def _lora(config: TrainConfig, planner: Planner) -> Values:
    if config.use_peft:
        return {}
    values: Values = {"use_peft": True, "dtype": "bfloat16"}
    return values | {"optimizer_offload": False, "optimizer_in_backward": False}


def _four_bits(config: TrainConfig, planner: Planner) -> Values:
    return {} if config.load_in_4bit or not config.use_peft else {"load_in_4bit": True}


SWITCHES = (
    Switch("lower max_tokens_per_batch", True, _lower_budget),
    Switch("gradient_checkpointing", True, _checkpoint),
    Switch("layer_tile_tokens", True, _tiles),
    Switch("activation_offloading", True, _offload),
    Switch("lower head_workspace_mib", True, _workspace),
    Switch("8-bit optimizer", False, _eight_bits),
    Switch("optimizer_offload", True, _offload_optimizer),
    Switch("LoRA", False, _lora),
    Switch("4-bit base", False, _four_bits),
)
"""In the order in which they are tried."""


def each_alone(planner: Planner) -> Iterator[tuple[Switch, Prediction]]:
    """Every switch that can be turned on, by itself, and what the run would need with it."""
    for switch in SWITCHES:
        changed = turn_on(switch, planner.config, planner)
        if changed is not None:
            yield switch, planner.predict(changed)


def turn_on(switch: Switch, config: TrainConfig, planner: Planner) -> TrainConfig | None:
    """The configuration with a switch on; None where it is on, changes nothing or cannot go with
    the other keys.
    """
    values = switch.values(config, planner)
    changed = {name: value for name, value in values.items() if getattr(config, name) != value}
    if not changed:
        return None
    try:
        return config.choose(f"memory: {switch.name}", **changed)
    except ConfigError:
        return None


def least(planner: Planner, *, exact: bool, without: Collection[str] = ()) -> Prediction | None:
    """The configuration with the fewest and cheapest switches that fits; None where none does.

    Switches are turned on one after the other until the run fits; then each that is not needed any
    more is turned off again, the dearest last, and the row budget is raised as far as it goes.
    `exact`: only those that keep the numbers; `without`: names of switches to leave alone.
    """
    start = planner.config
    now = planner.predict(start)
    if planner.fits(now):
        return now
    used: list[Switch] = []
    for switch in SWITCHES:
        if (exact and not switch.exact) or switch.name in without:
            continue
        changed = turn_on(switch, now.config, planner)
        if changed is None:
            continue
        used.append(switch)
        now = planner.predict(changed)
        if planner.fits(now):
            return _widest(planner, start, _needed(planner, start, used))
    return None


def strongest(planner: Planner, without: Collection[str] = ()) -> TrainConfig:
    """The configuration with every switch that keeps the numbers."""
    config = planner.config
    for switch in SWITCHES:
        if switch.exact and switch.name not in without:
            config = turn_on(switch, config, planner) or config
    return config


def _needed(planner: Planner, start: TrainConfig, used: list[Switch]) -> TrainConfig:
    """The configuration with only those of the switches without which it would not fit."""
    for switch in list(used[:-1]):
        fewer = [other for other in used if other is not switch]
        config = _all(planner, start, fewer)
        if config is not None and planner.fits(planner.predict(config)):
            used = fewer
    config = _all(planner, start, used)
    assert config is not None
    return config


def _all(planner: Planner, start: TrainConfig, switches: list[Switch]) -> TrainConfig | None:
    config: TrainConfig | None = start
    for switch in switches:
        if config is not None:
            config = turn_on(switch, config, planner)
    return config


def _widest(planner: Planner, start: TrainConfig, config: TrainConfig) -> Prediction:
    """The same with the largest row budget that fits, up to the one at the start."""
    low = planner.predict(config)
    high = planner.predict(start).max_tokens
    if low.max_tokens >= high:
        return low
    while high > low.max_tokens + max(64, low.max_tokens // 16):
        middle = (low.max_tokens + high) // 2
        tried = planner.predict(
            config.choose("memory: lower max_tokens_per_batch", max_tokens_per_batch=middle)
        )
        if planner.fits(tried):
            low = tried
        else:
            high = middle
    return low
