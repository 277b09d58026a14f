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
from ..model.save import whole_state
from ..parallel.world import ALONE, World
from ..report.runs import CHECKS, FACTS, REPORT
from . import checkpoint
from .changes import deciding, stopping
from .occupied import check_output

STATE = "trainer_state.json"
CONFIG = "training_config.yaml"
METRICS = "metrics.jsonl"
TRACE = "trace.json"
_LOGS = (STATE, CONFIG, METRICS, TRACE, CHECKS, FACTS, REPORT)
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
"""What a run writes, checkpoints apart."""


class Output:
    """The output directory of the run that holds its lock.

    Attributes:
        path: of the directory.
        config: of the run.
        checks: what was found in its data, to be written with the rest; None where nothing is.
    """

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config = path, config
        self.checks: dict[str, Any] | None = None
        self._state = _read(path / STATE)
        self._begun = False
        self._place = _place(path)
        check_output(path, config, self._files, _WRITTEN)

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
        same = self._state.get("config") == deciding(self.config)
        stopped = self._state.get("stopped")
        return self.finished and same and stopped in (None, stopping(self.config))

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
        if self.checks is not None:
            files.write_text(self.path / CHECKS, json.dumps(self.checks))

    def save_config(self, config: TrainConfig) -> None:
        """Write the configuration as it is now."""
        if self._begun:
            files.write_text(self.path / CONFIG, config.to_yaml())

    def finish(
        self,
        config: TrainConfig,
        step: int,
        model: Any,
        tokenizer: Any,
        card: str,
        stopped: bool = False,
    ) -> None:
        """Save the trained model and its card; files of an earlier model that it lacks go. Where
        ranks hold shares of the model, each of them has to call it. A run that was `stopped` before
        its last step is finished as long as the keys are the same that stopped it.

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
            self._record(True, step, names | logs, stopped)

    def _record(self, finished: bool, step: int, names: set[str], stopped: bool = False) -> None:
        config = deciding(self.config)
        self._state = {"finished": finished, "step": step, "files": sorted(names), "config": config}
        if stopped:
            self._state["stopped"] = stopping(self.config)
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

    def finish(
        self,
        config: TrainConfig,
        step: int,
        model: Any,
        tokenizer: Any,
        card: str,
        stopped: bool = False,
    ) -> None:
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
