"""A plan as text for a terminal, as wide as that is, or as JSON."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Any

from ..config import TrainConfig
from ..config.values import show
from ..devices import GIB, HEADROOM
from .planner import Planner, Prediction, describe_data
from .speed import UTILISATION
from .switches import each_alone, least

WORDS = {
    "weights": "weights",
    "reference": "weights of the reference",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "checkpoints": "inputs of recomputed layers",
    "activations": "kept activations",
    "layer": "one layer at work",
    "attention": "attention",
    "head": "head",
    "rows": "index tensors",
    "overhead": "CUDA context and libraries",
}
"""What a component is called in reports."""


def facts(planner: Planner) -> dict[str, Any]:
    """All that a report says, as plain types: bytes, seconds and keys."""
    now = planner.predict(planner.config)
    device = planner.device
    found: dict[str, Any] = {
        "device": {"name": device.name, "bytes": device.memory, "budget": device.budget},
        "data": describe_data(planner),
        "layout": planner.layout,
        **_described(planner, now),
        "switches": [
            {"name": switch.name, "same_numbers": switch.exact, **_described(planner, other, now)}
            for switch, other in each_alone(planner)
        ],
    }
    fitting = None if found["fits"] else least(planner, exact=False)
    found["least"] = None if fitting is None else _described(planner, fitting, now)
    return found


def _described(
    planner: Planner, prediction: Prediction, now: Prediction | None = None
) -> dict[str, Any]:
    estimate, seconds = prediction.estimate, prediction.seconds
    described: dict[str, Any] = {
        "moment": estimate.moment,
        "components": {**estimate.components, "overhead": planner.device.overhead},
        "peak_bytes": estimate.peak,
        "total_bytes": estimate.peak + planner.device.overhead,
        "fits": planner.fits(prediction),
        "max_tokens_per_batch": prediction.max_tokens,
        "step_seconds": None if seconds is None else seconds.total,
    }
    if now is not None:
        described["changes"] = changes(now.config, prediction.config)
        if seconds is not None and now.seconds is not None:
            described["times_the_time"] = seconds.total / now.seconds.total
    return described


def changes(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    """The keys in which two configurations differ, with their new values."""
    old = before.to_dict()
    return {name: value for name, value in after.to_dict().items() if value != old[name]}


def as_json(planner: Planner) -> str:
    """`facts` as JSON."""
    return json.dumps(facts(planner), indent=2)


def as_text(planner: Planner, width: int | None = None) -> str:
    """Table, bars and advice, `width` columns wide (default: the terminal's, 40 to 100)."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    width = min(100, max(40, width))
    found = facts(planner)
    lines = [
        f"{planner.config.model_name_or_path} on {found['device']['name']}, {found['layout']} rows "
        f"of up to {found['max_tokens_per_batch']} tokens",
        found["data"],
        "",
        *_bars(found, width),
        "",
        *_verdict(found),
        *_switches(found),
    ]
    return "\n".join(
        wrapped
        for line in lines
        for wrapped in (
            textwrap.wrap(line, width, subsequent_indent="    ") if line[:1] != " " else [line]
        )
        or [""]
    )


def _bars(found: dict[str, Any], width: int) -> list[str]:
    """One line a component: words, GiB, and a bar whose full length is the device's memory."""
    sizes = {name: size for name, size in found["components"].items() if size}
    name_width = max(len(WORDS[name]) for name in sizes)
    full = max(found["total_bytes"], found["device"]["bytes"])
    room = max(8, width - name_width - 14)
    lines = []
    for name, size in sizes.items():
        length = round(room * size / full)
        bar = "#" * length if length else "."
        lines.append(f"  {WORDS[name]:<{name_width}} {_gib(size):>6} GiB {bar}"[:width])
    end = f"  {'peak':<{name_width}} {_gib(found['total_bytes']):>6} GiB "
    filled = round(room * found["total_bytes"] / full)
    whole = round(room * found["device"]["bytes"] / full)
    lines.append(end + "#" * min(filled, whole) + "-" * (whole - filled) + "!" * (filled - whole))
    return [*lines, f"  at the {found['moment']}"]


def _verdict(found: dict[str, Any]) -> list[str]:
    device = found["device"]
    word = "fits" if found["fits"] else "does not fit"
    lines = [
        f"{word}: {_gib(found['total_bytes'])} of {_gib(device['bytes'])} GiB, of which "
        f"{HEADROOM:.0%} stay free for the allocator"
    ]
    if found["step_seconds"] is not None:
        lines.append(
            f"a step takes {found['step_seconds']:.3g} s at {UTILISATION:.0%} of the device's peak "
            "(assumed, not measured)"
        )
    else:
        lines.append("the time of a step is not known for this device")
    if found["fits"]:
        return lines
    if found["least"] is None:
        return [*lines, "no switch known here makes it fit"]
    least = found["least"]
    flags = " ".join(f"--{name} {show(value)}" for name, value in least["changes"].items())
    needed = f"{_gib(least['total_bytes'])} GiB{_cost(least)}"
    return [*lines, f"least that fits ({needed}): {flags}"]


def _switches(found: dict[str, Any]) -> list[str]:
    rows = []
    for switch in found["switches"]:
        fits = "fits" if switch["fits"] else ""
        other = "" if switch["same_numbers"] else "other numbers"
        cost = _cost(switch).removeprefix(", ")
        rows.append((switch["name"], _gib(switch["total_bytes"]), fits, cost, other))
    if not rows:
        return []
    wide = max(len(row[0]) for row in rows)
    return [
        "",
        "Each switch by itself:",
        *(
            f"  {name:<{wide}} {peak:>6} GiB  {fits:<4} {cost:<12} {other}".rstrip()
            for name, peak, fits, cost, other in rows
        ),
    ]


def _cost(described: dict[str, Any]) -> str:
    times = described.get("times_the_time")
    return "" if times is None else f", {round(times - 1, 2) + 0.0:+.0%} time"  # never -0%


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
