"""What the pages show of the time from rows to the first step."""

from pathlib import Path

from .rows import origins, read
from .tables import NOTHING, markdown, spread

_STARTS = {
    "trl": "TRL's preparation",
    "first": "first start",
    "cached": "start from the cache",
}


def start_block(folder: Path) -> str:
    """Seconds of each start beside TRL's, for each number of pairs."""
    newest = {(row["command"], row["start"]): row["commit"] for row in read(folder, "start.jsonl")}
    rows = [
        row
        for row in read(folder, "start.jsonl")
        if row["commit"] == newest[row["command"], row["start"]]
    ]
    if not rows:
        return NOTHING
    lines = []
    for command in dict.fromkeys(row["command"] for row in rows):
        for start, words in _STARTS.items():
            own = [row for row in rows if (row["command"], row["start"]) == (command, start)]
            if not own:
                continue
            names = ("rows", "tokens") if start == "trl" else ("groups", "plan", "step")
            whole, cores = (
                [sum(row[f"{name}_{kind}"] for name in names) for row in own]
                for kind in ("s", "cpu_s")
            )
            plans = [row["plan_s"] for row in own if "plan_s" in row]
            gib = [row["resident_mib"] / 1024 for row in own]
            figures = (spread(whole, 3), spread(cores, 3), spread(plans, 2) if plans else "")
            lines.append([words, str(own[0]["options"]["pairs"]), *figures, spread(gib, 2)])
    columns = ("", "pairs", "seconds", "processor seconds", "of which the plan", "resident, GiB")
    return "\n\n".join([markdown(columns, lines), *origins(rows)])
