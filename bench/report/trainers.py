"""What the pages show of the trainers: the tables, the chart, and ours beside TRL's fastest."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from . import charts
from .rows import (
    Row,
    Run,
    agreed,
    by_device,
    case_key,
    failure,
    first,
    flat,
    measure,
    median,
    newest_runs,
    origins,
    read,
    runs,
    vacuous,
    values,
)
from .tables import NOTHING, image, largest, markdown, ratio, spread, whole

TRL = ("trl", "trl-flash", "trl-liger")
"""TRL's own trainer; the fastest of these is what ours is compared with."""

MFU_DEFINITION = (
    "model FLOPs utilisation: 6 FLOPs for every weight of the layers and computed token, and for "
    "every weight of the head and response token (4 where the weights are frozen), without "
    "attention's own products and without recomputation, divided by the GPU's dense bf16 peak; on "
    "a CPU by what a large matrix product reached in the same process"
)
NOTES = (
    "Useful tokens: those of prompt and chosen and of prompt and rejected, once a comparison; "
    "computed tokens: what went through the policy, padding included. Loss and gradient norm: the "
    f"largest absolute and relative difference of a step from TRL's. MFU: {MFU_DEFINITION}."
)
_COLUMNS = (
    "provider",
    "settings",
    "pairs/s (least–most)",
    "÷ trl",
    "useful tokens/s",
    "computed tokens/s",
    "MFU",
    "peak MiB",
    "÷ trl",
    "loss",
    "gradient norm",
)
_USUAL = {
    "lora": (False, "LoRA"),
    "gradient_checkpointing": (False, "gradient checkpointing"),
    "reference": ("precomputed", "online reference"),
}


def trainer_label(case: Row) -> str:
    """Model, data and what is not as usual, in words."""
    words = [text for key, (usual, text) in _USUAL.items() if case[key] != usual]
    names = [Path(case[key]).name for key in ("model", "data")]
    loss = [case["loss"]] if "loss" in case else []
    return ", ".join([*names, *loss, case["dtype"], *words])


def unit_of(case: Row) -> str:
    """What a step of this case counts."""
    unit: str = case.get("unit", "pairs")
    return unit


def trainer_tables(rows: Iterable[Row]) -> str:
    """One table a case and run: speed and memory with their ratios to TRL, agreement, failures."""
    parts = [_table(run) for run in runs(rows)]
    return "\n\n".join([*parts, NOTES]) if parts else ""


def _table(run: Run) -> str:
    case, verdicts = first(run)["case"], agreed(flat([run]))
    theirs = run["trl"] if verdicts.get("trl", "") is None else []
    done = (row for row in run[measure(verdicts)] if "error" not in row) if verdicts else ()
    right = next(iter(done), None)
    lines = []
    for name in sorted(run, key=lambda name: -(median(run[name], "pairs_per_s") or 0)):
        part = run[name]
        agreement = [largest(part, right, figure) for figure in ("loss", "grad_norm")]
        if name not in verdicts:
            cells = [str(part[-1]["error"])]
        elif (verdict := verdicts[name]) is not None:
            cells = [verdict, *[""] * 6, *agreement]
        else:
            cells = [*_figures(part, theirs), *agreement]
        lines.append([name, _settings(part), *cells])
    unit = unit_of(case)
    title = f"**{trainer_label(case)}, {case['pairs_per_step']} {unit} a step, "
    columns = [name.replace("pairs/s", f"{unit}/s") for name in _COLUMNS]
    table = f"{title}{first(run)['device']}**\n\n{markdown(columns, lines, 2)}"
    doubt = vacuous(right) if right else None
    return f"{table}\n\nLoss: {doubt}; see the gradient norm." if doubt else table


def _figures(rows: list[Row], theirs: list[Row]) -> list[str]:
    speed, mfu, peak = (median(rows, name) for name in ("pairs_per_s", "mfu", "peak_mib"))
    return [
        spread(values(rows, "pairs_per_s")),
        ratio(speed, median(theirs, "pairs_per_s")),
        *(whole(median(rows, f"{kind}_tokens_per_s")) for kind in ("useful", "computed")),
        "" if mfu is None else f"{100 * mfu:.1f} %",
        whole(peak),
        ratio(peak, median(theirs, "peak_mib")),
    ]


def _settings(rows: list[Row]) -> str:
    """Of a provider, and how many of its repetitions failed if others did not."""
    settings: Row = next((row["settings"] for row in rows if row.get("settings")), {})
    words = [f"{key} {value}" for key, value in settings.items() if value not in (None, "")]
    failed = [row for row in rows if "error" in row]
    if 0 < len(failed) < len(rows):
        words.append(f"{len(failed)} of {len(rows)} repetitions {failure(failed)}")
    return ", ".join(words)


def beside_trl(folder: Path, subject: str = "trainers") -> list[Run]:
    """Of each case and device the newest run of both."""
    last = {
        (case_key(first(run)), first(run)["device"]): run
        for run in newest_runs(folder, subject)
        if {"fastdpo", "trl"} <= set(run)
    }
    return list(last.values())


def fastest_trl(run: Run, verdicts: dict[str, str | None]) -> str | None:
    """The fastest of TRL's that is not refused; None where there is none."""
    done = [name for name in TRL if verdicts.get(name, "") is None]
    return max(done, key=lambda name: median(run[name], "pairs_per_s") or 0.0, default=None)


def trainers_block(folder: Path) -> str:
    """A chart, and a table for each device: ours beside TRL's fastest."""
    chart = image("trainers.svg", "Pairs per second of every trainer")
    tables = _beside(beside_trl(folder), "pairs/s")
    return "\n\n".join([chart, *tables]) if tables else NOTHING


def losses_block(folder: Path) -> str:
    """A table for each device: other losses than DPO's, ours beside TRL's trainers of them."""
    return "\n\n".join(_beside(beside_trl(folder, "losses"), "pairs or rows/s")) or NOTHING


def _beside(measured: list[Run], unit: str) -> list[str]:
    """A table for each device, and where it is from."""
    columns = ("model", "data", "run", f"fastdpo, {unit}", f"TRL, {unit}", "speed", "peak memory")
    parts = []
    for device in by_device(measured):
        parts.append(markdown(columns, map(_line, device), 3))
        parts.append("\n".join(origins(map(first, device))) + ".")
    return parts


def _line(run: Run) -> list[str]:
    verdicts = agreed(flat([run]))
    best = fastest_trl(run, verdicts)
    theirs = best or "trl"

    def speed(name: str) -> str:
        if name not in verdicts:
            return failure(run[name]) or ""
        return verdicts[name] or spread(values(run[name], "pairs_per_s"), 3)

    cells = [*trainer_label(first(run)["case"]).split(", ", 2), speed("fastdpo")]
    cells.append(speed(theirs) + ("" if theirs == "trl" else f", {theirs}"))
    if verdicts.get("fastdpo", "") is None and best:
        faster, memory = (
            f"{ratio(median(run['fastdpo'], key), median(run[best], key))}×"
            for key in ("pairs_per_s", "peak_mib")
        )
        cells += [faster, memory]
    return cells


def trainers_chart(folder: Path) -> str | None:
    """Pairs a second of every trainer in every case; None without rows."""
    measured, groups = beside_trl(folder), {}
    for run in measured:
        verdicts = agreed(flat([run]))
        group = {name: verdicts.get(name) or charts.bar(run[name], "pairs_per_s") for name in run}
        groups[charts.named(run, trainer_label)] = charts.ranked(group, largest_first=True)
    caption = "\n".join([*origins(map(first, measured), commands=False), charts.SCALES])
    unit = "pairs per second, longer is faster; × the speed of TRL"
    title = "DPO training, ours and other trainers"
    return charts.bars(title, unit, groups, caption, "trl") if measured else None


def gaps_block(folder: Path) -> str:
    """How long the GPU waits between the steps of our own trainer."""
    rows = read(folder, "gaps-*.jsonl")
    return "\n\n".join([gap_table(rows), *origins(rows)]) if rows else NOTHING


def gap_table(rows: Iterable[Row]) -> str:
    """Shares of the time of a step, medians."""
    by_case: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_case.setdefault((trainer_label(row["case"]), row["device"]), []).append(row)
    lines = []
    for (case, device), steps in by_case.items():
        shares = (
            statistics.median(step[name] / step["step_s"] for step in steps)
            for name in ("gap_s", "idle_s")
        )
        lines.append([case, device, str(len(steps)), *(f"{share:.2%}" for share in shares)])
    return markdown(("case", "device", "steps", "between steps", "without a kernel"), lines, 2)
