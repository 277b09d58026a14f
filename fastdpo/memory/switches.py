"""What makes a run smaller, from cheap to dear, and the least of it that fits a device.

A switch that is exact changes memory and time and no number beyond rounding; `memory: auto` and the
handling of an out-of-memory error use those alone. The others change what is computed: a plan names
them, and turning them on is up to the user. Each goes step by step: asked again, it gives the next
smaller values, until nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig
from ..config.optimizer import OFFLOADED
from ..errors import ConfigError
from .planner import Planner, Prediction

Values = dict[str, Any]
_LARGEST_TILE, _SMALLEST_TILE, _MOST_TILES, _SMALLEST_WORKSPACE = 4096, 256, 16, 64


@dataclass(frozen=True)
class Demand:
    """What the rows of a run are on its device."""

    device: str
    """"cuda" or "cpu"."""
    largest: int
    """Tokens of the largest row."""
    longest: int
    """Tokens of the longest unit of the loss, below which no row budget makes a row shorter."""
    workspace_mib: int
    """Of the head, where the configuration does not say."""


@dataclass(frozen=True)
class Switch:
    """A change of keys: their next values, {} where nothing is left to change."""

    name: str
    exact: bool
    """Whether the run's numbers stay the same, rounding apart."""
    while_training: bool
    """Whether a running model can be changed like that."""
    values: Callable[[TrainConfig, Demand], Values]

    @property
    def origin(self) -> str:
        """The origin of the keys that it changed."""
        return f"memory: {self.name}"


def _lower_budget(config: TrainConfig, demand: Demand) -> Values:
    # With optimizer_in_backward a step is one row.
    if demand.largest <= demand.longest or config.optimizer_in_backward:
        return {}
    return {"max_tokens_per_batch": max(demand.longest, demand.largest // 2)}


def _checkpoint(config: TrainConfig, demand: Demand) -> Values:
    return {"gradient_checkpointing": True, "gradient_checkpointing_every": 1}


def _tiles(config: TrainConfig, demand: Demand) -> Values:
    tokens = min(_LARGEST_TILE, (config.layer_tile_tokens or demand.largest) // 2)
    smallest = max(_SMALLEST_TILE, demand.largest // _MOST_TILES)
    return {} if tokens < smallest else {"layer_tile_tokens": tokens}


def _offload(config: TrainConfig, demand: Demand) -> Values:
    if demand.device != "cuda":
        return {}
    return {"activation_offloading": True, "gradient_checkpointing": True}


def _workspace(config: TrainConfig, demand: Demand) -> Values:
    now = config.head_workspace_mib or demand.workspace_mib
    return {"head_workspace_mib": min(now, max(_SMALLEST_WORKSPACE, now // 4))}


def _eight_bits(config: TrainConfig, demand: Demand) -> Values:
    plain = config.optim in ("adamw_torch", "adamw_torch_fused") and not config.optimizer_offload
    return {"optim": "adamw_torch_8bit"} if plain else {}


def _offload_optimizer(config: TrainConfig, demand: Demand) -> Values:
    if config.use_peft or demand.device != "cuda" or config.optim not in OFFLOADED:
        return {}
    return {"optimizer_offload": True}


def _lora(config: TrainConfig, demand: Demand) -> Values:
    values: Values = {} if config.use_peft else {"use_peft": True, "dtype": "bfloat16"}
    return values and values | {"optimizer_offload": False, "optimizer_in_backward": False}


def _four_bits(config: TrainConfig, demand: Demand) -> Values:
    return {"load_in_4bit": True} if config.use_peft else {}


SWITCHES = (
    Switch("lower max_tokens_per_batch", True, True, _lower_budget),
    Switch("gradient_checkpointing", True, True, _checkpoint),
    Switch("layer_tile_tokens", True, True, _tiles),
    Switch("activation_offloading", True, True, _offload),
    Switch("lower head_workspace_mib", True, True, _workspace),
    Switch("8-bit optimizer", False, False, _eight_bits),
    Switch("optimizer_offload", True, False, _offload_optimizer),
    Switch("LoRA", False, False, _lora),
    Switch("4-bit base", False, False, _four_bits),
)
"""In the order in which they are tried."""


def turn_on(switch: Switch, config: TrainConfig, demand: Demand) -> TrainConfig | None:
    """The configuration one step of a switch further; None where nothing is left to change or it
    cannot go with the other keys.
    """
    values = switch.values(config, demand)
    changed = {name: value for name, value in values.items() if getattr(config, name) != value}
    if not changed:
        return None
    try:
        return config.choose(switch.origin, **changed)
    except ConfigError:
        return None


def turn_up(switch: Switch, config: TrainConfig, planner: Planner) -> TrainConfig:
    """The configuration with a switch as far on as it goes."""
    while (further := turn_on(switch, config, demand(config, planner))) is not None:
        config = further
    return config


def demand(config: TrainConfig, planner: Planner) -> Demand:
    """The rows of a configuration on the planner's device."""
    largest = max(row.tokens for step in planner.steps(config) for row in step)
    device = planner.device
    return Demand(device.kind, largest, planner.longest, device.workspace_mib)


def possible(planner: Planner) -> tuple[Switch, ...]:
    """The switches that go with the planner's devices."""
    many, shards = planner.spread.devices > 1, planner.spread.shards > 1
    without = {"optimizer_offload"} if many else set()
    without |= {"4-bit base"} if shards else set()
    return tuple(switch for switch in SWITCHES if switch.name not in without)


def each_alone(planner: Planner) -> Iterator[tuple[Switch, Prediction]]:
    """Every switch that can be turned on, by itself and as far as it goes, and what the run would
    need with it.
    """
    for switch in possible(planner):
        changed = turn_up(switch, planner.config, planner)
        if changed is not planner.config:
            yield switch, planner.predict(changed)


def least(planner: Planner, *, exact: bool, without: Collection[str] = ()) -> Prediction | None:
    """The configuration with the fewest and cheapest switches that fits; None where none does.

    Switches are turned up one after the other until the run fits; then each that is not needed any
    more is turned off again, the dearest last, and the row budget is raised as far as it goes.
    `exact`: only those that keep the numbers; `without`: names of switches to leave alone.
    """
    start = planner.config
    now = planner.predict(start)
    if planner.fits(now):
        return now
    used: list[Switch] = []
    for switch in possible(planner):
        if (exact and not switch.exact) or switch.name in without:
            continue
        furthest = turn_up(switch, now.config, planner)
        if furthest is now.config:
            continue
        used.append(switch)
        last = planner.predict(furthest)
        if planner.fits(last):
            found = _first_that_fits(switch, now.config, planner)
            return _widest(planner, start, _needed(planner, start, found, used))
        now = last
    return None


def _first_that_fits(switch: Switch, config: TrainConfig, planner: Planner) -> TrainConfig:
    """The configuration with a switch no further on than it has to be."""
    while not planner.fits(planner.predict(config)):
        further = turn_on(switch, config, demand(config, planner))
        assert further is not None
        config = further
    return config


def strongest(planner: Planner, without: Collection[str] = ()) -> TrainConfig:
    """The configuration with every switch that keeps the numbers."""
    config = planner.config
    for switch in possible(planner):
        if switch.exact and switch.name not in without:
            config = turn_up(switch, config, planner)
    return config


def _needed(
    planner: Planner, start: TrainConfig, config: TrainConfig, used: Sequence[Switch]
) -> TrainConfig:
    """The configuration without those of the switches without which it fits too."""
    for switch in used[:-1]:
        keys = [name for name, origin in config.origins.items() if origin == switch.origin]
        try:
            fewer = config.choose("", **{name: getattr(start, name) for name in keys})
        except ConfigError:  # another switch needs what this one turned on
            continue
        if planner.fits(planner.predict(fewer)):
            config = fewer
    return config


def _widest(planner: Planner, start: TrainConfig, config: TrainConfig) -> Prediction:
    """The same with the largest row budget that fits, up to the one at the start."""
    low = planner.predict(config)
    high = planner.predict(start).max_tokens
    if low.max_tokens >= high:
        return low
    while high > low.max_tokens + max(64, low.max_tokens // 16):
        middle = (low.max_tokens + high) // 2
        tried = planner.predict(config.choose("", max_tokens_per_batch=middle))
        if planner.fits(tried):
            low = tried
        else:
            high = middle
    return low
