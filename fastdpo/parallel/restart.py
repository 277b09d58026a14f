"""What outlives processes that torchrun starts again: its store."""

from pathlib import Path

from ..config import TrainConfig
from .meeting import agent_holds_store, open_store

_SECONDS = 60.0

RESTART = "torchrun's restart"
"""Where the keys come from that such a run is given."""


def is_restart(config: TrainConfig) -> bool:
    """Whether the run goes on with what an earlier attempt of it has left."""
    return config.origins.get("resume_from_checkpoint") == RESTART


def mark_begun(output_dir: str) -> None:
    """Let later attempts know that what lies in the output directory is this run's."""
    if agent_holds_store():
        open_store(_SECONDS).set(_key(output_dir), "1")


def had_begun(output_dir: str) -> bool:
    """Whether an earlier attempt has called `mark_begun`."""
    return agent_holds_store() and bool(open_store(_SECONDS).check([_key(output_dir)]))


def _key(output_dir: str) -> str:
    return f"fastdpo/begun/{Path(output_dir).expanduser().absolute()}"
