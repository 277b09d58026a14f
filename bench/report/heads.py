"""What the pages show of the head: every provider in every case, a summary, and the chart."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from . import charts
from .rows import (
    Row,
    Run,
    accepted,
    by_device,
    failure,
    first,
    flat,
    is_ours,
    median,
    newest_runs,
    origins,
    runs,
    values,
)
from .tables import NOTHING, image, markdown, number, ratio, spread

_COLUMNS = (
    "provider",
    "forward ms",
    "backward ms",
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


def head_label(case: Row) -> str:
    """Regime, head, tokens and dtype, in words."""
    return f"{case['regime']}, {case['head']}, T={case['tokens']}, {case['dtype']}"


def head_tables(rows: Iterable[Row]) -> str:
    """One table a case and run: times with their spread, ratios, memory, errors, failures."""
    return "\n\n".join(_table(run) for run in runs(rows))


def _table(run: Run) -> str:
    row = first(run)
    title = "**{regime}, {head} (V={vocab}, H={hidden}), T={tokens}, {dtype}, {device}**"
    right = {name: accepted(part) for name, part in run.items()}
    floor, ours = (median(right.get(name, []), "total_s") for name in ("products", "fastdpo"))
    lines = []
    for name in sorted(run, key=lambda name: median(right[name], "total_s") or math.inf):
        part, done = run[name], right[name]
        errors = [row["error"] for row in part if "error" in row]
        errors += [f"refused: {row['refused']}" for row in part if "refused" in row]
        shown = f"{name} ({errors[-1]} once)" if done and errors else name
        lines.append([shown, *(_cells(done, floor, ours) if done else [errors[-1]])])
    title = title.format(**row["case"], device=row["device"])
    return f"{title}\n\n{markdown(_COLUMNS, lines)}"


def _cells(rows: list[Row], floor: float | None, ours: float | None) -> list[str]:
    last, total = rows[-1], median(rows, "total_s")
    forward = statistics.median(1e3 * row["forward_s"] for row in rows)
    backward = statistics.median(
        1e3 * row.get("backward_s", row["total_s"] - row["forward_s"]) for row in rows
    )
    return [
        number(forward, 4),
        number(backward, 4),
        spread([1e3 * seconds for seconds in values(rows, "total_s")]),
        ratio(total, floor),
        ratio(total, ours),
        *(f"{last[name]:.0f}" for name in ("workspace_mib", "gradient_mib")),
        *(_error(last, name) for name in ("logp_error", "dx_error", "dw_error")),
        "yes" if last["deterministic"] else "no",
    ]


def _error(row: Row, name: str) -> str:
    return f"{row[name]:.1e}" if name in row else ""


def head_summary(rows: Iterable[Row]) -> str:
    """One line a case and run: our time, its ratio to the bare products, and each peer's time over
    ours.
    """
    measured = runs(rows)
    peers = list(dict.fromkeys(name for run in measured for name in peers_of(run)))
    columns = ["regime", "head", "T", "dtype", "fastdpo ms", "÷ products"]
    columns += [*(f"{name} ÷" for name in peers), "workspace MiB", "logp, nats", "trl's"]
    lines = []
    for run in measured:
        totals = total_times(run)
        ours, floor = totals.get("fastdpo"), totals.get("products")
        case, mine = first(run)["case"], run.get("fastdpo", [])
        facts = mine[-1] if mine else {}
        cells = [case["regime"], case["head"], str(case["tokens"]), case["dtype"]]
        cells.append(number(1e3 * ours, 4) if ours else failure(mine[-1:]) or "")
        cells.append(ratio(ours, floor))
        for name in peers:
            cells.append(ratio(totals.get(name), ours) or failure(run.get(name, [])) or "")
        limit = f" of {case['workspace_limit_mib']}"
        cells.append(f"{facts['workspace_mib']:.0f}{limit}" if "workspace_mib" in facts else "")
        cells += [_error(part, "logp_error") for part in (facts, run.get("trl", [{}])[-1])]
        lines.append(cells)
    return markdown(columns, lines, 4)


def peers_of(run: Run) -> list[str]:
    """Whoever is compared with ours; the bare products are no head."""
    return [name for name in run if not is_ours(name) and name != "products"]


def total_times(run: Run) -> dict[str, float | None]:
    """Median seconds of every provider; None where it failed or was refused."""
    return {name: median(accepted(part), "total_s") for name, part in run.items()}


def heads_block(folder: Path) -> str:
    """A chart, and a table for each device: the head of DPO with trained weights."""
    measured = [r for r in newest_runs(folder, "heads") if first(r)["case"]["regime"] == "dpo"]
    parts = [image("heads.svg", "Time of the head, ours and its peers'")]
    for device in by_device(measured):
        parts.append(head_summary(flat(device)))
        parts.append("\n".join(origins(map(first, device))) + ".")
    return "\n\n".join(parts) if measured else NOTHING


def heads_all_block(folder: Path) -> str:
    """The head in every regime, in a table for each device."""
    devices = by_device(newest_runs(folder, "heads"))
    parts = [
        part
        for device in devices
        for part in (head_summary(flat(device)), *origins(map(first, device)))
    ]
    return "\n\n".join(parts) or NOTHING


def most_tokens(folder: Path) -> list[Run]:
    """Of each head, dtype and device the run of DPO with the most tokens, then the most peers."""
    most: dict[tuple[str, str, str], Run] = {}
    for run in newest_runs(folder, "heads"):
        row = first(run)
        key = (row["device"], row["case"]["head"], row["case"]["dtype"])
        if row["case"]["regime"] == "dpo" and "fastdpo" in run:
            most[key] = max((most.get(key, run), run), key=tokens_and_peers)
    return list(most.values())


def tokens_and_peers(run: Run) -> tuple[int, int]:
    """By which one case is preferred to another."""
    return first(run)["case"]["tokens"], len(peers_of(run))


def heads_chart(folder: Path) -> str | None:
    """Milliseconds of the head of DPO at the most tokens measured; None without rows."""
    measured, groups = most_tokens(folder), {}
    for run in measured:
        shown = {name: rows for name, rows in run.items() if not name.startswith("Config(")}
        group = {name: charts.bar(rows, "total_s", 1e3) for name, rows in shown.items()}
        groups[charts.named(run, head_label)] = charts.ranked(group, largest_first=False)
    caption = "\n".join([*origins(map(first, measured), commands=False), charts.SCALES])
    unit = "milliseconds of forward and backward, shorter is faster; × the bare matrix products"
    title = "The head of DPO, ours and its peers"
    return charts.bars(title, unit, groups, caption, "products") if measured else None
