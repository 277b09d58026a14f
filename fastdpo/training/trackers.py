"""Where metrics go: `metrics.jsonl`, and the services that `report_to` names."""

import importlib.util
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..config import TrainConfig
from ..errors import ConfigError
from ..files import explain, sync, write_text


class Tracker(Protocol):
    """What a metrics service has to offer."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""


class _TensorBoard:
    def __init__(self, output_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.make = partial(SummaryWriter, str(output_dir / "runs"))
        self.writer: Any = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.writer = self.writer or self.make()  # it writes a file when it is made
        for name, value in metrics.items():
            prefix = "" if name.startswith("eval_") else "train/"
            self.writer.add_scalar(prefix + name, value, step)
        self.writer.flush()


class _Run:
    """wandb and trackio share this interface."""

    def __init__(self, module: str, run_name: str | None, config: dict[str, Any]) -> None:
        service = __import__(module)
        self.run = service.init(project="fastdpo", name=run_name, config=config)
        self.service = service

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.service.log(metrics, step=step)


def require_trackers(config: TrainConfig) -> None:
    """Raise ConfigError for a service of `report_to` that is not installed."""
    for name in set(config.report_to) - {"none"}:
        if importlib.util.find_spec(name) is None:
            raise config.error("report_to", f"{name} is not installed")


def make_trackers(
    report_to: Iterable[str], output_dir: Path, run_name: str | None, config: dict[str, Any]
) -> list[Tracker]:
    """The services that `report_to` names. ConfigError for one that is not installed."""
    trackers: list[Tracker] = []
    for name in report_to:
        if name == "none":
            continue
        try:
            if name == "tensorboard":
                trackers.append(_TensorBoard(output_dir))
            else:
                trackers.append(_Run(name, run_name, config))
        except ImportError as error:
            raise ConfigError(f"report_to: {name} is not installed ({error})") from error
    return trackers


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line; what is written before `open` waits for it. Of
    several processes one `writes`.
    """

    def __init__(
        self, path: Path, trackers: list[Tracker], resumed_step: int | None, writes: bool = True
    ) -> None:
        self.path, self.trackers, self.writes = path, trackers, writes
        self._waiting: list[tuple[dict[str, float], int]] | None = []
        self._kept: list[str] = []
        if resumed_step is not None and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            self._kept = [line for line in lines if _step(line) <= resumed_step]

    def last(self) -> dict[str, float]:
        """The last value of every metric in the lines that a resumed run keeps."""
        found: dict[str, float] = {}
        for line in self._kept:
            found |= json.loads(line)
        found.pop("step", None)
        return found

    def open(self) -> None:
        """Start the file; a resumed run keeps the lines of the steps that it does not repeat."""
        if self._waiting is None or not self.writes:
            return
        write_text(self.path, "".join(line + "\n" for line in self._kept))
        self._kept = []
        waiting, self._waiting = self._waiting, None
        for metrics, step in waiting:
            self.write(metrics, step)

    def write(self, metrics: dict[str, float], step: int) -> None:
        """Append the metrics of a step and hand them to the trackers."""
        if not self.writes:
            return
        if self._waiting is not None:
            self._waiting.append((metrics, step))
            return
        with explain(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def sync(self) -> None:
        """Bring every line to the disk, where a checkpoint of their steps is about to be."""
        if not self.writes:
            return
        with explain(self.path):
            sync(self.path)


def _step(line: str) -> float:
    """Of a line of metrics; infinite where it is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return float("inf")
