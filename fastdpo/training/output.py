"""The output directory: who may write there, from when on, and what of an earlier run is removed.

A run holds the directory's lock. It changes nothing until its first step has been taken, so
whatever is wrong with configuration, data or model costs no file of an earlier run.
`trainer_state.json` names the files that a run wrote and says whether it is finished; nothing else
is ever removed.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import files
from ..config import TrainConfig
from ..errors import CheckpointError, ConfigError, some
from ..model.place import find_model
from ..model.save import whole_state
from ..parallel.restart import is_restart
from ..parallel.world import ALONE, World
from . import checkpoint
from .changes import deciding

STATE = "trainer_state.json"
CONFIG = "training_config.yaml"
METRICS = "metrics.jsonl"
TRACE = "trace.json"
_LOGS = (STATE, CONFIG, METRICS, TRACE)
_WEIGHTS = ".safetensors"
_WRITTEN = (
    *_LOGS,
    "README.md",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "token*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
    "*.model",
)
"""What a run writes, checkpoints apart: a directory that holds any of it belongs to somebody."""


class Output:
    """The output directory of the run that holds its lock."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config = path, config
        self._state = _read(path / STATE)
        self._begun = False
        self._place = _place(path)
        _check(path, config, set(self._files))

    @property
    def finished(self) -> bool:
        """Whether the run that wrote there reached its last step, and all it saved is there."""
        return bool(self._state.get("finished")) and not self._lost()

    @property
    def step(self) -> int:
        """The last step of the run that wrote there."""
        return int(self._state.get("step", 0))

    @property
    def _files(self) -> list[str]:
        return self._state.get("files", [])

    def _lost(self) -> list[str]:
        """What that run saved and is not there any more."""
        return [name for name in self._files if not (self.path / name).exists()]

    def holds_this_run(self) -> bool:
        """Whether a finished run wrote there whose configuration decided the same weights."""
        return self.finished and self._state.get("config") == deciding(self.config)

    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from; None for a new run.

        Raises:
            CheckpointError: there are checkpoints and none is whole, or a finished model without
                any.
        """
        wanted = self.config.resume_from_checkpoint
        if wanted is not True:
            return Path(wanted).expanduser() if wanted else None
        newest = checkpoint.find_checkpoint(self.path)
        if newest is None and self._state.get("finished"):
            lost = self._lost()
            lacks = f", lacks {some(lost)}" if lost else ""
            raise CheckpointError(
                f"resume_from_checkpoint: the run in {self.path} is finished (step {self.step})"
                f"{lacks} and holds no checkpoint to go on from; choose another output_dir"
            )
        return newest

    def require(self) -> None:
        """Raise ConfigError if the directory was moved or replaced: the lock went with it, and what
        lies there now may be another run's.
        """
        if _place(self.path) != self._place:
            raise ConfigError(
                f"output_dir: {self.path} was moved, removed or replaced while a run was writing "
                "to it; nothing more is written"
            )

    def begin(self, config: TrainConfig) -> None:
        """Make the directory this run's, now that its first step has been taken."""
        if self._begun:
            return
        self.require()
        with files.explain(self.path):
            files.remove_leftovers(self.path)
            earlier = set(self._files)
            # First of all: where nothing can be written, nothing is removed either.
            self._record(False, 0, {*earlier, *_LOGS})
            if config.overwrite_output_dir:
                for path in checkpoint.checkpoints(self.path):
                    checkpoint.remove(path)
                files.remove(earlier - {STATE}, self.path)
                self._record(False, 0, set(_LOGS))
        self._begun = True
        self.save_config(config)

    def save_config(self, config: TrainConfig) -> None:
        """Write the configuration as it is now."""
        if self._begun:
            files.write_text(self.path / CONFIG, config.to_yaml())

    def finish(self, config: TrainConfig, step: int, model: Any, tokenizer: Any, card: str) -> None:
        """Save the trained model and its card; files of an earlier model that it lacks go. Where
        ranks hold shares of the model, each of them has to call it.

        Earlier weights go first and new ones come last, the index of shards after them: at no
        moment can what lies there be loaded as a mixture of two models.
        """
        self.begin(config)
        self.require()
        earlier, weights = set(self._files), whole_state(model)
        with files.explain(self.path):
            with files.temporary_directory(self.path / "model") as made:
                checkpoint.save_model(made, model, tokenizer, weights)
                (made / "README.md").write_text(card, encoding="utf-8")
                files.flush(made)
                names = set(files.names_below(made))
                self._record(False, step, earlier | names)
                files.remove({name for name in earlier if _WEIGHTS in name}, self.path)
                files.move(sorted(names, key=_weights_last), made, self.path)
            files.remove(earlier - names - set(_LOGS), self.path)
            logs = {name for name in _LOGS if (self.path / name).exists()}
            self._record(True, step, names | logs)

    def _record(self, finished: bool, step: int, names: set[str]) -> None:
        config = deciding(self.config)
        self._state = {"finished": finished, "step": step, "files": sorted(names), "config": config}
        files.write_text(self.path / STATE, json.dumps(self._state, indent=1))


class SeenOutput(Output):
    """The output directory as a process sees it that writes nothing there: what the one that does
    has found.
    """

    def __init__(
        self, path: Path, config: TrainConfig, state: dict[str, Any], start: Path | None
    ) -> None:
        self.path, self.config = path, config
        self._state, self._start = state, start

    @property
    def finished(self) -> bool:
        return bool(self._state["finished"])

    def checkpoint(self) -> Path | None:
        return self._start

    def require(self) -> None: ...

    def begin(self, config: TrainConfig) -> None: ...

    def save_config(self, config: TrainConfig) -> None: ...

    def finish(self, config: TrainConfig, step: int, model: Any, tokenizer: Any, card: str) -> None:
        whole_state(model)


def _weights_last(name: str) -> tuple[bool, bool, str]:
    return _WEIGHTS in name, name.endswith(".json"), name


@contextmanager
def claim(config: TrainConfig, world: World = ALONE) -> Iterator[Output]:
    """The output directory: the first rank's to write, `SeenOutput` for the others.

    Raises:
        ConfigError: see `_claimed`.
        CheckpointError: see `Output.checkpoint`.
    """
    if not world.first:
        path, state, start = world.share(None)
        yield SeenOutput(path, config, state, start)
        return
    with _claimed(config) as output:
        if world.size > 1:
            state = {**output._state, "finished": output.finished}
            world.share((output.path, state, output.checkpoint()))
        yield output


@contextmanager
def _claimed(config: TrainConfig) -> Iterator[Output]:
    """The output directory, locked for this run; one that was made for it goes with an early error.

    Raises:
        ConfigError: it cannot be made or written, another process has it, or it holds something
            that this run would write over without being told to.
    """
    path = Path(config.output_dir).expanduser()
    made = _make(path)
    try:
        with files.locked(path):
            try:
                yield Output(path, config)
            finally:
                for folder in reversed(made):
                    with suppress(OSError):  # not empty
                        folder.rmdir()
    except BlockingIOError as error:
        raise ConfigError(
            f"output_dir: another run is writing to {path}; wait until it ends, or choose another "
            "directory"
        ) from error


def _make(path: Path) -> list[Path]:
    """Make the directory; returns those that were not there, outermost first."""
    made = [p for p in (*reversed(path.parents), path) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise ConfigError(f"output_dir: {path} cannot be made ({problem})") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir: {path} cannot be written to")
    return made


def _place(path: Path) -> tuple[int, int] | None:
    """Which directory a path leads to, None where it leads nowhere."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read(file: Path) -> dict[str, Any]:
    state = files.read_json(file)
    known = isinstance(state, dict) and files.are_inside(state.get("files"))
    return state if known and isinstance(state.get("step"), int) else {}


def _check(path: Path, config: TrainConfig, ours: set[str]) -> None:
    """Raise ConfigError if this run would write over what it was not told to write over."""
    held = {file.name for pattern in _WRITTEN for file in path.glob(pattern)}
    saved = checkpoint.checkpoints(path)
    strange = sorted(held - ours)
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
