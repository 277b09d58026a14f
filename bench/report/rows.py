"""Rows of results, and the rules that every report of them shares.

Figures are medians of repetitions. A ratio is taken within one run: one case on one device, by one
command at one commit. Whoever trains something else than the others is not faster: a provider whose
losses do not agree gets the reason where its speed would stand.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..jsonl import read_rows

Row = dict[str, Any]
Run = dict[str, list[Row]]
"""The rows of one case in one run, by provider."""

LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Of the loss of a step, absolute, by the case's dtype. In fp32 two right trainers are within 1e-4
of each other, and one that truncates, orders or masks differently is off by 1e-2 or more at the
first update. bf16 rounds 2¹⁶ times as coarsely, and a margin of several nats by about 1e-2."""

NORM_TOLERANCE = {"fp32": 1e-2, "bf16": 0.1}
"""Of the gradient's norm at a step, relative. It tells trainers apart where the losses still lie at
ln 2: right ones are within 1e-4 of each other in fp32, and a wrong order or mask moves it by a
tenth and more."""

_PACKAGES = ("torch", "triton", "transformers", "trl")
_FAILURES = {
    "out of memory": ("OutOfMemory", "MemoryError"),
    "not installed": ("NotInstalled", "ImportError", "ModuleNotFoundError", "PackageNotFound"),
    "unsupported": ("Unsupported",),
}


def read(folder: Path, pattern: str = "heads-*.jsonl") -> list[Row]:
    """All rows of the files in `folder`, oldest first within a file."""
    return [row for file in sorted(folder.glob(pattern)) for row in read_rows(file)]


def newest_runs(folder: Path, subject: str) -> list[Run]:
    """The newest complete run of each case."""
    return newest(runs(read(folder, f"{subject}-*.jsonl")))


def runs(rows: Iterable[Row]) -> list[Run]:
    """Rows by case and run, oldest first; searches of the best batch size are left out."""
    by_key: dict[tuple[str, ...], Run] = {}
    for row in rows:
        if isinstance(row.get("case"), dict) and row.get("kind", "measurement") == "measurement":
            key = (case_key(row), row["device"], row["commit"], row["command"])
            by_key.setdefault(key, {}).setdefault(row["provider"], []).append(row)
    return list(by_key.values())


def newest(candidates: Iterable[Run]) -> list[Run]:
    """Without incomplete runs, and without those that a later one of the same case on the same
    device repeats with all of their providers.

    A run is complete when whoever did not fail has as many repetitions as the others.
    """
    kept: list[Run] = []
    for run in candidates:
        counts = {len(rows) for rows in run.values() if not any("error" in row for row in rows)}
        if len(counts) <= 1:
            kept = [old for old in kept if not (_same_case(old, run) and set(old) <= set(run))]
            kept.append(run)
    return kept


def first(run: Run) -> Row:
    """Any row of a run: for what they have in common."""
    return next(iter(run.values()))[0]


def flat(several: Iterable[Run]) -> list[Row]:
    """The rows of several runs."""
    return [row for run in several for rows in run.values() for row in rows]


def by_device(several: Iterable[Run]) -> list[list[Run]]:
    """Runs apart by device."""
    devices: dict[str, list[Run]] = {}
    for run in several:
        devices.setdefault(first(run)["device"], []).append(run)
    return list(devices.values())


def origins(rows: Iterable[Row], commands: bool = True) -> list[str]:
    """Device, versions, commit, date and commands of rows, one line each combination."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        known = row.get("versions", {})
        versions = [f"{name} {known[name]}" for name in _PACKAGES if known.get(name)]
        line = f"{row['device']}; {', '.join(versions)}; commit {row['commit']}, {row['date']}"
        lines.setdefault(line, []).append(_typed(row["command"]))
    return [
        line + (": " + ", ".join(f"`{each}`" for each in dict.fromkeys(ran)) if commands else "")
        for line, ran in lines.items()
    ]


def _typed(command: str) -> str:
    """What was typed, without the directories of this machine."""
    words = command.split(" ")
    if len(words) > 1 and Path(words[1]).name == "fastdpo":
        words = words[1:]
    return " ".join(Path(word).name if word.startswith("/") else word for word in words)


def case_key(row: Row) -> str:
    """The case as text, whatever the order of its keys."""
    return json.dumps(row["case"], sort_keys=True)


def _same_case(a: Run, b: Run) -> bool:
    return case_key(first(a)) == case_key(first(b)) and first(a)["device"] == first(b)["device"]


def values(rows: Iterable[Row], name: str) -> list[float]:
    """One figure of every repetition that has it."""
    return [row[name] for row in rows if row.get(name) is not None]


def median(rows: Iterable[Row], name: str) -> float | None:
    """Median of one figure; None where no repetition has it."""
    figures = values(rows, name)
    return statistics.median(figures) if figures else None


def is_ours(provider: str) -> bool:
    """Whether a provider of a head is one of our paths or configurations."""
    return provider.startswith(("fastdpo", "Config("))


def accepted(rows: Iterable[Row]) -> list[Row]:
    """Rows of a head that count: neither failed nor refused for their errors."""
    return [row for row in rows if "error" not in row and "refused" not in row]


def failure(rows: Iterable[Row]) -> str | None:
    """In short why a provider failed, None if it did not."""
    for row in rows:
        if "error" in row:
            error = str(row["error"])
            for short, names in _FAILURES.items():
                if any(name in error for name in names):
                    return short
            return "failed: " + error[:60]
        if "refused" in row:
            return "refused"
    return None


def agreed(rows: Iterable[Row]) -> dict[str, str | None]:
    """Of one case: None for every provider whose losses agree with those of the `measure`, for the
    others why their figures are refused. Providers that only failed are not in it.
    """
    done: Run = {}
    for row in rows:
        if "error" not in row:
            done.setdefault(row["provider"], []).append(row)
    if not done:
        return {}
    name = measure(done)
    refused = (_refusal(part, done[name][0], name) for part in done.values())
    return dict(zip(done, refused, strict=True))


def measure(providers: Iterable[str]) -> str:
    """Whose losses are the right ones: those of `trl`, where that ran; otherwise of another of
    TRL's, or of whoever comes first.
    """
    return min(providers, key=lambda name: (name != "trl", not name.startswith("trl"), name))


def _refusal(rows: list[Row], right: Row, name: str) -> str | None:
    """Why these rows are refused beside the right one, which is of this name."""
    dtype, count = right["case"]["dtype"], len(right.get("loss") or [])
    for row in rows:
        if not row.get("loss"):
            return "refused: no losses"
        if len(row["loss"]) != count:
            return f"refused: losses of {len(row['loss'])} steps, of {name} {count}"
        for step, (ours, theirs) in enumerate(zip(row["loss"], right["loss"], strict=True), 1):
            # Not `>`: a loss that is not a number is refused.
            if not abs(ours - theirs) <= LOSS_TOLERANCE[dtype]:
                return f"refused: the loss of step {step} is {ours:.5g}, of {name} {theirs:.5g}"
        for step, ours, theirs in beside(row, right, "grad_norm"):
            if not abs(ours - theirs) <= NORM_TOLERANCE[dtype] * abs(theirs):
                return (
                    f"refused: the gradient norm of step {step} is {ours:.4g}, of {name} "
                    f"{theirs:.4g}"
                )
    return None


def beside(row: Row, right: Row, name: str) -> Iterator[tuple[int, float, float]]:
    """Step, figure of one row and of the other, where both have it."""
    both = zip(row.get(name) or [], right.get(name) or [], strict=False)
    for step, (ours, theirs) in enumerate(both, 1):
        if ours is not None and theirs is not None:
            yield step, ours, theirs


def vacuous(row: Row) -> str | None:
    """Why equal losses prove nothing, where they do not: before the first update every trainer has
    ln 2, and losses that stay within their tolerance of that are had by whatever is computed.
    """
    later = (row.get("loss") or [])[1:]
    if not later:
        return "one step proves nothing"
    most = max(abs(loss - math.log(2)) for loss in later)
    if most > LOSS_TOLERANCE[row["case"]["dtype"]]:
        return None
    return f"losses within {most:.1e} of ln 2 prove nothing"
