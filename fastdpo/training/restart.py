"""Going on by itself where torchrun has started the processes again (`--max-restarts`)."""

import logging
from pathlib import Path

from ..config import TrainConfig
from ..errors import CheckpointError
from ..parallel.meeting import attempt
from ..parallel.restart import RESTART, had_begun
from ..parallel.world import World
from .checkpoint import find_checkpoint

logger = logging.getLogger(__name__)


def restarted(config: TrainConfig, world: World) -> TrainConfig:
    """The configuration that goes on with what earlier attempts of this run have saved; as it is
    where none of them came to its first step.
    """
    # torchrun counts on each host, and only what ended there.
    again = any(world.gather_all(attempt() > 0))
    if not world.share(again and world.first and had_begun(config.output_dir)):
        return config
    start = world.share(_start(config) if world.first else None)
    if world.first:
        logger.info(f"restarted by torchrun: going on in {config.output_dir}")
    return config.choose(RESTART, resume_from_checkpoint=start, overwrite_output_dir=False)


def _start(config: TrainConfig) -> bool | str:
    """True for the newest checkpoint; where the dead attempt has saved none, what it began with."""
    named = config.resume_from_checkpoint
    if not isinstance(named, str):
        return True
    try:
        saved = find_checkpoint(Path(config.output_dir).expanduser())
    except CheckpointError:
        saved = None
    return named if saved is None else True
