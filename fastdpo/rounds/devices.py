"""Rounds with `devices`: one process samples and judges, and each round's training has processes of
its own, started as `fastdpo train` starts them.
"""

import os
from pathlib import Path

from ..config import TrainConfig
from ..config.rounds import RoundsConfig
from ..errors import FastDPOError
from ..parallel.meeting import refused
from ..training.run import train


def check_alone(config: RoundsConfig) -> None:
    """Raise ConfigError where torchrun has started several processes."""
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count > 1:
        raise refused(
            config.error(
                "devices",
                f"torchrun started {count} processes, and one is enough for all rounds; expected "
                "fastdpo rounds without torchrun, with --devices N for the training",
            )
        )


def train_on_devices(config: TrainConfig, file: Path) -> None:
    """Train in this process, or in `devices` of its own, which read the configuration from `file`.

    Raises:
        FastDPOError: as `train`; of other processes, once they have said what was wrong.
    """
    devices = config.devices or 1
    if devices == 1:
        train(config)
        return
    from ..parallel.launch import launch

    config.save(file)
    if status := launch(["train", str(file)], devices):
        error = FastDPOError(
            f"training on {devices} devices ended with exit code {status}; start the same command "
            "again to go on"
        )
        error.status = status
        raise error
