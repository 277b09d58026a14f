"""Which of replicate, fsdp and hsdp a run takes, and what it gains from more devices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import TrainConfig
from ..devices import GIB
from ..errors import ConfigError
from .planner import Planner, Prediction
from .spread import ONE, TIED, Spread, cannot_shard, spread_of

MOST = 1024
"""Devices up to which a plan looks."""


def choose_data_parallel(planner: Planner, devices: int, local: int) -> tuple[str, str]:
    """What `data_parallel: auto` is: the least exchange that fits.

    The whole model on each device where that fits; else shares of it within a host (fsdp on one
    host, hsdp with a whole model on each of several); else shares over all devices.

    Args:
        planner: predicts the run. Every rank has to ask about the same device, or one for all.
        devices: how many there are.
        local: how many of them are on a host.

    Returns:
        "replicate", "fsdp" or "hsdp", and the reason.

    Raises:
        ConfigError: keys that cannot go with so many devices.
    """
    if devices == 1:
        return "replicate", "there is one device"
    for key, why in cannot_shard(planner.config):
        return "replicate", f"{key}: {why}"
    budget = f"{planner.device.budget / GIB:.2f} GiB"
    if planner.config.head_parallel == "vocabulary":
        need = "head_parallel vocabulary goes with shares"
    else:
        whole = _predicted(planner, devices, local, "replicate")
        if planner.fits(whole):
            return "replicate", f"the whole model fits: {_peak(whole)} of {budget} on each device"
        need = f"the whole model needs {_peak(whole)} of {budget} on each device"
    if devices > local > 1:
        within = _predicted(planner, devices, local, "hsdp")
        if planner.fits(within):
            return "hsdp", f"{need}, shares of one host {_peak(within)}"
    shares = _predicted(planner, devices, local, "fsdp")
    enough = "" if planner.fits(shares) else ", which is too much as well"
    return "fsdp", f"{need}, shares of all {_peak(shares)}{enough}"


def choose_spread(planner: Planner, devices: int, local: int) -> Spread:
    """The spread that a run over so many devices takes, the head's included.

    Raises:
        ConfigError: devices that do not divide as the configuration says, or keys that cannot be
            honoured there.
    """
    config, reason = planner.config, ""
    name = config.data_parallel
    if name == "auto":
        name, reason = choose_data_parallel(planner, devices, local)
    spread = replace(spread_of(config, devices, local, name), reason=reason)
    if spread.vocabulary and planner.run(config).model.tied:
        raise config.error("head_parallel", TIED)
    if config.head_parallel == "auto" and spread.shards > 1 and not planner.run(config).model.tied:
        sharded = replace(spread, vocabulary=True)
        gathered, apart = (planner.over(one).predict(config) for one in (spread, sharded))
        if not planner.fits(gathered) and planner.fits(apart):
            return sharded
    return spread


def _predicted(planner: Planner, devices: int, local: int, name: str) -> Prediction:
    spread = spread_of(planner.config, devices, local, name)
    return planner.over(spread).predict(planner.config)


def _peak(prediction: Prediction) -> str:
    return f"{prediction.estimate.peak / GIB:.2f} GiB"


@dataclass(frozen=True)
class Scaled:
    """A run over so many devices, each with as much to do."""

    spread: Spread
    prediction: Prediction
    fits: bool
    efficiency: float | None
    """The share of a step in which a device computes; None where times are not known."""


def scaling(planner: Planner, local: int) -> list[Scaled]:
    """One device, the devices of a host, and several hosts, up to `MOST` devices.

    The batch grows with the devices (weak scaling), also where `global_batch_size` sets one: that
    of the planner's own devices is divided by them.
    """
    ranks = planner.spread.ranks
    config = _with_units_of_a_rank(planner.config, ranks)
    planner = replace(planner, config=config)
    rows = []
    for devices in _ladder(planner.spread.devices, local):
        try:
            spread = ONE if devices == 1 else choose_spread(planner, devices, min(local, devices))
        except ConfigError:  # does not divide as cp_size and dp_replicate_size say
            continue
        here = planner.over(spread)
        prediction = here.predict(config)
        seconds, efficiency = prediction.seconds, None
        if seconds is not None:
            efficiency = 1 - seconds.waits / seconds.total
        rows.append(Scaled(spread, prediction, here.fits(prediction), efficiency))
    return rows


def _with_units_of_a_rank(config: TrainConfig, ranks: int) -> TrainConfig:
    if config.global_batch_size is None:
        return config
    units = max(1, config.global_batch_size // ranks)
    return config.choose(
        "plan",
        global_batch_size=None,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=units,
    )


def _ladder(devices: int, local: int) -> list[int]:
    """1, the devices of a host, those of 2, 8, 32 ... hosts, the most, and those that are there."""
    hosts = (1, 2, 8, 32, 128, 512, MOST // local)
    most = max(MOST, devices)
    return sorted({1, devices, *(local * count for count in hosts if 1 <= local * count <= most)})
