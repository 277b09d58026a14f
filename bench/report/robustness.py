"""What the pages show of runs that were killed, and of runs that took many steps."""

from collections import Counter
from pathlib import Path

from .rows import origins, read
from .tables import NOTHING, markdown, number

_UNITS = {
    "resident_mib": "resident MiB",
    "files": "open files",
    "threads": "threads",
    "mappings": "mapped regions",
    "blocks": "Python's blocks",
}


def kill_block(folder: Path) -> str:
    """How many trials ended bit for bit as an undisturbed run, and where they were killed."""
    rows = read(folder, "kill.jsonl")
    if not rows:
        return NOTHING
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        trials = [row for row in rows if row["kind"] == kind]
        phases = Counter(kill["phase"] for row in trials for kill in row["kills"])
        ended = sum(row["bit_for_bit"] for row in trials)
        places = ", ".join(f"{phase} {count}" for phase, count in phases.most_common())
        lines.append([kind, places, str(phases.total()), str(len(trials)), str(ended)])
    columns = ("weights", "killed while", "kills", "trials", "end bit for bit")
    return "\n\n".join([markdown(columns, lines, 2), *origins(rows)])


def kill_devices_block(folder: Path) -> str:
    """How many runs of several processes ended as an undisturbed one, gone on with on as many or on
    others.
    """
    rows = read(folder, "kill-devices.jsonl")
    if not rows:
        return NOTHING
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        trials = [row for row in rows if row["kind"] == kind]
        phases = Counter(kill["phase"] for row in trials for kill in row["kills"])
        same = [row["bit_for_bit"] for row in trials if row["bit_for_bit"] is not None]
        other = [row["off"] for row in trials if "off" in row]
        lines.append(
            [
                kind,
                ", ".join(f"{phase} {count}" for phase, count in phases.most_common()),
                str(phases.total()),
                f"{sum(same)} of {len(same)}",
                str(len(trials) - len(same)),
                f"{max(other):.1e}" if other else "",
            ]
        )
    columns = (
        "model",
        "killed while",
        "kills",
        "bit for bit on as many processes",
        "trials on other numbers",
        "largest difference of the curve there",
    )
    return "\n\n".join([markdown(columns, lines, 2), *origins(rows)])


def soak_block(folder: Path) -> str:
    """By how much the last quarter of a long run holds more than the second one."""
    rows = read(folder, "soak.jsonl")
    if not rows:
        return NOTHING
    lines = [
        [
            row["kind"],
            str(row["steps"]),
            *(number(row["growth"][name]) for name in _UNITS),
            "yes" if row["flat"] else "no",
        ]
        for row in rows
    ]
    columns = ("run", "steps", *_UNITS.values(), "flat within noise")
    return "\n\n".join([markdown(columns, lines), *origins(rows)])
