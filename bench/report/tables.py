"""Tables in Markdown, and how figures are written in them."""

import math
import statistics
from collections.abc import Iterable, Sequence

from .rows import Row, beside

NOTHING = "Not measured yet."


def spread(figures: Sequence[float], digits: int = 4) -> str:
    """Median (least–most); a single figure alone."""
    if not figures:
        return ""
    middle, least, most = statistics.median(figures), min(figures), max(figures)
    if len(figures) == 1:
        return number(middle, digits)
    return f"{number(middle, digits)} ({number(least, digits)}–{number(most, digits)})"


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits, never an exponent where a person would not write one."""
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits}g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def ratio(value: float | None, other: float | None) -> str:
    """`value ÷ other`; nothing where either is missing."""
    return f"{value / other:.2f}" if value is not None and other else ""


def whole(value: float | None) -> str:
    """A rounded number; nothing where it is missing."""
    return "" if value is None else f"{value:.0f}"


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table; the columns after the first `text_columns` are aligned right, and what a line lacks
    is empty.
    """
    rules = ["---" if i < text_columns else "---:" for i in range(len(columns))]
    table = [[*line, *[""] * (len(columns) - len(line))] for line in (columns, rules, *lines)]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in line) + " |"
        for line in table
    )


def image(chart: str, alt: str) -> str:
    """A chart of bench/results, linked as from the root of the repository."""
    return f"![{alt}](bench/results/{chart})"


def largest(rows: Iterable[Row], right: Row | None, name: str, first_step: int = 1) -> str:
    """Largest difference of a figure of every step from that of the right row: of the loss the
    absolute, of the gradient norm the relative one.
    """
    apart = [
        abs(ours - theirs) / (abs(theirs) if name == "grad_norm" and theirs else 1.0)
        for row in rows
        for step, ours, theirs in beside(row, right or {}, name)
        if step >= first_step
    ]
    return f"{max(apart):.1e}" if apart else ""
