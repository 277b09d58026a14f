"""Where metrics go: `metrics.jsonl`, and on to trackers, which may fail."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ..errors import one_line
from ..files import explain, sync, write_text

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a metrics service has to offer."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""

    def close(self, failed: bool) -> None:
        """End the run there, as one that failed or not."""


class Guarded:
    """A tracker that costs the run nothing: with its first error it is off, and that is said."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.failed = False

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step, unless an earlier one could not be sent."""
        self._try(lambda: self.tracker.log(metrics, step), "gets no more metrics")

    def close(self, failed: bool) -> None:
        """End the run there."""
        self._try(lambda: self.tracker.close(failed), "has not ended the run")

    def _try(self, function: Callable[[], None], result: str) -> None:
        if self.failed:
            return
        try:
            function()
        except Exception as error:  # of any library
            self.failed = True
            logger.warning(
                f"report_to: {self.name} {result} ({one_line(error)}); metrics.jsonl has them all"
            )


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line; what is written before `open` waits for it. Of
    several processes one `writes`.
    """

    def __init__(
        self, path: Path, trackers: Sequence[Tracker], resumed_step: int | None, writes: bool = True
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

    def close(self) -> None:
        """End the trackers' runs; as failed ones where an error is on its way."""
        for tracker in self.trackers:
            tracker.close(failed=sys.exc_info()[0] is not None)

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
