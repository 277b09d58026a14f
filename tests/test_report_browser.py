"""The report as a browser shows it: charts drawn, nothing on the console, nothing from the network,
readable in both schemes and on a narrow screen.
"""

import json

import pytest
from browser import CHROMIUM, chromium
from report_rounds import write_rounds
from report_runs import CHECKS, FACTS, HOSTILE, write_run

from fastdpo.report.page import comparison_page, page
from fastdpo.report.rounds import rounds_page
from fastdpo.report.runs import read_run, read_runs

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

CONTRAST = """
(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => {
    const v = c[i] / 255;
    return sum + share * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const found = rgb(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const seen = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = rgb(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
    seen.push([(a + 0.05) / (b + 0.05), node.data.trim().slice(0, 40)]);
  }
  return seen;
})()
"""
OVERFLOWING = """
[...document.querySelectorAll("body *")].filter((e) =>
  !e.closest(".scroll, svg, .chart") && e.getBoundingClientRect().right > innerWidth + 0.5
).map((e) => e.tagName + "." + e.className)
"""
DRAWN = "document.querySelectorAll('.chart .main-svg').length > 0"
CHARTS = """
[...document.querySelectorAll(".chart")].map((c) => [
  c.querySelectorAll(".scatterlayer .trace path, .barlayer path").length,
  c.querySelector(".main-svg").getBoundingClientRect().width <= c.clientWidth + 1,
])
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run's page, that of one that goes on, and a comparison; all with text that would act."""
    folder = tmp_path_factory.mktemp("runs")
    sample = {"prompt": [["user", HOSTILE * 9]], "before": HOSTILE, "after": "x" * 500}
    facts = {"samples": [*FACTS["samples"], sample]}
    bad = {"eval_loss": lambda s: 0.69 - 0.3 * s + 0.5 * s * s}
    bad |= {"eval_logps/chosen": lambda s: -120 - 4 * s}
    first = write_run(folder / ("long" * 20), 300, held_out=bad, facts=facts, checks=CHECKS)
    second = write_run(folder / "second", beta=0.5)
    made = {
        "run": page(read_run(first)),
        "live": page(read_run(first, live=True)),
        "comparison": comparison_page(read_runs([first, second])),
        "rounds": rounds_page(write_rounds(folder / "rounds")),
    }
    for name, html in made.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "drawn", "texts"),
    [("run", 11, 150), ("comparison", 11, 150), ("rounds", 7, 100)],
    ids=["run", "comparison", "rounds"],
)
def test_a_page_is_shown(tab, pages, name, drawn, texts, scheme, width):
    tab.open(pages[name], width, scheme=scheme)
    tab.wait(DRAWN)
    assert tab.said == [] and tab.asked == []
    charts = tab.value(CHARTS)
    assert len(charts) >= drawn and all(lines > 0 and fits for lines, fits in charts)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(OVERFLOWING) == []
    seen = tab.value(CONTRAST)
    assert len(seen) >= texts
    assert [one for one in seen if one[0] < 4.5] == []
    background = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(245, 246, 248)") == (scheme == "light")


def test_the_switch_works_by_keyboard_and_repaints_the_charts(tab, pages):
    tab.open(pages["run"])
    tab.wait(DRAWN)
    ink = "getComputedStyle(document.querySelector('.chart text')).fill"
    before = tab.value(ink), tab.value("getComputedStyle(document.body).backgroundColor")
    assert tab.value("document.getElementById('dark').getAttribute('aria-checked')") == "false"
    tab.press("Tab")
    assert tab.value("document.activeElement.id") == "dark"
    tab.press(" ")
    tab.wait("document.documentElement.dataset.theme === 'dark'")
    assert tab.value("document.getElementById('dark').getAttribute('aria-checked')") == "true"
    after = tab.value(ink), tab.value("getComputedStyle(document.body).backgroundColor")
    assert before[0] != after[0] and before[1] != after[1]
    tab.press("Enter")
    tab.wait("document.documentElement.dataset.theme === 'light'")
    assert tab.value(ink) == before[0] and tab.said == []


def test_a_page_of_a_run_that_goes_on_follows_it_unless_told_not_to(tab, pages):
    tab.open(pages["live"])
    tab.wait(DRAWN)
    assert tab.value("[follow.checked, follow.dataset.seconds]") == [True, "30"]
    soon = pages["live"].with_name("soon.html")
    text = pages["live"].read_text(encoding="utf-8")
    soon.write_text(text.replace('data-seconds="30"', 'data-seconds="1"'), encoding="utf-8")
    tab.open(soon)
    tab.value("window.old = true")
    tab.wait("window.old === undefined && document.readyState === 'complete'")
    tab.value("follow.click(); window.old = true")
    tab.value("new Promise((resolve) => setTimeout(resolve, 3000))")
    assert tab.value("window.old") is True and tab.said == []


def test_a_run_read_without_a_script_still_has_its_figures(tab, pages):
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(pages["run"])
        text = json.dumps(tab.value("document.body.innerText"))
        assert "scripts are off here" in text and "Held out: 0.69 at step 0" in text
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
