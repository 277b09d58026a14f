"""The charts of a page as figures of plotly's, and each of them in words for who cannot see it.

A colour is the name of a variable of the page's style ("--chosen"), which has a value of its own in
light and in dark; the page's script puts that value in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .advice import chosen_change
from .curves import Curve
from .runs import Run
from .text import number

_MARKED = 12
"""Curves of fewer points show each of them."""


@dataclass(frozen=True)
class Series:
    """A metric on a chart."""

    label: str
    metric: str
    colour: str
    held_out: bool = False


@dataclass(frozen=True)
class Plan:
    """A chart that is drawn where any of its metrics was logged.

    Attributes:
        unit: what stands at its vertical axis.
        span: "share" for values from 0 to 1.
        axis: what the horizontal axis counts.
    """

    name: str
    title: str
    series: tuple[Series, ...]
    unit: str = ""
    span: Literal["free", "share"] = "free"
    axis: str = "step"


@dataclass(frozen=True)
class Chart:
    """A chart: `figure` is plotly's (data and layout), `words` say what is to be seen on it."""

    name: str
    title: str
    figure: dict[str, Any]
    words: str


def _trained(metric: str) -> tuple[Series, ...]:
    return (
        Series("training", metric, "--train"),
        Series("held out", f"eval_{metric}", "--held-out", True),
    )


def _sides(metric: str) -> tuple[Series, ...]:
    return tuple(
        Series(
            f"{side}, held out" if prefix else side,
            f"{prefix}{metric}/{side}",
            f"--{side}",
            bool(prefix),
        )
        for side in ("chosen", "rejected")
        for prefix in ("", "eval_")
    )


def _one(metric: str) -> tuple[Series, ...]:
    return (Series("training", metric, "--train"),)


PLANS = (
    Plan("loss", "Loss", _trained("loss")),
    Plan("accuracy", "Reward accuracy", _trained("rewards/accuracies"), span="share"),
    Plan("margin", "Reward margin", _trained("rewards/margins")),
    Plan("rewards", "Rewards", _sides("rewards")),
    Plan("logps", "Log-probabilities", _sides("logps"), "nats a response"),
    Plan("entropy", "Entropy", _trained("entropy"), "nats a token"),
    Plan("grad_norm", "Gradient norm", _one("grad_norm"), "before clipping"),
    Plan("learning_rate", "Learning rate", _one("learning_rate")),
    Plan("kl", "KL to the reference", _trained("kl")),
)
COSTS = (
    Plan("throughput", "Throughput", _one("tokens_per_second"), "tokens a second"),
    Plan("memory", "Peak memory", _one("peak_memory_mib"), "MiB"),
    Plan("mfu", "Model FLOPs utilisation", _one("mfu"), "share of the peak", "share"),
)


def curves(run: Run, plans: Sequence[Plan] = PLANS) -> list[Chart]:
    """The charts of one run."""
    charts = []
    for plan in plans:
        drawn = [(series, curve) for series in plan.series if (curve := run.curve(series.metric))]
        if not drawn:
            continue
        data = [trace for series, curve in drawn for trace in _traces(series, curve)]
        words = " ".join(
            _words(series.label.capitalize(), curve, plan.axis) for series, curve in drawn
        )
        if plan.name == "logps":
            words = " ".join(filter(None, [_fall(run), words]))
        figure = {"data": data, "layout": {**layout(plan), "showlegend": len(drawn) > 1}}
        charts.append(Chart(plan.name, plan.title, figure, words))
    return charts


def comparison(runs: Sequence[Run]) -> list[Chart]:
    """The charts of several runs on the same axes, one for each metric."""
    charts = []
    for plan in (*PLANS, *COSTS):
        for series in plan.series:
            drawn = [(run, curve) for run in runs if (curve := run.curve(series.metric))]
            if not drawn:
                continue
            title = plan.title if len(plan.series) == 1 else f"{plan.title}, {series.label}"
            data, words = [], []
            for run, curve in drawn:
                own = Series(run.name, series.metric, _colour(runs.index(run)), series.held_out)
                data += _traces(own, curve)
                words.append(_words(run.name, curve, plan.axis))
            figure = {"data": data, "layout": layout(plan)}
            name = series.metric.replace("/", "-")
            charts.append(Chart(name, title, figure, " ".join(words)))
    return charts


def lengths(facts: dict[str, Any]) -> Chart | None:
    """The histogram of `length_facts`; None where there is none."""
    edges, counts = facts.get("edges"), facts.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, dict) or len(edges) < 2:
        return None
    colours = {"chosen": "--chosen", "rejected": "--rejected"}
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": kind,
            "x": edges,
            "y": [*values, 0],
            "line": {"shape": "hv", "width": 2, "color": colours.get(kind, "--train")},
            "fill": "tozeroy",
            "fillcolor": f"{colours.get(kind, '--train')}-soft",
        }
        for kind, values in counts.items()
    ]
    figure = {
        "data": data,
        "layout": layout(Plan("lengths", "Lengths", (), "how many", axis="tokens")),
    }
    medians, longest = facts.get("medians", {}), facts.get("longest", {})
    words = [
        f"{kind.capitalize()}: median {number(medians.get(kind))} tokens, longest "
        f"{number(longest.get(kind))}."
        for kind in counts
    ]
    if (share := facts.get("longer_chosen")) is not None:
        words.append(f"The chosen response is the longer one in {share:.0%} of the pairs.")
    if facts.get("max_length"):
        words.append(f"Sequences are cut at {facts['max_length']:,} tokens.")
    if facts.get("groups", 0) < facts.get("of", 0):
        words.append(f"Of {facts['of']:,} prompts, {facts['groups']:,} were looked at.")
    return Chart("lengths", "Lengths", figure, " ".join(words))


def _colour(number: int) -> str:
    return f"--run{number % 8}"


def _traces(series: Series, curve: Curve) -> list[dict[str, Any]]:
    """A line; where it is ragged, pale, with its running mean over it."""
    thin = curve.thinned()
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if series.held_out or len(thin) < _MARKED else "lines",
        "name": series.label,
        "x": thin.steps,
        "y": thin.values,
        "line": {"color": series.colour, "width": 2},
        "marker": {"size": 7, "color": series.colour},
    }
    if series.held_out:
        trace["line"]["dash"] = "dash"
        return [trace]
    smooth = thin.smoothed()
    if smooth is None:
        return [trace]
    pale = {**trace, "showlegend": False, "opacity": 0.35, "line": {**trace["line"], "width": 1}}
    ours = {"x": smooth.steps, "y": smooth.values, "hoverinfo": "skip"}
    return [{**pale, "legendgroup": series.label}, {**trace, **ours, "legendgroup": series.label}]


def layout(plan: Plan) -> dict[str, Any]:
    """Plotly's layout of a chart."""
    axis = {
        "gridcolor": "--line",
        "zerolinecolor": "--line",
        "linecolor": "--line",
        "automargin": True,
        "exponentformat": "e",
    }
    made: dict[str, Any] = {
        "height": 280,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "--text", "size": 12, "family": "system-ui, sans-serif"},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "--card", "bordercolor": "--line", "font": {"color": "--text"}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {**axis, "title": {"text": plan.axis, "standoff": 8}, "rangemode": "tozero"},
        "yaxis": {**axis, "title": {"text": plan.unit, "standoff": 8}},
    }
    if plan.span == "share":
        made["yaxis"] |= {"range": [0, 1.03], "tickformat": ".0%"}
    return made


def _words(label: str, curve: Curve, axis: str) -> str:
    first, last = curve.steps[0], curve.steps[-1]
    if len(curve) == 1:
        return f"{label}: {number(curve.values[0])} at {axis} {first:.0f}."
    start, end = number(curve.values[0]), number(curve.values[-1])
    return f"{label}: {start} at {axis} {first:.0f}, {end} at {axis} {last:.0f}."


def _fall(run: Run) -> str:
    """In which direction both log-probabilities have moved, which the curves of single batches
    hide: their rows differ.
    """
    change = chosen_change(run)
    if change is None:
        return ""
    chosen, rejected, where = change
    moved = [
        f"{'fell' if nats < 0 else 'rose'} by {abs(nats):.1f} nats for {kind} responses"
        for kind, nats in (("chosen", chosen), ("rejected", rejected))
    ]
    return f"Since the first step, log-probability {' and '.join(moved)} ({where})."
