"""What lies in an output directory, read for people to look at. Damaged parts are left out."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import files
from ..config import TrainConfig
from ..config.declare import default_of
from ..config.values import show
from ..errors import ConfigError
from .curves import Curve

CONFIG = "training_config.yaml"
METRICS = "metrics.jsonl"
STATE = "trainer_state.json"
CHECKS = "data_checks.json"
FACTS = "report.json"
REPORT = "report.html"

_PLACES = ("output_dir", "reference_cache_dir", "overwrite_output_dir", "resume_from_checkpoint")
"""Keys that say where things are, which differ between any two runs."""
_SECRET = ("hub_token",)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: what it is called on a page.
        path: its output directory.
        rows: the lines of its metrics.jsonl, in order; values are numbers, each has a "step".
        config: every key and its value.
        facts: `report.json`.
        checks: `data_checks.json`.
        finished: whether the run reached its end and saved its model.
        live: whether the run itself is writing the page, and goes on.
        lost: metrics that were no number in the end, and the step since which.
        unread: files of it that cannot be read.
    """

    name: str
    path: Path
    rows: list[dict[str, float]]
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    live: bool = False
    lost: dict[str, float] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The last step with a line of metrics."""
        return int(max((row["step"] for row in self.rows), default=0))

    @property
    def total_steps(self) -> int | None:
        """How many steps the run was to take; None where it is not known."""
        total = self.facts.get("total_steps")
        return total if isinstance(total, int) and total > 0 else None

    def curve(self, name: str) -> Curve:
        """A metric by steps; empty where it was never logged."""
        return Curve([(row["step"], row[name]) for row in self.rows if name in row])

    def last(self, name: str) -> float | None:
        """The last value of a metric; None where it was never logged, or is no number."""
        curve = self.curve(name)
        if name in self.lost:
            return None
        return curve.values[-1] if curve else None

    def changed(self) -> dict[str, tuple[str, str]]:
        """The value and the default, as text, of every key that differs from its default."""
        found = {}
        for name, declared in TrainConfig.key_fields().items():
            default = default_of(declared)
            if name in self.config and name not in _SECRET and self.config[name] != default:
                found[name] = (shown(self.config[name]), shown(default))
        return found


def shown(value: Any) -> str:
    """The value of a key as text."""
    return "unset" if value is None else show(value)


def read_run(path: Path, name: str | None = None, live: bool = False) -> Run:
    """The run that wrote to a directory.

    Raises:
        ConfigError: it is not a directory, or holds no run.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such directory; expected a run's output_dir")
    if not (path / METRICS).is_file():
        raise ConfigError(
            f"{path}: holds no {METRICS}, so no run of fastdpo; expected a run's output_dir"
        )
    state = as_object(files.read_json(path / STATE))
    lines = read_lines(path / METRICS)
    read = {
        CONFIG: read_config(path / CONFIG),
        FACTS: as_object(files.read_json(path / FACTS)),
        CHECKS: as_object(files.read_json(path / CHECKS)),
    }
    return Run(
        name=name or path.resolve().name,
        path=path,
        rows=read_rows(lines),
        config=read[CONFIG],
        facts=read[FACTS],
        checks=read[CHECKS],
        finished=bool(state.get("finished")),
        live=live,
        lost=_lost(lines),
        unread=tuple(name for name, found in read.items() if not found and (path / name).is_file()),
    )


def read_runs(paths: list[Path]) -> list[Run]:
    """Several runs, named by their directories; those of one name, by their whole paths.

    Raises:
        ConfigError: see `read_run`.
    """
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def differing(runs: list[Run]) -> dict[str, list[str]]:
    """The values, as text, of every key that is not the same in all runs whose configuration can
    be read; what says where things lie is left out.
    """
    found = {}
    for name in TrainConfig.key_fields():
        values = [shown(run.config.get(name)) if run.config else "not known" for run in runs]
        known = {value for run, value in zip(runs, values, strict=True) if run.config}
        if len(known) > 1 and name not in (*_PLACES, *_SECRET):
            found[name] = values
    return found


def _lost(lines: Iterable[Any]) -> dict[str, float]:
    """Metrics whose last values are no numbers, and the step since which they are none."""
    found: dict[str, float] = {}
    for values in lines:
        if not isinstance(values, dict) or not _is_number(values.get("step")):
            continue
        for name, value in values.items():
            if _is_number(value):
                found.pop(name, None)
            elif isinstance(value, float):
                found.setdefault(name, values["step"])
    return found


def read_rows(lines: Iterable[Any]) -> list[dict[str, float]]:
    """The numbers of those lines that are of a step."""
    return [
        {name: value for name, value in values.items() if _is_number(value)}
        for values in lines
        if isinstance(values, dict) and _is_number(values.get("step"))
    ]


def read_lines(file: Path) -> list[Any]:
    """The lines of JSON that are whole: a killed run leaves half a line."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return found


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 1e300 and math.isfinite(value)


def as_object(value: Any) -> dict[str, Any]:
    """An object as it is, and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def read_config(file: Path) -> dict[str, Any]:
    """Every key of a configuration and its value; nothing where it cannot be read."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}
