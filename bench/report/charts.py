"""Charts as SVG text, without a dependency, for a page that may be white or dark.

There is no background. The colours are readable on white and dark pages alike, and a page that says
it is dark gets lighter ones through `prefers-color-scheme`. Every bar carries its figure, so that
no axis has to be read; the thin line across its end goes from the least to the most.
"""

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from .rows import Row, Run, failure, first, median, values
from .tables import number

WIDTH = 760
PANEL_WIDTH, PANEL_HEIGHT = 370, 300
LIGHT = {"text": "#57606a", "faint": "#6b7280", "ours": "#0b7a75", "peer": "#8b949e"}
DARK = {"text": "#c9d1d9", "faint": "#9aa4b2", "ours": "#14a899", "peer": "#6e7681"}
_OTHERS = {"light": ("#c2410c", "#7c3aed", "#2563eb"), "dark": ("#fb923c", "#a78bfa", "#60a5fa")}
SCALES = "Each case has a scale of its own; the line across a bar's end: least to most."
_NAMES_END, _BARS_START, _LONGEST = 138, 148, 380
_ROW, _BAR = 23, 15


class Bar(NamedTuple):
    """A median and its spread."""

    value: float
    least: float
    most: float


def bar(rows: Sequence[Row], name: str, scale: float = 1.0) -> Bar | str:
    """The bar of a figure, or why a provider has none."""
    figures = [scale * value for value in values(rows, name)]
    if not figures:
        return failure(rows) or "not measured"
    return Bar((median(rows, name) or 0.0) * scale, min(figures), max(figures))


def ranked(group: Mapping[str, Bar | str], largest_first: bool) -> dict[str, Bar | str]:
    """Fastest first, then those without a bar."""

    def rank(name: str) -> tuple[bool, float]:
        bar = group[name]
        if isinstance(bar, str):
            return True, 0.0
        return False, -bar.value if largest_first else bar.value

    return {name: group[name] for name in sorted(group, key=rank)}


def named(run: Run, label: Callable[[Row], str]) -> str:
    """What a group of bars is called: its case and, in short, its device."""
    row = first(run)
    return f"{label(row['case'])} · {row['device'].split(',')[0].replace('(R)', '')}"


def _style() -> str:
    def rules(colours: Mapping[str, str], others: Sequence[str]) -> str:
        text, faint, ours, peer = (colours[name] for name in ("text", "faint", "ours", "peer"))
        lines = "".join(f".s{i}{{stroke:{colour}}}" for i, colour in enumerate(others))
        return (
            f"text{{fill:{text}}}.faint{{fill:{faint}}}.ours{{fill:{ours}}}.peer{{fill:{peer}}}"
            f".rule{{stroke:{text}}}.grid{{stroke:{faint}}}.us{{stroke:{ours}}}{lines}"
        )

    return (
        "<style>text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
        ".title{font-size:16px;font-weight:600}.strong{font-weight:600}.small{font-size:11px}"
        ".end{text-anchor:end}.middle{text-anchor:middle}.rule{stroke-width:1.3}"
        ".grid{stroke-width:1;opacity:.3}polyline{fill:none;stroke-linejoin:round}"
        ".us{stroke-width:6;opacity:.55;stroke-linecap:round}"
        ".s0,.s1,.s2{stroke-width:1.8;stroke-dasharray:6 3}"
        f"{rules(LIGHT, _OTHERS['light'])}"
        f"@media(prefers-color-scheme:dark){{{rules(DARK, _OTHERS['dark'])}}}</style>"
    )


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img">\n<title>{escape(title)}</title>\n'
        + "\n".join([_style(), *parts])
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    kinds = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{kinds}>{escape(text)}</text>'


def _paragraph(y: float, text: str) -> tuple[list[str], float]:
    """Small print from `y` on, and where it ends."""
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, 128)]
    return [_text(0, y + 15 * i, line, "small faint") for i, line in enumerate(lines)], (
        y + 15 * len(lines)
    )


def bars(
    title: str,
    unit: str,
    groups: Mapping[str, Mapping[str, Bar | str]],
    caption: str = "",
    relative_to: str = "",
) -> str:
    """Horizontal bars, one group a case, each group on a scale of its own.

    A text in place of a bar says why there is none. Where a group has a bar of `relative_to`, the
    others show their ratio to it.
    """
    parts, y = [_text(0, 18, title, "title"), _text(0, 38, unit, "faint")], 50.0
    for name, group in groups.items():
        y += 22
        parts.append(_text(0, y, name, "strong"))
        y += 9
        most = max((bar.most for bar in group.values() if isinstance(bar, Bar)), default=1.0)
        base = group.get(relative_to)
        for provider, bar in group.items():
            text_y = y + 12
            strong = " strong" if provider.startswith("fastdpo") else ""
            parts.append(_text(_NAMES_END, text_y, provider, "end" + strong))
            if isinstance(bar, Bar):
                share = _ratio(bar, base) if provider != relative_to else ""
                parts += _bar(provider, bar, share, y, _LONGEST / most)
            else:
                parts.append(_text(_BARS_START, text_y, bar, "faint"))
            y += _ROW
    small, y = _paragraph(y + 22, caption)
    return _svg(WIDTH, y + 4, title, [*parts, *small])


def _ratio(bar: Bar, base: Bar | str | None) -> str:
    if not isinstance(base, Bar) or not base.value:
        return ""
    return f"{number(bar.value / base.value)}×"


def _bar(provider: str, bar: Bar, share: str, y: float, scale: float) -> list[str]:
    ours = provider.startswith("fastdpo")
    least, most = _BARS_START + bar.least * scale, _BARS_START + bar.most * scale
    middle = y + _BAR / 2
    spread = f"{number(bar.value)} ({number(bar.least)}–{number(bar.most)})"
    parts = [
        f'<rect x="{_BARS_START}" y="{y:g}" width="{bar.value * scale:.2f}" height="{_BAR}" rx="2" '
        f'class="{"ours" if ours else "peer"}"><title>{escape(f"{provider}: {spread}")}</title>'
        "</rect>"
    ]
    if bar.most > bar.least:
        parts.append(
            f'<path class="rule" d="M{least:.2f} {middle:g}H{most:.2f}'
            f'M{least:.2f} {middle - 4:g}v8M{most:.2f} {middle - 4:g}v8"/>'
        )
    label = f'<tspan class="strong">{number(bar.value)}</tspan>'
    if share:
        label += f'<tspan dx="8" class="{"strong" if ours else "faint"}">{share}</tspan>'
    parts.append(f'<text x="{most + 9:.2f}" y="{y + 12:g}">{label}</text>')
    return parts


def ticks(least: float, most: float) -> list[float]:
    """Three to six round numbers that span an interval."""
    width = (most - least) or abs(most) or 1.0
    step = 10 ** math.floor(math.log10(width / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if width / (step * factor) <= 5)
    start = math.floor(least / step + 1e-9)
    end = math.ceil(most / step - 1e-9)
    return [round(i * step, 12) for i in range(start, max(end, start + 1) + 1)]


def lines(
    title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """Curves by provider: ours a broad band, the others dashed on top, so that those which lie on
    each other are both seen.
    """
    points = [point for line in series.values() for point in line]
    across = ticks(min(x for x, _ in points), max(x for x, _ in points))
    up = ticks(min(y for _, y in points), max(y for _, y in points))
    left, right, top, bottom = 44.0, PANEL_WIDTH - 12.0, 66.0, PANEL_HEIGHT - 40.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * (x - across[0]) / (across[-1] - across[0]),
            bottom - (bottom - top) * (y - up[0]) / (up[-1] - up[0]),
        )

    parts = [_text(0, 16, title, "strong"), _text(0, top - 10, y_label, "small faint")]
    for value in up:
        _, y = place(across[0], value)
        parts.append(f'<path class="grid" d="M{left:g} {y:.2f}H{right:g}"/>')
        parts.append(_text(left - 7, round(y + 4, 2), f"{value:g}", "small faint end"))
    for value in across:
        x, _ = place(value, up[0])
        parts.append(_text(round(x, 2), bottom + 17, f"{value:g}", "small faint middle"))
    parts.append(_text((left + right) / 2, bottom + 34, x_label, "small faint middle"))
    paths = {
        name: " ".join("{:.2f},{:.2f}".format(*place(x, y)) for x, y in line)
        for name, line in series.items()
    }
    return _svg(PANEL_WIDTH, PANEL_HEIGHT, title, [*parts, *_curves(paths)])


def _curves(paths: Mapping[str, str]) -> Iterator[str]:
    """Each curve and its line in the legend; ours first: what comes later is drawn on top."""
    legend, count = 0.0, 0
    for name in sorted(paths, key=lambda name: not name.startswith("fastdpo")):
        ours = name.startswith("fastdpo")
        kind = "us" if ours else f"s{count % len(_OTHERS['light'])}"
        count += not ours
        yield f'<polyline class="{kind}" points="{paths[name]}"><title>{escape(name)}</title>'
        yield "</polyline>"
        yield f'<polyline class="{kind}" points="{legend + 4:g},32 {legend + 26:g},32"/>'
        yield _text(legend + 34, 36, name, "strong" if ours else "")
        legend += 56 + 7.5 * len(name)


def panels(title: str, charts: Sequence[str], caption: str = "") -> str:
    """Line charts in one file, two beside each other."""
    parts = [_text(0, 18, title, "title")]
    for i, chart in enumerate(charts):
        x, y = (i % 2) * (WIDTH - PANEL_WIDTH), 38 + (i // 2) * PANEL_HEIGHT
        parts.append(chart.replace("<svg ", f'<svg x="{x}" y="{y}" ', 1).strip())
    rows = -(-len(charts) // 2)
    small, end = _paragraph(38 + rows * PANEL_HEIGHT + 18, caption)
    return _svg(WIDTH, end + 4, title, [*parts, *small])
