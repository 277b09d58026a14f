"""`memory: auto`: at start-up, the least that makes a run fit its device."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from ..config import TrainConfig
from ..config.values import show
from ..data.dataset import Data
from ..devices import GIB, at_hand
from .parallel import choose_spread
from .planner import Planner
from .report import changes
from .spread import ONE, Spread
from .switches import each_alone, least, strongest

logger = logging.getLogger(__name__)

REASON = "memory: auto"


def fit(
    config: TrainConfig,
    data: Data,
    model_config: Any,
    device: torch.device,
    autocast: torch.dtype | None,
    spread: Spread = ONE,
) -> TrainConfig:
    """The configuration with what its device's free memory asks for; one line about each change.

    It begins without recomputed layers, unless the configuration gives `gradient_checkpointing`,
    and with what else the configuration gives; nothing that changes the numbers is turned on.
    Where nothing fits, it takes all there is and says so.
    """
    start = config
    if "gradient_checkpointing" not in config.origins and not config.activation_offloading:
        start = config.choose(REASON, gradient_checkpointing=False)
    planner = Planner(start, data, at_hand(device), autocast, model_config, spread=spread)
    prediction = least(planner, exact=True, without=_missing())
    if prediction is None:
        prediction = planner.predict(strongest(planner, without=_missing()))
        logger.warning(
            "memory: auto: the run is predicted not to fit, with everything on; trying all the same"
        )
    peak, budget = prediction.estimate.peak / GIB, planner.device.budget / GIB
    logger.info(f"memory: auto: peak {peak:.2f} GiB predicted, {budget:.2f} GiB are free")
    changed = changes(config, prediction.config)
    for name, value in changed.items():
        logger.info(f"memory: auto: {name} {show(value)}")
    return config.choose(REASON, **changed) if changed else config


def spread_for(
    config: TrainConfig,
    data: Data,
    model_config: Any,
    device: torch.device,
    autocast: torch.dtype | None,
    *,
    devices: int,
    local: int,
) -> Spread:
    """How a run lies over so many devices, `local` of them on each host, by the memory that is free
    on this one: one rank asks, and tells the others.

    Raises:
        ConfigError: devices that do not divide as the configuration says, or keys that cannot be
            honoured there.
    """
    planner = Planner(config, data, at_hand(device), autocast, model_config)
    return choose_spread(planner, devices, local)


def _missing() -> set[str]:
    """Switches whose library is not installed."""
    return set() if importlib.util.find_spec("torchao") else {"optimizer_offload"}


def advice(planner: Planner) -> str:
    """Which switches would help after an out-of-memory error, with the peaks that they lead to."""
    now = planner.predict(planner.config)
    helpful = []
    for switch, other in each_alone(planner):
        if other.estimate.peak < 0.98 * now.estimate.peak:
            keys = changes(now.config, other.config).items()
            flags = " ".join(f"--{name} {show(value)}" for name, value in keys)
            note = "" if switch.exact else ", other numbers"
            helpful.append(f"{flags} ({other.estimate.peak / GIB:.2f} GiB{note})")
    peak = f"a peak of {now.estimate.peak / GIB:.2f} GiB is predicted"
    if not helpful:
        return f"{peak}, and no key would lower it"
    return f"{peak}; less would need: {'; '.join(helpful)}; or --memory auto"
