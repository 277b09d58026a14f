"""What lies in an output directory already, and whether a run may write over it."""

from collections.abc import Collection, Iterable
from pathlib import Path

from .. import files
from ..config import TrainConfig
from ..errors import ConfigError, some
from ..model.place import find_model
from ..parallel.restart import is_restart
from . import checkpoint


def check_output(
    path: Path, config: TrainConfig, ours: Collection[str], written: Iterable[str]
) -> None:
    """Raise ConfigError if this run would write over what it was not told to write over.

    Args:
        ours: the files there that an earlier run wrote.
        written: patterns of what a run writes, checkpoints apart: a directory that holds any of it
            belongs to somebody.
    """
    held = {file.name for pattern in written for file in path.glob(pattern)}
    saved = checkpoint.checkpoints(path)
    strange = sorted(held - set(ours))
    if config.overwrite_output_dir:
        _refuse_sources(path, config)
        strange += [p.name for p in saved if not _is_ours(p)]
    elif not config.resume_from_checkpoint:
        if ours or saved:
            raise ConfigError(
                f"output_dir: {path} holds another run; choose another one, or set "
                "overwrite_output_dir or resume_from_checkpoint"
            )
    else:
        _refuse_sources(path, config)
        if config.resume_from_checkpoint is not True:
            used = bool(ours or saved) and not is_restart(config)
            _check_branch(path, Path(config.resume_from_checkpoint), saved, used)
        strange += [p.name for p in saved if not (_is_ours(p.resolve()) or _was_ours(p))]
    if strange:
        raise ConfigError(
            f"output_dir: {path} holds {some(strange)}, which no run of fastdpo wrote there; "
            "choose another directory"
        )


def _is_ours(path: Path) -> bool:
    """Whether a run wrote this checkpoint; a kill may have left it empty."""
    if path.is_symlink():
        return False
    return (path / checkpoint.MANIFEST).exists() or (path.is_dir() and not any(path.iterdir()))


def _was_ours(path: Path) -> bool:
    """Whether a checkpoint without its manifest is a run's that was damaged."""
    state = files.read_json(path / checkpoint.STATE)
    return isinstance(state, dict) and "pending" in state


def _check_branch(path: Path, wanted: Path, saved: list[Path], used: bool) -> None:
    """A named checkpoint goes on in its own directory, from its end, or in a new one."""
    wanted = wanted.expanduser().resolve()
    inside = wanted.parent == path.resolve()
    if used and not inside:
        raise ConfigError(
            f"output_dir: {path} holds another run than {wanted}; choose another directory, or set "
            "resume_from_checkpoint: true to go on with the run that is there"
        )
    places = [p.resolve() for p in saved]
    newer = places[places.index(wanted) + 1 :] if wanted in places else []
    if newer:
        raise ConfigError(
            f"resume_from_checkpoint: {path} holds {some([p.name for p in newer])} after "
            f"{wanted.name}; choose another output_dir to go on from there, or true for the newest"
        )


def _refuse_sources(path: Path, config: TrainConfig) -> None:
    """Raise ConfigError if a model that the run loads lies where the run is to write."""
    path = path.resolve()
    for key in ("model_name_or_path", "ref_model_name_or_path"):
        source = Path(getattr(config, key) or "").expanduser()
        if getattr(config, key) is None or not source.exists():
            continue
        places = [source, Path(find_model(config, str(source)).name)]  # and the base of an adapter
        if source.is_dir():
            places += source.iterdir()  # they may be links
        for place in places:
            resolved = place.resolve()
            inside = place.exists() and resolved.is_relative_to(path)
            if inside and (config.overwrite_output_dir or _is_written(resolved, path)):
                raise ConfigError(
                    f"output_dir: {key} {place} lies in {path}, which this run writes over; choose "
                    "another output_dir"
                )


def _is_written(place: Path, path: Path) -> bool:
    """Whether a run in `path` writes or rotates what lies at `place`."""
    parts = place.relative_to(path).parts
    return not parts or parts[0] in {p.name for p in checkpoint.checkpoints(path)}
