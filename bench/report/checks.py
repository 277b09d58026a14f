"""What the pages show of `fastdpo check`: planted faults that it finds, its time, and wrong labels
that it finds with a model.
"""

from pathlib import Path

from .rows import Row, origins, read
from .tables import NOTHING, markdown, number, spread

_KINDS = {
    "exact_duplicate": "rows again, with other white space and case",
    "contradiction": "rows again, their responses swapped",
    "shared_prompt": "prompts to evaluate on, with other white space and case",
    "near_duplicate": "rows again, up to 24 of their words replaced, similarity at least 0.8",
    "near_shared_prompt": "prompts to evaluate on, a word replaced",
}
_MEASURES = {
    "logp": "log-probability",
    "logp_per_token": "a token",
    "reward": "implicit reward, cross-fitted",
}
_DATA = {
    "demo": "the demo's pairs, in which the shorter response always wins",
    "gsm8k": "GSM8K, right beside wrong solutions",
}


def faults_block(folder: Path) -> str:
    """Of each kind of planted fault: how many, the share that was found, and of what was found the
    share that was planted.
    """
    rows = [row for row in _newest(folder, "faults") if "planted" in row]
    if not rows:
        return NOTHING
    lines = []
    for name, what in _KINDS.items():
        own = [row for row in rows if row["fault"] == name]
        planted, found, right = (sum(row[k] for row in own) for k in ("planted", "found", "right"))
        shares = [number(right / whole, 4) if whole else "" for whole in (planted, found)]
        lines.append([f"`{name}`", what, str(planted), *shares])
    columns = ("finding", "planted", "rows", "found of these", "these of the found")
    return "\n\n".join([markdown(columns, lines, 2), _lengths(folder), *origins(rows)])


def _lengths(folder: Path) -> str:
    shares: dict[float, list[bool]] = {}
    for row in _newest(folder, "faults"):
        if "longer_wins" in row:
            shares.setdefault(row["longer_wins"], []).append(row["warned"])
    said = ", ".join(
        f"{share:.0%} in {sum(warned)} of {len(warned)}" for share, warned in sorted(shares.items())
    )
    return f"`length_bias` is a warning where the longer response wins {said} sets."


def speed_block(folder: Path) -> str:
    """Seconds for a file of pairs."""
    rows = _newest(folder, "speed")
    if not rows:
        return NOTHING
    lines = []
    for name in dict.fromkeys(row["rows"] for row in rows):
        own = [row for row in rows if row["rows"] == name]
        times = [spread([row[key] for row in own], 3) for key in ("cpu_seconds", "seconds")]
        lines.append([name, str(own[0]["pairs"]), *times])
    columns = ("rows", "pairs", "processor seconds", "seconds")
    return "\n\n".join([markdown(columns, lines), *origins(rows)])


def labels_block(folder: Path) -> str:
    """The area under the curve of each measure, for each set of pairs."""
    cases: dict[tuple[str, bool], list[Row]] = {}
    for row in read(folder, "check.jsonl"):
        if row["part"] == "labels":
            case = cases.setdefault((row["data"], "reward" in row["auc"]), [])
            if case and case[0]["command"] != row["command"]:
                case.clear()
            case.append(row)
    if not cases:
        return NOTHING
    lines = [
        [
            _DATA[data],
            str(own[0]["pairs"]),
            str(own[0]["swapped"]),
            *(
                spread([row["auc"][name] for row in own if name in row["auc"]], 3)
                for name in _MEASURES
            ),
        ]
        for (data, _), own in cases.items()
    ]
    columns = ("pairs of", "pairs", "swapped", *_MEASURES.values())
    rows = [row for own in cases.values() for row in own]
    return "\n\n".join([markdown(columns, lines), *origins(rows)])


def _newest(folder: Path, part: str) -> list[Row]:
    """The rows of a part at its newest commit."""
    rows = [row for row in read(folder, "check.jsonl") if row["part"] == part]
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]
