"""Runs as a page: one HTML file that holds everything it shows."""

import json
import time
from collections.abc import Sequence
from functools import cache
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import files
from ..version import __version__
from . import charts
from .advice import advise
from .runs import CONFIG, REPORT, Run, differing, read_run
from .text import number, seconds, visible

RELOADS = 30
"""Seconds after which the page of a run that goes on reads itself anew."""

_FIGURES = (
    ("loss", "Loss"),
    ("eval_loss", "Held-out loss"),
    ("rewards/accuracies", "Reward accuracy"),
    ("eval_rewards/accuracies", "Held-out reward accuracy"),
    ("rewards/margins", "Reward margin"),
    ("eval_rewards/margins", "Held-out reward margin"),
    ("rewards/chosen", "Reward of chosen"),
    ("rewards/rejected", "Reward of rejected"),
    ("logps/chosen", "Log-probability of chosen"),
    ("logps/rejected", "Log-probability of rejected"),
    ("grad_norm", "Gradient norm"),
    ("epoch", "Epochs"),
    ("num_tokens", "Tokens"),
    ("tokens_per_second", "Tokens a second"),
    ("peak_memory_mib", "Peak memory, MiB"),
)
"""The figures that a comparison shows, in order."""


def write_report(folder: Path, live: bool = False) -> Path:
    """Write the page of the run in a directory there; it replaces the one before it at once.

    Raises:
        FastDPOError: no run, or the disk refuses.
    """
    path = folder / REPORT
    files.write_text(path, page(read_run(folder, live=live)))
    return path


def page(run: Run) -> str:
    """The HTML of one run."""
    facts = run.facts
    lengths = facts.get("lengths")
    return render(
        "run.html",
        title=run.name,
        live=run.live,
        run=run,
        status=_status(run),
        summary=_summary(run),
        tiles=_tiles(run),
        advice=advise(run),
        curves=charts.curves(run),
        costs=charts.curves(run, charts.COSTS),
        lengths=charts.lengths(lengths) if isinstance(lengths, dict) else None,
        checks=_checks(run),
        samples=_samples(run),
        no_samples=facts.get("no_samples"),
        changed=None if CONFIG in run.unread else run.changed(),
        figures=_last_values(run),
    )


def comparison_page(runs: Sequence[Run]) -> str:
    """The HTML of several runs on the same axes."""
    figures = {
        title: [number(run.last(metric)) for run in runs]
        for metric, title in _FIGURES
        if any(run.last(metric) is not None for run in runs)
    }
    return render(
        "comparison.html",
        title=f"{len(runs)} runs",
        live=False,
        runs=runs,
        statuses=[_status(run) for run in runs],
        advice=[(run, advise(run)) for run in runs],
        curves=charts.comparison(runs),
        differing=differing(list(runs)),
        figures=figures,
    )


def render(template: str, **values: Any) -> str:
    """A page of a template of this package."""
    made = _environment().get_template(template)
    return made.render(
        values, plotly=_plotly(), version=__version__, made=time.strftime("%Y-%m-%d %H:%M")
    )


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("fastdpo.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    made.filters |= {"number": number, "figure": _embedded}
    made.globals["reloads"] = RELOADS
    return made


@cache
def _plotly() -> Markup:
    """plotly.js, which pip installs with plotly."""
    file = resources("plotly") / "package_data" / "plotly.min.js"
    return Markup(file.read_text(encoding="utf-8"))


def _embedded(figure: dict[str, Any]) -> Markup:
    """JSON that neither ends a script nor begins a comment."""
    text = json.dumps(figure, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _status(run: Run) -> tuple[str, str]:
    """In which state a run is: a word for the style, and words for people."""
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    faults = f"; cannot be read: {', '.join(run.unread)}" if run.unread else ""
    lost = [name for name in ("loss", "eval_loss") if name in run.lost]
    for name in lost:
        faults = f"; {name} is no number since step {run.lost[name]:,.0f}{faults}"
    if run.live:
        return "live", f"running: step {run.step:,}{of}{faults}"
    if run.finished:
        steps = run.total_steps or run.step
        said = f"finished: {steps:,} steps" if steps else "finished; no step is logged"
        return "open" if lost else "finished", f"{said}{faults}"
    return "open", f"not finished: step {run.step:,}{of}{faults}"


def _summary(run: Run) -> list[tuple[str, str]]:
    """What was trained on what, by what: a few words each."""
    config, facts = run.config, run.facts
    losses = config.get("loss_type")
    loss = " + ".join(map(str, losses)) if isinstance(losses, list) else None
    size = facts.get("parameters")
    model = last_part(config.get("model_name_or_path"))
    if model and isinstance(size, int):
        model += f" ({_short(size)} parameters)"
    method = f"{loss}, beta {config.get('beta')}" if loss else None
    if method and config.get("use_peft"):
        method += f", LoRA rank {config.get('lora_r')}"
    devices = facts.get("devices", 1)
    device = facts.get("device")
    parts = [
        ("Model", model),
        ("Data", last_part(config.get("dataset_name"))),
        ("Loss", method),
        ("Device", f"{devices} × {device}" if device and devices != 1 else device),
    ]
    return [(name, str(value)) for name, value in parts if value]


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures to see first: name, value, and what it was at the start or what it means."""
    tiles = []
    for metric, title in (
        ("eval_rewards/accuracies", "Held-out accuracy"),
        ("rewards/accuracies", "Training accuracy"),
        ("eval_loss", "Held-out loss"),
        ("loss", "Training loss"),
        ("rewards/margins", "Reward margin"),
    ):
        curve = run.curve(metric)
        if not curve:
            continue
        show = (lambda v: f"{v:.0%}") if "accuracies" in metric else number
        before = f"from {show(curve.values[0])} at step {curve.steps[0]:.0f}"
        last = run.last(metric)
        value = "no number" if last is None else show(last)
        tiles.append((title, value, before if len(curve) > 1 or last is None else ""))
    speed = run.curve("tokens_per_second")
    if speed:
        middle = sorted(speed.values)[len(speed) // 2]
        tiles.append(("Throughput", number(round(middle)), "tokens a second, median"))
    if (memory := run.last("peak_memory_mib")) is not None:
        tiles.append(("Peak memory", f"{memory / 1024:.2f}", "GiB"))
    if isinstance(spent := run.facts.get("seconds"), int | float):
        tiles.append(("Time", seconds(spent), "with evaluation and samples"))
    return tiles


def _checks(run: Run) -> dict[str, Any] | None:
    """What the checks of the data found, as far as it has the form that they write."""
    findings = [f for f in _rows_of(run.checks.get("findings")) if isinstance(f.get("text"), str)]
    if not run.checks:
        return None
    summary = run.checks.get("summary")
    return {
        "summary": {
            name: number(value) if isinstance(value, int | float) else str(value)
            for name, value in (summary.items() if isinstance(summary, dict) else ())
            if isinstance(value, int | float | str)
        },
        "findings": [
            {
                "name": str(finding.get("name", "")),
                "level": str(finding.get("level", "note")),
                "text": finding["text"],
                "examples": [
                    (example.get("row"), str(example.get("text", "")))
                    for example in _rows_of(finding.get("examples"))
                ],
            }
            for finding in findings
        ],
    }


def _samples(run: Run) -> list[dict[str, Any]]:
    """Prompts as (role, text), with the answers that there are."""
    found = []
    for row in _rows_of(run.facts.get("samples")):
        prompt = row.get("prompt")
        turns = [turn for turn in prompt if _is_turn(turn)] if isinstance(prompt, list) else []
        answers = {
            name: row[name]
            for name in ("before", "after", "chosen")
            if isinstance(row.get(name), str)
        }
        if turns and {"before", "after"} & answers.keys():
            found.append({"prompt": turns, **answers})
    return found


def _is_turn(value: Any) -> bool:
    texts = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return texts and len(value) == 2


def _last_values(run: Run) -> list[tuple[str, str, str]]:
    """The first and the last value of every metric."""
    names = {name for row in run.rows for name in row if name != "step"} | {*run.lost}
    made = [(name, next(iter(run.curve(name).values), None)) for name in sorted(names)]
    return [(name, number(first), number(run.last(name))) for name, first in made]


def _rows_of(value: Any) -> list[dict[str, Any]]:
    rows = value if isinstance(value, list) else []
    return [row for row in rows if isinstance(row, dict)]


def last_part(name: Any) -> str | None:
    """The name of a file or directory; a hub's name as it is."""
    if not isinstance(name, str) or not name:
        return None
    return (
        name if name.count("/") == 1 and not name.startswith(("/", ".", "~")) else Path(name).name
    )


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
