"""What the pages show of one process beside several."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .rows import LOSS_TOLERANCE, Row, failure, origins, read
from .tables import NOTHING, markdown, number, spread

_NAMES = {
    "one": "one process",
    "apart": "a run of its own each",
    "vocabulary": "fsdp, head over the vocabulary",
    "context": "replicate, rows over contexts of 2",
}
_TRAINERS = {"fastdpo": "fastdpo", "trl": "TRL, accelerate"}


def scaling_block(folder: Path) -> str:
    """Speed, bytes and memory: of each the newest command's rows."""
    rows = read(folder, "scaling-*.jsonl")
    if not rows:
        return NOTHING
    parts = []
    for kind, table in {"time": _times, "bytes": _bytes, "memory": _memory}.items():
        some = _newest([row for row in rows if row["kind"] == kind])
        if some:
            parts += [table(some), *origins(some)]
    return "\n\n".join(parts)


def _newest(rows: list[Row]) -> list[Row]:
    last = [(row["commit"], row["command"]) for row in rows][-1:]
    return [row for row in rows if [(row["commit"], row["command"])] == last]


def _grouped(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        case = row["case"]
        names = ("provider", "scheme", "processes", "pairs_a_process")
        groups.setdefault((row.get("scaling"), *(case[name] for name in names)), []).append(row)
    return list(groups.values())


def _scheme(row: Row) -> str:
    scheme: str = row["case"]["scheme"]
    return _NAMES.get(scheme, scheme)


def _times(rows: list[Row]) -> str:
    """Medians (least–most) of the repetitions."""
    columns = (
        "scaling",
        "trainer",
        "processes",
        "pairs each",
        "spread as",
        "tokens/s",
        "pairs/s",
        "÷ N × one",
        "÷ the cores'",
        "load",
    )
    lines = []
    for group in _grouped(rows):
        row, case = group[0], group[0]["case"]
        line = [row["scaling"], _TRAINERS[case["provider"]], str(case["processes"])]
        line += [str(case["pairs_a_process"]), _scheme(row)]
        if why := failure(group) or _disagrees(group, rows):
            lines.append([*line, why])
            continue
        for name, digits in {"tokens_per_s": 3, "pairs_per_s": 3}.items():
            line.append(spread([row[name] for row in group], digits))
        for name in ("efficiency", "of_cores"):
            figures = [row[name] for row in group if name in row]
            line.append(spread(figures, 2) if case["scheme"] != "one" else "")
        line.append(number(statistics.median(row["load"] for row in group), 2))
        lines.append(line)
    return markdown(columns, lines, 5)


def _disagrees(group: list[Row], rows: list[Row]) -> str | None:
    """Why a speed is refused: a step of as many pairs has the same loss, whoever takes it."""
    case, tolerance = group[0]["case"], LOSS_TOLERANCE[group[0]["case"]["dtype"]]

    def units(row: Row) -> int:
        alone = row["case"]["scheme"] in ("one", "apart")
        count: int = row["case"]["pairs_a_process"]
        return count if alone else count * row["case"]["processes"]

    for row in group:
        for other in rows:
            if "error" in other or units(other) != units(row) or other["case"]["provider"] != "trl":
                continue
            both = list(zip(row["loss"], other["loss"], strict=True))
            apart = max(abs(ours - theirs) for ours, theirs in both)
            if not apart <= tolerance:
                return f"refused: losses of {case['provider']} and trl are {apart:.1e} apart"
    return None


def _bytes(rows: list[Row]) -> str:
    """What a rank sends in a step."""
    columns = (
        "spread as",
        "processes",
        "rows a rank",
        "MB sent",
        "of the scheme",
        "÷ that",
        "loopback ÷ sent",
    )
    lines = []
    for row in rows:
        line = [_scheme(row), str(row["case"]["processes"])]
        if why := failure([row]):
            lines.append([*line, why])
            continue
        sent, ideal = sum(row["sent"].values()), sum(row["ideal"].values())
        line += [number(statistics.mean(row["rows"]), 2), f"{sent / 1e6:.2f}", f"{ideal / 1e6:.2f}"]
        line += [f"{row['over_ideal']:.4f}", f"{row.get('loopback_over_sent', float('nan')):.3f}"]
        lines.append(line)
    return markdown(columns, lines)


def _memory(rows: list[Row]) -> str:
    """What a rank holds after a step, and the most during one."""
    columns = (
        "spread as",
        "processes",
        "weights, MB",
        "gradients",
        "states",
        "together ÷ one process",
        "other tensors",
        "peak of a step",
        "of which whole for a while",
    )
    lines = []
    one = next(row for row in rows if row["case"]["scheme"] == "one")
    whole = _shared(one)
    for row in rows:
        line = [_scheme(row), str(row["case"]["processes"])]
        if why := failure([row]):
            lines.append([*line, why])
            continue
        held, mine = row["held"], _shared(row)
        line += [_mb(held[name]) for name in ("weights", "gradients", "states")]
        line += [f"{mine / whole:.4f}", _mb(held["all"] - mine), _mb(held["all"] + row["beyond"])]
        line.append(_mb(row["beyond"] - one["beyond"]) if row is not one else "")
        lines.append(line)
    return markdown(columns, lines)


def _shared(row: Row) -> int:
    return sum(row["held"][name] for name in ("weights", "gradients", "states"))


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"
