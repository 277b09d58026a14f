"""What the page of rounds shows of its measurements."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from .rows import origins, read
from .tables import NOTHING, markdown, spread


def rounds_demo_block(folder: Path) -> str:
    """The demo's rounds: held-out figures, and the shares of a round's time."""
    rows = _newest(folder, "demo")
    if not rows:
        return NOTHING
    lines = []
    for row in rows:
        spent = row.get("seconds") or {}
        whole = sum(spent.values())
        lines.append(
            [
                str(row["round"]) if row["round"] else "start",
                f"{row['score']:.3f}",
                f"{row['win_rate']:.0%}",
                f"{row['tokens']:.1f}",
                f"{row['kl']:.3f}",
                f"{whole:.0f}" if whole else "",
                ", ".join(f"{name} {s / whole:.0%}" for name, s in spent.items()),
            ]
        )
    columns = (
        *("round", "held-out score", "wins", "tokens an answer", "nats a token from the start"),
        *("seconds", "of which"),
    )
    minutes = f"{rows[0]['demo_seconds'] / 60:.1f} minutes in all."
    return "\n\n".join([markdown(columns, lines), minutes, *origins(rows)])


def rounds_sampling_block(folder: Path) -> str:
    """Tokens a second of each way to sample, and beside the first one in the same turn."""
    rows = _newest(folder, "sampling")
    if not rows:
        return NOTHING
    speeds: dict[str, list[float]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["repetition"]):
        speeds[row["way"]].append(row["tokens"] / row["seconds"])
    first = next(iter(speeds.values()))
    lines = [
        [way, spread(found, 3), spread([a / b for a, b in zip(found, first, strict=True)], 3)]
        for way, found in speeds.items()
    ]
    columns = ("`generate`, unless it says otherwise", "tokens a second", "beside the first")
    return "\n\n".join([markdown(columns, lines), *origins(rows)])


def rounds_kills_block(folder: Path) -> str:
    """How many runs were killed and how many ended bit for bit as undisturbed ones."""
    rows = _newest(folder, "kills")
    if not rows:
        return NOTHING
    killed = sum(row["killed"] for row in rows)
    same = sum(row["bit_for_bit"] for row in rows)
    said = (
        f"{killed} of {len(rows)} runs of two rounds were killed at a random moment and started "
        f"again: {same} ended with the same samples, scores, rows and weights, bit for bit."
    )
    return "\n\n".join([said, *origins(rows)])


def _newest(folder: Path, what: str) -> list[dict[str, Any]]:
    rows = [row for row in read(folder, "rounds.jsonl") if row["options"]["what"] == what]
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]
