"""What a plan says of several devices: how the model lies over them, and what they exchange."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from ..devices import GIB
from .exchange import LINK_UTILISATION, traffic, waits
from .parallel import scaling
from .planner import Planner, Prediction
from .spread import Spread

_TRAFFIC = {
    "weights": "weights gathered",
    "gradients": "gradients shared out",
    "sums": "gradients added up over replicas",
    "head": "the head's",
    "context": "tokens of shared rows",
}


def devices_facts(planner: Planner, now: Prediction) -> dict[str, Any]:
    """All that is said of several devices, as plain types: bytes and seconds of the mean step."""
    run, sent = planner.run(planner.config), None
    links = planner.links
    if links is not None and now.seconds is not None:
        sent = waits(run, planner.device, links)
    bytes_sent = traffic(run)
    return {
        **_spread_facts(planner.spread),
        "cp_size": planner.spread.cp_size,
        "head_parallel": "vocabulary" if planner.spread.vocabulary else "gathered",
        "reason": planner.spread.reason or f"data_parallel is {planner.spread.name}",
        "links": None if links is None else list(links.names),
        "bytes_sent": {**asdict(bytes_sent), "total": bytes_sent.total},
        "exchange_seconds": None if sent is None else sent.exchanged,
        "waited_seconds": None if sent is None else sent.waited,
        "scaling": [
            {
                **_spread_facts(row.spread),
                "total_bytes": row.prediction.estimate.peak + planner.device.overhead,
                "fits": row.fits,
                "step_seconds": None
                if row.prediction.seconds is None
                else row.prediction.seconds.total,
                "efficiency": row.efficiency,
            }
            for row in scaling(planner, planner.spread.local)
        ],
    }


def _spread_facts(spread: Spread) -> dict[str, Any]:
    return {
        "devices": spread.devices,
        "hosts": spread.hosts,
        "data_parallel": spread.name,
        "replicas": spread.replicas,
        "shards": spread.shards,
    }


def where(facts: dict[str, Any], device: str) -> str:
    """The devices in words."""
    hosts = facts["hosts"]
    on = f" on {hosts} hosts" if hosts > 1 else ""
    return f"{facts['devices']} x {device}{on}"


def devices_lines(facts: dict[str, Any], width: int) -> list[str]:
    """The same as text; lines that begin with a space are not to be wrapped."""
    shape = {
        "replicate": "the whole model on each device",
        "fsdp": f"the model in {facts['shards']} shares",
        "hsdp": f"{facts['replicas']} x the model in {facts['shards']} shares",
    }[facts["data_parallel"]]
    lines = ["", f"data_parallel {facts['data_parallel']}, {shape}: {facts['reason']}"]
    if facts["cp_size"] > 1:
        lines.append(f"{facts['cp_size']} devices compute each row together")
    if facts["head_parallel"] == "vocabulary":
        lines.append("the head stays sharded over the vocabulary (head_parallel vocabulary)")
    parts = [
        f"{_TRAFFIC[name]} {_gib(size)}"
        for name, size in facts["bytes_sent"].items()
        if size and name in _TRAFFIC
    ]
    sent = f"each device sends {_gib(facts['bytes_sent']['total'])} GiB a step"
    lines.append(f"{sent} ({', '.join(parts)})")
    if facts["exchange_seconds"] is not None:
        link, network = facts["links"]
        over = f"{link}, {network} between hosts" if facts["hosts"] > 1 else link
        lines.append(
            f"which takes {facts['exchange_seconds']:.3g} s over {over} at {LINK_UTILISATION:.0%} "
            f"of their rates (assumed, not measured); {facts['waited_seconds']:.3g} s of it pass "
            "without computation"
        )
    elif facts["links"] is None:
        lines.append("what joins the devices is not known here: --link says it")
    return [*lines, *_table(facts["scaling"], width)]


def _table(rows: list[dict[str, Any]], width: int) -> list[str]:
    """One line for each number of devices, each with as much to do."""
    title = "With as many units on each device (bandwidths alone: no latencies, no stragglers):"
    lines = ["", *textwrap.wrap(title, width)]
    head = f"  {'devices':>7} {'data_parallel':<13} {'GiB':>8} {'fits':<4}"
    timed = any(row["step_seconds"] is not None for row in rows)
    lines.append(head + (f" {'s a step':>9} {'efficiency':>10}" if timed else ""))
    for row in rows:
        line = f"  {row['devices']:>7} {row['data_parallel']:<13} {_gib(row['total_bytes']):>8} "
        line += f"{'yes' if row['fits'] else 'no':<4}"
        if row["step_seconds"] is not None:
            line += f" {row['step_seconds']:>9.3g} {row['efficiency']:>10.0%}"
        lines.append(line.rstrip())
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
