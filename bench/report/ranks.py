"""What the pages show of rows that several ranks compute together, and of runs on two hosts."""

from pathlib import Path

from .rows import origins, read
from .tables import NOTHING, markdown


def context_block(folder: Path) -> str:
    """What a rank keeps of a long pair."""
    rows = read(folder, "context-cpu.jsonl")
    if not rows:
        return NOTHING
    columns = ("pair, tokens", "ranks", "attention by", "recomputed", "kept of 1/N", "error")
    lines = [
        [
            str(row["options"]["prompt"] + 2 * row["options"]["response"]),
            str(row["ranks"]),
            row["attention"],
            "yes" if row["checkpointing"] else "no",
            f"{1 + row['beyond_share']:.3f}",
            f"{row['error']:.1e}",
        ]
        for row in rows
    ]
    return "\n\n".join([markdown(columns, lines, 4), *origins(rows)])


def hosts_block(folder: Path) -> str:
    """What two hosts train, and how a killed rank ends them."""
    rows = read(folder, "hosts.jsonl")
    if not rows:
        return NOTHING
    columns = ("run", "error of a weight", "exit codes", "s to the end of a kill")
    lines = [
        [
            row["case"],
            "" if "error" not in row else f"{row['error']:.1e}",
            ", ".join(map(str, row["codes"])),
            f"{row['seconds']:.1f}" if row["said"] else "",
        ]
        for row in rows
    ]
    return "\n\n".join([markdown(columns, lines, 1), *origins(rows)])
