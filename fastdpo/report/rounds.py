"""The page of rounds: what `fastdpo rounds` measured and sampled, round by round."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from .. import files
from . import charts
from .charts import Chart, Plan, Series
from .page import last_part, render
from .runs import REPORT, Run, as_object, read_config, read_lines, read_rows
from .text import number, seconds

LOG = "rounds.jsonl"
CONFIG = "rounds_config.yaml"
_SHOWN = 8
_QUANTILES = ("lowest", "lower quartile", "median", "upper quartile", "highest")
_AXIS = "round"

PLANS = (
    Plan("score", "Held-out score", (Series("held out", "score", "--chosen"),), axis=_AXIS),
    Plan(
        "win_rate",
        "Wins against the start",
        (Series("held out", "win_rate", "--chosen"),),
        "share of prompts, ties count ½",
        "share",
        _AXIS,
    ),
    Plan(
        "scores",
        "Scores of a round's answers",
        tuple(
            Series(name, f"scores/{name}", f"--run{place}") for place, name in enumerate(_QUANTILES)
        ),
        axis=_AXIS,
    ),
    Plan("tokens", "Length", (Series("held out", "tokens", "--train"),), "tokens", axis=_AXIS),
    Plan(
        "kl", "Divergence from the start", (Series("held out", "kl", "--train"),), "nats a token",
        axis=_AXIS,
    ),
    Plan(
        "judge_accuracy",
        "Pairs in which the judge prefers the chosen answer",
        (Series("held out", "judge_accuracy", "--chosen"),),
        "share of held-out pairs, ties count ½",
        "share",
        _AXIS,
    ),
    Plan(
        "endings",
        "How answers end and repeat",
        (
            Series("ended by the model", "complete", "--train"),
            Series("repeated 4-grams", "repetition", "--rejected"),
        ),
        "share",
        "share",
        _AXIS,
    ),
)  # fmt: skip


def is_rounds(folder: Path) -> bool:
    """Whether a directory is that of `fastdpo rounds`."""
    return (folder / LOG).is_file()


def write_rounds_report(folder: Path, live: bool = False) -> Path:
    """Write the page of the rounds in a directory there; it replaces the one before it at once.

    Raises:
        FastDPOError: the disk refuses.
    """
    path = folder / REPORT
    files.write_text(path, rounds_page(folder, live))
    return path


def rounds_page(folder: Path, live: bool = False) -> str:
    """The HTML of the rounds in a directory, as far as they have got."""
    held = map(as_object, read_lines(folder / LOG))
    lines = [line for line in held if isinstance(line.get("round"), int)]
    run = Run(
        name=folder.resolve().name,
        path=folder,
        rows=read_rows([_measured(line) for line in lines]),
        config=read_config(folder / CONFIG),
        live=live,
    )
    curves = charts.curves(run, PLANS)
    for chart in curves:  # no ticks between rounds
        chart.figure["layout"]["xaxis"]["dtick"] = -(-max(1, len(lines) - 1) // 12)
    return render(
        "rounds.html",
        title=run.name,
        live=live,
        run=run,
        status=_status(run, lines),
        summary=_summary(run),
        tiles=_tiles(run, lines),
        curves=curves,
        times=_times(lines),
        said=[(line["round"], text) for line in lines for text in _texts(line.get("said"))],
        samples=_samples(folder, lines),
        rounds=[_facts(line, folder) for line in lines],
        changed=run.changed(),
    )


def _measured(line: dict[str, Any]) -> dict[str, Any]:
    """A round as a line of metrics."""
    scores = line.get("scores")
    of_round = zip(_QUANTILES, scores, strict=False) if isinstance(scores, list) else ()
    return {**line, "step": line["round"], **{f"scores/{name}": value for name, value in of_round}}


def _status(run: Run, lines: list[dict[str, Any]]) -> tuple[str, str]:
    done, wanted = max((line["round"] for line in lines), default=0), run.config.get("rounds")
    of = f" of {wanted}" if isinstance(wanted, int) else ""
    if run.live:
        return "live", f"running: round {done + 1}{of}"
    if done == wanted or (lines and lines[-1].get("last")):
        return "finished", f"finished: {done} rounds"
    return "open", f"not finished: {done}{of} rounds"


def _summary(run: Run) -> list[tuple[str, str]]:
    config = run.config
    losses = config.get("loss_type")
    parts = [
        ("Model", last_part(config.get("model_name_or_path"))),
        ("Prompts", last_part(config.get("dataset_name"))),
        ("Judge", last_part(config.get("judge"))),
        ("Loss", " + ".join(map(str, losses)) if isinstance(losses, list) else None),
        ("Answers a prompt", config.get("num_generations")),
    ]
    return [(name, str(value)) for name, value in parts if value]


def _tiles(run: Run, lines: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    tiles = []
    for metric, title, unit in (
        ("score", "Held-out score", ""),
        ("win_rate", "Wins against the start", ""),
        ("tokens", "Tokens an answer", ""),
        ("kl", "Divergence from the start", "nats a token"),
    ):
        curve = run.curve(metric)
        if not curve:
            continue
        show = (lambda v: f"{v:.0%}") if metric == "win_rate" else number
        before = f"from {show(curve.values[0])} at the start" if metric != "kl" else unit
        tiles.append((title, show(curve.values[-1]), before))
    spent = sum(sum(_seconds(line).values()) for line in lines)
    if spent:
        tiles.append(("Time", seconds(spent), "of all rounds"))
    return tiles


def _seconds(line: dict[str, Any]) -> dict[str, float]:
    found = as_object(line.get("seconds"))
    return {str(n): float(s) for n, s in found.items() if isinstance(s, int | float)}


def _times(lines: list[dict[str, Any]]) -> Chart | None:
    """The seconds of each stage of each round, on top of each other."""
    spent = {line["round"]: found for line in lines if (found := _seconds(line))}
    if not spent:
        return None
    stages = list(dict.fromkeys(name for found in spent.values() for name in found))
    data = [
        {
            "type": "bar",
            "name": stage,
            "x": list(spent),
            "y": [found.get(stage, 0) for found in spent.values()],
            "marker": {"color": f"--run{place}"},
        }
        for place, stage in enumerate(stages)
    ]
    layout = charts.layout(Plan("times", "", (), "seconds", axis=_AXIS)) | {"barmode": "stack"}
    layout["xaxis"]["dtick"] = -(-len(spent) // 12)
    total = sum(map(sum, (found.values() for found in spent.values())))
    shares = {name: sum(found.get(name, 0) for found in spent.values()) / total for name in stages}
    words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    figure = {"data": data, "layout": layout}
    return Chart("times", "Time of a round's stages", figure, f"Of all rounds: {words}.")


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _samples(folder: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to the first held-out prompts, round by round."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        file = folder / f"round-{line['round']}" / "held-out.parquet"
        try:
            rows = parquet.read_table(
                file, columns=["prompt", "row", "responses", "complete", "scores"]
            ).slice(0, _SHOWN)
        except (OSError, ValueError):
            continue
        for row in rows.to_pylist():
            made = found.setdefault(row["row"], {"prompt": _turns(row["prompt"]), "answers": []})
            score = (row["scores"] or [None])[0]
            end = "" if row["complete"][0] else " …"
            made["answers"].append((line["round"], number(score), row["responses"][0] + end))
    return list(found.values())


def _turns(text: str) -> list[tuple[str, str]]:
    """A prompt as (role, text)."""
    prompt = json.loads(text)
    if isinstance(prompt, str):
        return [("", prompt)]
    return [(str(turn.get("role", "")), str(turn.get("content") or "")) for turn in prompt]


def _facts(line: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A round in the table of rounds."""
    reasons = as_object(line.get("left_out")) | as_object(line.get("failures"))
    report = Path(f"round-{line['round']}") / "model" / REPORT
    return {
        "round": line["round"],
        "page": report.as_posix() if (folder / report).is_file() else None,
        "taken": line.get("taken"),
        "rows": number(line.get("rows")),
        "loss": number(line.get("loss")),
        "left_out": [f"{count} {reason}" for reason, count in reasons.items()],
        "comparisons": [f"{n} {what}" for what, n in as_object(line.get("comparisons")).items()],
    }
