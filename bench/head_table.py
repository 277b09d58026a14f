"""Markdown tables from the rows of the head benchmark."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PEERS = ("products", "trl", "liger", "liger-8", "cce", "naive")
_COLUMNS = (
    "provider",
    "forward ms",
    "total ms (least–most)",
    "÷ products",
    "÷ fastdpo",
    "workspace MiB",
    "gradients MiB",
    "logp, nats",
    "dX",
    "dW",
    "same bits",
)


def read(folder: Path, pattern: str = "heads-*.jsonl") -> list[Row]:
    """All rows of the files in `folder`, oldest first within a file."""
    files = sorted(folder.glob(pattern))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _cases(rows: Iterable[Row]) -> list[dict[str, list[Row]]]:
    """Rows by provider, for each case and run: a ratio is within one process."""
    cases: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        key = (json.dumps(row["case"]), row["device"], row["commit"], row["command"])
        cases.setdefault(key, {}).setdefault(row["provider"], []).append(row)
    return list(cases.values())


def tables(rows: Iterable[Row]) -> str:
    """One table a case: medians with their spread, ratios, memory, errors, failures."""
    return "\n\n".join(_table(providers) for providers in _cases(rows))


def _table(providers: dict[str, list[Row]]) -> str:
    first = next(iter(providers.values()))[0]
    title = "**{regime}, {head} (V={vocab}, H={hidden}), T={tokens}, {dtype}, {device}**"
    lines = [title.format(**first["case"], device=first["device"]), ""]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|---" + "|---:" * (len(_COLUMNS) - 1) + "|"]
    totals = {name: median(part) for name, part in providers.items()}
    for name in sorted(providers, key=lambda name: totals[name] or math.inf):
        part = providers[name]
        cells = (
            _cells(part, totals.get("products"), totals.get("fastdpo"))
            if totals[name]
            else [part[-1]["error"], *[""] * (len(_COLUMNS) - 2)]
        )
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def summary(rows: Iterable[Row]) -> str:
    """One line a case: our time, its ratio to the bare products, and each peer's time over ours."""
    columns = ("regime", "head", "T", "fastdpo ms", "÷ products", *(f"{p} ÷" for p in PEERS[1:]))
    columns = (*columns, "workspace MiB", "logp, nats", "trl's")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for providers in _cases(rows):
        totals = {name: median(part) for name, part in providers.items()}
        ours, floor = totals.get("fastdpo"), totals.get("products")
        case, facts = next(iter(providers.values()))[0]["case"], providers.get("fastdpo", [{}])[-1]
        cells = [case["regime"], case["head"], str(case["tokens"])]
        cells.append(f"{1e3 * ours:.4g}" if ours else "failed")
        cells.append(f"{ours / floor:.2f}" if ours and floor else "")
        for name in PEERS[1:]:
            peer = totals.get(name)
            done = f"{peer / ours:.2f}" if peer and ours else "failed"
            cells.append(done if name in providers else "")
        limit = f" of {case['workspace_limit_mib']}"
        cells.append(f"{facts['workspace_mib']:.0f}{limit}" if "workspace_mib" in facts else "")
        for part in (facts, providers.get("trl", [{}])[-1]):
            cells.append(f"{part['logp_error']:.1e}" if "logp_error" in part else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def median(rows: list[Row]) -> float | None:
    """Median of the seconds of a forward and a backward together."""
    found = [row["total_s"] for row in rows if "total_s" in row]
    return statistics.median(found) if found else None


def _cells(rows: list[Row], floor: float | None, ours: float | None) -> list[str]:
    total, last = [1e3 * row["total_s"] for row in rows], rows[-1]
    middle = statistics.median(total)
    forward = statistics.median(1e3 * row["forward_s"] for row in rows)

    def ratio(other: float | None) -> str:
        return f"{middle / (1e3 * other):.2f}" if other else ""

    def error(name: str) -> str:
        return f"{last[name]:.1e}" if name in last else ""

    return [
        f"{forward:.4g}",
        f"{middle:.4g} ({min(total):.4g}–{max(total):.4g})",
        ratio(floor),
        ratio(ours),
        f"{last['workspace_mib']:.0f}",
        f"{last['gradient_mib']:.0f}",
        error("logp_error"),
        error("dx_error"),
        error("dw_error"),
        "yes" if last["deterministic"] else "no",
    ]
