"""Rows of results, and the rules that every report of them shares.

Figures are medians of repetitions. A ratio is taken within one run: one case on one device, by one
command at one commit. Whoever trains something else than the others is not faster: a provider whose
losses do not agree gets the reason where its speed would stand.
"""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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

_FAILURES = {
    "out of memory": ("OutOfMemory", "MemoryError"),
    "not installed": ("NotInstalled", "ImportError", "ModuleNotFoundError", "PackageNotFound"),
    "unsupported": ("Unsupported",),
}


def read(folder: Path, pattern: str = "heads-*.jsonl") -> list[Row]:
    """All rows of the files in `folder`, oldest first within a file."""
    return [row for file in sorted(folder.glob(pattern)) for row in read_file(file)]


def read_file(file: Path) -> list[Row]:
    """All rows of one file, oldest first."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def runs(rows: Iterable[Row]) -> list[Run]:
    """Rows by case and run, oldest first; searches of the best batch size are left out."""
    found: dict[tuple[str, ...], Run] = {}
    for row in rows:
        if isinstance(row.get("case"), dict) and row.get("kind", "measurement") == "measurement":
            key = (case_key(row), row["device"], row["commit"], row["command"])
            found.setdefault(key, {}).setdefault(row["provider"], []).append(row)
    return list(found.values())


def newest(found: Iterable[Run]) -> list[Run]:
    """Without incomplete runs, and without those that a later one of the same case on the same
    device repeats with all of their providers.

    A run is complete when whoever did not fail has as many repetitions as the others.
    """
    kept: list[Run] = []
    for run in found:
        counts = {len(rows) for rows in run.values() if not any("error" in row for row in rows)}
        if len(counts) <= 1:
            kept = [old for old in kept if not (_same_case(old, run) and set(old) <= set(run))]
            kept.append(run)
    return kept


def first(run: Run) -> Row:
    """Any row of a run: for what they have in common."""
    return next(iter(run.values()))[0]


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
    found = values(rows, name)
    return statistics.median(found) if found else None


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
    """Of one case: None for every provider whose losses agree with the reference's, for the others
    why their figures are refused. Providers that only failed are not in it.

    The reference is `trl`, where that ran; otherwise another of TRL's, or whoever came first.
    """
    done: Run = {}
    for row in rows:
        if "error" not in row:
            done.setdefault(row["provider"], []).append(row)
    if not done:
        return {}
    reference = reference_of(done)
    case = first(done)["case"]
    right = done[reference][0]
    return {
        name: _refusal(part, right.get("loss") or [], reference, LOSS_TOLERANCE[case["dtype"]])
        or _norm_refusal(part, right, reference, NORM_TOLERANCE[case["dtype"]])
        for name, part in done.items()
    }


def reference_of(providers: Iterable[str]) -> str:
    """Whose losses are the measure."""
    names = list(providers)
    return min(names, key=lambda name: (name != "trl", not name.startswith("trl"), name))


def _refusal(rows: list[Row], right: list[float], reference: str, tolerance: float) -> str | None:
    for row in rows:
        losses = row.get("loss") or []
        if not losses:
            return "refused: no losses"
        if len(losses) != len(right):
            return f"refused: losses of {len(losses)} steps, of {reference} {len(right)}"
        for step, (ours, theirs) in enumerate(zip(losses, right, strict=True), start=1):
            # Not `>`: a loss that is not a number is refused.
            if not abs(ours - theirs) <= tolerance:
                return (
                    f"refused: the loss of step {step} is {ours:.5g}, of {reference} {theirs:.5g}"
                )
    return None


def _norm_refusal(rows: list[Row], right: Row, reference: str, tolerance: float) -> str | None:
    theirs = right.get("grad_norm") or []
    for row in rows:
        pairs = zip(row.get("grad_norm") or [], theirs, strict=False)
        for step, (our, their) in enumerate(pairs, start=1):
            if not abs(our - their) <= tolerance * abs(their):
                return (
                    f"refused: the gradient norm of step {step} is {our:.4g}, of {reference} "
                    f"{their:.4g}"
                )
    return None


def vacuous(row: Row) -> str | None:
    """A warning where the losses never leave ln 2 by more than their tolerance: whatever a trainer
    computes agrees with that.
    """
    most = max((abs(loss - math.log(2)) for loss in row.get("loss") or []), default=0.0)
    if most > LOSS_TOLERANCE[row["case"]["dtype"]]:
        return None
    return (
        f"The losses stay within {most:.1e} of ln 2, which their tolerance does not tell apart: "
        "see the gradient norm."
    )
