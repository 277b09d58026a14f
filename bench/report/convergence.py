"""What the pages show of whole runs: the curves of both trainers, and how far they are apart."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import charts
from .rows import Row, failure, first, flat, newest_runs, origins, runs
from .tables import NOTHING, image, markdown, number

Points = list[tuple[float, float]]


def curves(rows: Iterable[Row], name: str) -> dict[str, Points]:
    """(step, figure) of every evaluation of one case, by provider.

    Without the accuracy before training: all rewards are ties there, which TRL decides by rounding.
    """
    lines: dict[str, Points] = {}
    for row in rows:
        if "eval" in row and (row["step"] or name != "accuracy"):
            lines.setdefault(row["provider"], []).append((row["step"], row["eval"][name]))
    return {provider: sorted(points) for provider, points in lines.items()}


def convergence_table(rows: Iterable[Row]) -> str:
    """One table a case and run: reward accuracy, margin and loss on held-out data, step by step,
    and how far apart the providers are at most.
    """
    parts = []
    for run in runs(rows):
        lines = {name: curves(flat([run]), name) for name in ("accuracy", "margin", "loss")}
        columns = ["step", *(f"{name}, {p}" for name in lines for p in lines[name])]
        figures = [dict(points) for line in lines.values() for points in line.values()]
        steps = sorted({step for by_step in figures for step in by_step})
        cells = [
            [f"{step:g}", *(number(by[step]) if step in by else "" for by in figures)]
            for step in steps
        ]
        case = first(run)["case"]
        title = f"**{case['model']}, {case['data']}, {case['eval_pairs']} held-out pairs, "
        title += f"{first(run)['device']}**"
        failed = [f"{p}: {part[-1]['error']}" for p, part in run.items() if failure(part)]
        notes = [largest_differences(flat([run])), *failed]
        parts.append("\n\n".join([title, markdown(columns, cells), *notes]))
    return "\n\n".join(parts)


def largest_differences(rows: Sequence[Row]) -> str:
    """In a sentence how far apart the providers of one case are at most."""
    names = ("accuracy", "margin", "loss")
    apart = ", ".join(f"{name} {largest_difference(rows, name):.2g}" for name in names)
    return f"Largest difference between providers: {apart}."


def largest_difference(rows: Iterable[Row], name: str) -> float:
    """Of one figure, between the providers of one case at the same step; NaN where they were not
    evaluated at the same steps.
    """
    lines = [dict(points) for points in curves(rows, name).values()]
    if len({tuple(line) for line in lines}) != 1:
        return math.nan
    by_step = ([line[step] for line in lines] for step in lines[0])
    return max((max(each) - min(each) for each in by_step), default=math.nan)


def convergence_block(folder: Path) -> str:
    """The curves of the same run by both trainers."""
    measured = newest_runs(folder, "convergence")
    if not measured:
        return NOTHING
    parts = [image("convergence.svg", "Held-out reward accuracy and margin, both trainers")]
    parts += [largest_differences(flat([run])) for run in measured]
    return "\n\n".join([*parts, "\n".join(origins(map(first, measured))) + "."])


def convergence_chart(folder: Path) -> str | None:
    """Held-out reward accuracy and margin of both trainers; None without rows."""
    measured, parts = newest_runs(folder, "convergence"), []
    for run in measured:
        case = first(run)["case"]
        for name, unit in (("accuracy", "share of pairs"), ("margin", "reward")):
            series = curves(flat([run]), name)
            if series:
                parts.append(charts.lines(f"{name}, {case['data']}", "step", unit, series))
    caption = "\n".join(origins(map(first, measured), commands=False))
    title = "Held-out pairs, the same run by both trainers"
    return charts.panels(title, parts, caption) if parts else None
