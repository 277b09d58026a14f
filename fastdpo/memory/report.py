"""A plan as text for a terminal, as wide as that is, or as JSON."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Any

from ..config import TrainConfig
from ..config.values import show
from ..devices import GIB, HEADROOM
from .estimate import COMPONENTS, OF_SHARDS
from .planner import Planner, Prediction, describe_data
from .report_devices import devices_facts, devices_lines, where
from .speed import UTILISATION
from .switches import each_alone, least

_WORDS = {**COMPONENTS, **OF_SHARDS, "overhead": "CUDA context and libraries"}


def as_dict(planner: Planner) -> dict[str, Any]:
    """All that a report says, as plain types: bytes, seconds and keys."""
    now = planner.predict(planner.config)
    device = planner.device
    facts: dict[str, Any] = {
        "device": {"name": device.name, "bytes": device.memory, "budget": device.budget},
        "data": describe_data(planner),
        "layout": planner.layout,
        "head_passes": planner.head_passes(planner.config),
        **_described(planner, now),
        "switches": [
            {"name": switch.name, "same_numbers": switch.exact, **_described(planner, other, now)}
            for switch, other in each_alone(planner)
        ],
    }
    fitting = None if facts["fits"] else least(planner, exact=False)
    facts["least"] = None if fitting is None else _described(planner, fitting, now)
    if planner.spread.devices > 1:
        facts["parallel"] = devices_facts(planner, now)
    return facts


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
        "scoring_seconds": None if seconds is None else seconds.scoring,
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
    """`as_dict` as JSON."""
    return json.dumps(as_dict(planner), indent=2)


def as_text(planner: Planner, width: int | None = None) -> str:
    """Table, bars and advice, `width` columns wide (default: the terminal's, 40 to 100)."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    width = min(100, max(40, width))
    facts = as_dict(planner)
    device, several = facts["device"]["name"], facts.get("parallel")
    device = where(several, device) if several else device
    lines = [
        f"{planner.config.model_name_or_path} on {device}, {facts['layout']} rows "
        f"of up to {facts['max_tokens_per_batch']} tokens",
        facts["data"],
        "",
        *_bars(facts, width),
        "",
        *_verdict(facts),
        *(devices_lines(several, width) if several else ()),
        *_switches(facts, width),
    ]
    return "\n".join(
        wrapped
        for line in lines
        for wrapped in (
            textwrap.wrap(line, width, subsequent_indent="    ") if line[:1] != " " else [line]
        )
        or [""]
    )


def _bars(facts: dict[str, Any], width: int) -> list[str]:
    """One line a component: words, GiB, and a bar whose full length is the device's memory."""
    sizes = {name: size for name, size in facts["components"].items() if size}
    name_width = max(len(_WORDS[name]) for name in sizes)
    full = max(facts["total_bytes"], facts["device"]["bytes"])
    room = max(8, width - name_width - 14)
    lines = []
    for name, size in sizes.items():
        length = round(room * size / full)
        bar = "#" * length if length else "."
        lines.append(f"  {_WORDS[name]:<{name_width}} {_gib(size):>6} GiB {bar}"[:width])
    end = f"  {'peak':<{name_width}} {_gib(facts['total_bytes']):>6} GiB "
    filled = round(room * facts["total_bytes"] / full)
    whole = round(room * facts["device"]["bytes"] / full)
    lines.append(end + "#" * min(filled, whole) + "-" * (whole - filled) + "!" * (filled - whole))
    return [*lines, f"  at the {facts['moment']}"]


def _verdict(facts: dict[str, Any]) -> list[str]:
    device = facts["device"]
    many = " on each device" if "parallel" in facts else ""
    word = "fits" if facts["fits"] else "does not fit"
    lines = [
        f"{word}: {_gib(facts['total_bytes'])} of {_gib(device['bytes'])} GiB{many}, of which "
        f"{HEADROOM:.0%} stay free for the allocator"
    ]
    if facts["step_seconds"] is not None:
        before = facts["scoring_seconds"]
        said = f", {before:.3g} s of it for the pass that scores responses first" if before else ""
        lines.append(
            f"a step takes {facts['step_seconds']:.3g} s at {UTILISATION:.0%} of the device's peak "
            f"(assumed, not measured){said}"
        )
    else:
        lines.append("the time of a step is not known for this device")
    if facts["head_passes"] is not None:
        least = 6 if facts["head_passes"] >= 6 else 4
        lines.append(
            f"each scored token is multiplied with the head {facts['head_passes']:.2f} times; "
            f"{least} is the least (head_passes)"
        )
    if facts["fits"]:
        return lines
    if facts["least"] is None:
        return [*lines, "no switch known here makes it fit"]
    fitting = facts["least"]
    flags = _flags(fitting["changes"])
    needed = f"{_gib(fitting['total_bytes'])} GiB{_cost(fitting)}"
    return [*lines, f"least that fits ({needed}): {flags}"]


def _switches(facts: dict[str, Any], width: int) -> list[str]:
    rows = []
    for switch in facts["switches"]:
        fits = "fits" if switch["fits"] else ""
        other = "" if switch["same_numbers"] else "other numbers"
        cost = _cost(switch).removeprefix(", ")
        rows.append((_flags(switch["changes"]), _gib(switch["total_bytes"]), fits, cost, other))
    if not rows:
        return []
    wide = max(len(row[0]) for row in rows)
    lines = ["", "Each switch by itself, as far as it goes:"]
    for flags, *figures in rows:
        peak, fits, cost, other = figures
        figure = f"{peak:>6} GiB  {fits:<4} {cost:<12} {other}".rstrip()
        if wide + 45 <= width:
            lines.append(f"  {flags:<{wide}} {figure}")
        else:  # one below the other
            lines += [f"  {line}" for line in textwrap.wrap(flags, width - 2)]
            lines.append(f"    {figure}")
    return lines


def _flags(changed: dict[str, Any]) -> str:
    return " ".join(f"--{name} {show(value)}" for name, value in changed.items())


def _cost(described: dict[str, Any]) -> str:
    times = described.get("times_the_time")
    return "" if times is None else f", {round(times - 1, 2) + 0.0:+.0%} time"  # never -0%


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
