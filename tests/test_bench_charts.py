"""Charts show what they are given, on white pages and on dark ones."""

from xml.etree import ElementTree

import pytest
from bench_rows import SVG, texts

from bench.report import charts
from bench.report.charts import Bar


def test_bars() -> None:
    groups = {
        "a < b & c": {
            "fastdpo": Bar(8.0, 7.0, 10.0),
            "trl": Bar(2.0, 2.0, 2.0),
            "cce": "out of memory",
        },
        "second": {"fastdpo": Bar(0.02, 0.02, 0.02)},
    }
    svg = charts.bars("Title", "pairs/s", groups, "a device\nversions", "trl")
    root = ElementTree.fromstring(svg)
    assert root.findtext(f"{SVG}title") == "Title"
    shown = texts(svg)
    assert shown[:3] == ["Title", "pairs/s", "a < b & c"]
    assert shown[-2:] == ["a device", "versions"]
    assert "8.00 4.00×" in shown and "2.00" in shown and "out of memory" in shown
    assert "0.0200" in shown
    rects = list(root.iter(f"{SVG}rect"))
    assert [rect.get("class") for rect in rects] == ["ours", "peer", "ours"]
    widths = [float(rect.get("width", 0)) for rect in rects]
    assert widths[0] / widths[1] == pytest.approx(4.0, rel=1e-3)
    # A group of its own scale; no whisker where all repetitions are the same.
    assert widths[2] == pytest.approx(widths[0] * 10 / 8, rel=1e-3)
    (whisker,) = [path.get("d", "") for path in root.iter(f"{SVG}path")]
    ends = [float(part) for part in whisker.split()[0].removeprefix("M").split(",")]
    assert ends[0] == pytest.approx(float(rects[0].get("x", 0)) + widths[0] * 7 / 8, rel=1e-3)
    assert max(float(each.get("y", 0)) for each in root.iter(f"{SVG}text")) < float(
        root.get("height", 0)
    )


def test_lines() -> None:
    series = {"trl": [(0, 0.5), (10, 0.75)], "fastdpo": [(0, 0.5), (10, 1.0)]}
    svg = charts.panels("Both", [charts.lines("accuracy", "step", "share", series)] * 3, "caption")
    root = ElementTree.fromstring(svg)
    nested = root.findall(f"{SVG}svg")
    assert len({(each.get("x"), each.get("y")) for each in nested}) == 3
    curves = [each for each in nested[0].iter(f"{SVG}polyline") if len(each)]
    assert [each.findtext(f"{SVG}title") for each in curves] == ["fastdpo", "trl"]
    (_, start), (_, ours) = _points(curves[0])
    theirs = _points(curves[1])[1][1]
    assert (start - theirs) / (start - ours) == pytest.approx(0.5, abs=1e-2)
    assert {"accuracy", "share", "step", "fastdpo", "trl"} <= set(texts(svg))


def _points(curve: ElementTree.Element) -> list[tuple[float, ...]]:
    return [tuple(map(float, pair.split(","))) for pair in curve.get("points", "").split()]


def test_ticks_span_the_interval() -> None:
    for least, most in ((0, 1), (0.51, 0.93), (-3e-4, 2e-3), (5, 5), (0, 0), (0, 137)):
        found = charts.ticks(least, most)
        assert found[0] <= least and found[-1] >= most and 2 <= len(found) <= 7
        assert found == sorted(set(found))


def contrast(a: str, b: str) -> float:
    """WCAG 2.1's contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_charts_can_be_read_on_white_and_on_dark() -> None:
    dark = "#0d1117"
    for name, least in (("text", 4.5), ("faint", 4.5), ("ours", 4.5), ("peer", 3.0)):
        assert contrast(charts.LIGHT[name], "#ffffff") >= least, name
        assert contrast(charts.DARK[name], dark) >= least, name
        # A page may be dark without saying so.
        assert contrast(charts.LIGHT[name], dark) >= 2.9, name
    svg = charts.bars("t", "u", {})
    assert "prefers-color-scheme:dark" in svg and "<rect" not in svg
