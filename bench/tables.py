"""Markdown tables from rows: medians with their spread, ratios within a run, and a row for whoever
failed or was refused (the rules are in `rows`).
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .rows import (
    Row,
    Run,
    accepted,
    agreed,
    failure,
    first,
    is_ours,
    median,
    reference_of,
    runs,
    vacuous,
    values,
)

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
_HEAD_COLUMNS = (
    "provider",
    "forward ms",
    "backward ms",
    "total ms (least–most)",
    "÷ products",
    "÷ fastdpo",
    "workspace MiB",
    "gradients MiB",
    "logp, nats",
    "dX",
    "dW",
    "same bits",
)
_MEMORY_COLUMNS = (
    "case",
    "trainer",
    "its keys",
    "peak MiB",
    "÷ trl",
    "planned MiB",
    "loss",
    "gradient norm",
)
_TRAINER_COLUMNS = (
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


def spread(found: Sequence[float], digits: int = 4) -> str:
    """Median (least–most); a single figure alone."""
    if not found:
        return ""
    middle, least, most = statistics.median(found), min(found), max(found)
    if len(found) == 1:
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


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table; the columns after the first `text_columns` are aligned right."""
    rules = ["---" if i < text_columns else "---:" for i in range(len(columns))]
    table = [columns, rules, *lines]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in line) + " |"
        for line in table
    )


def head_tables(rows: Iterable[Row]) -> str:
    """One table a case and run: times with their spread, ratios, memory, errors, failures."""
    return "\n\n".join(_head_table(run) for run in runs(rows))


def _head_table(run: Run) -> str:
    row = first(run)
    title = "**{regime}, {head} (V={vocab}, H={hidden}), T={tokens}, {dtype}, {device}**"
    right = {name: accepted(part) for name, part in run.items()}
    floor, ours = (median(right.get(name, []), "total_s") for name in ("products", "fastdpo"))
    lines = []
    for name in sorted(run, key=lambda name: median(right[name], "total_s") or math.inf):
        part, done = run[name], right[name]
        errors = [row["error"] for row in part if "error" in row]
        errors += [f"refused: {row['refused']}" for row in part if "refused" in row]
        shown = f"{name} ({errors[-1]} once)" if done and errors else name
        cells = _head_cells(done, floor, ours) if done else [errors[-1]]
        lines.append([shown, *cells, *[""] * (len(_HEAD_COLUMNS) - 1 - len(cells))])
    title = title.format(**row["case"], device=row["device"])
    return f"{title}\n\n{markdown(_HEAD_COLUMNS, lines)}"


def _head_cells(rows: list[Row], floor: float | None, ours: float | None) -> list[str]:
    last, total = rows[-1], median(rows, "total_s")
    forward = statistics.median(1e3 * row["forward_s"] for row in rows)
    backward = statistics.median(
        1e3 * row.get("backward_s", row["total_s"] - row["forward_s"]) for row in rows
    )
    return [
        number(forward, 4),
        number(backward, 4),
        spread([1e3 * seconds for seconds in values(rows, "total_s")]),
        ratio(total, floor),
        ratio(total, ours),
        *(f"{last[name]:.0f}" for name in ("workspace_mib", "gradient_mib")),
        *(_error(last, name) for name in ("logp_error", "dx_error", "dw_error")),
        "yes" if last["deterministic"] else "no",
    ]


def _error(row: Row, name: str) -> str:
    return f"{row[name]:.1e}" if name in row else ""


def head_summary(rows: Iterable[Row]) -> str:
    """One line a case and run: our time, its ratio to the bare products, and each peer's time over
    ours.
    """
    found = runs(rows)
    peers = list(dict.fromkeys(name for run in found for name in run if not is_ours(name)))
    peers = [name for name in peers if name != "products"]
    columns = ["regime", "head", "T", "dtype", "fastdpo ms", "÷ products"]
    columns += [*(f"{name} ÷" for name in peers), "workspace MiB", "logp, nats", "trl's"]
    lines = []
    for run in found:
        totals = {name: median(accepted(part), "total_s") for name, part in run.items()}
        ours, floor = totals.get("fastdpo"), totals.get("products")
        case, facts = first(run)["case"], run.get("fastdpo", [{}])[-1]
        cells = [case["regime"], case["head"], str(case["tokens"]), case["dtype"]]
        cells.append(number(1e3 * ours, 4) if ours else failure(facts and [facts]) or "")
        cells.append(ratio(ours, floor))
        for name in peers:
            cells.append(ratio(totals.get(name), ours) or failure(run.get(name, [])) or "")
        limit = f" of {case['workspace_limit_mib']}"
        cells.append(f"{facts['workspace_mib']:.0f}{limit}" if "workspace_mib" in facts else "")
        cells += [_error(part, "logp_error") for part in (facts, run.get("trl", [{}])[-1])]
        lines.append(cells)
    return markdown(columns, lines, 4)


def _largest(rows: list[Row], right: Row | None, name: str, relative: bool = False) -> str:
    """Largest difference of a figure of every step from the reference's."""
    theirs = (right or {}).get(name) or []
    found = [
        abs(a - b) / (abs(b) if relative and b else 1.0)
        for row in rows
        for a, b in zip(row.get(name) or [], theirs, strict=False)
    ]
    return f"{max(found):.1e}" if found else ""


def trainer_label(case: Row) -> str:
    """Model, data and what is not as usual, in words."""
    words = [text for key, (usual, text) in _USUAL.items() if case[key] != usual]
    names = [Path(case[key]).name for key in ("model", "data")]
    return ", ".join([*names, case["dtype"], *words])


def head_label(case: Row) -> str:
    """Regime, head, tokens and dtype, in words."""
    return f"{case['regime']}, {case['head']}, T={case['tokens']}, {case['dtype']}"


def trainer_tables(rows: Iterable[Row]) -> str:
    """One table a case and run: speed and memory with their ratios to TRL, agreement, failures."""
    parts = [_trainer_table(run) for run in runs(rows)]
    return "\n\n".join([*parts, NOTES]) if parts else ""


def _trainer_table(run: Run) -> str:
    row, verdicts = first(run), agreed([row for part in run.values() for row in part])
    theirs = run["trl"] if verdicts.get("trl", "") is None else []
    done = (row for row in run[reference_of(verdicts)] if "error" not in row) if verdicts else ()
    right = next(iter(done), None)
    lines = []
    for name in sorted(run, key=lambda name: -(median(run[name], "pairs_per_s") or 0)):
        part = run[name]
        agreement = [_largest(part, right, "loss"), _largest(part, right, "grad_norm", True)]
        if name not in verdicts:
            cells = [str(part[-1]["error"])]
        elif verdicts[name] is not None:
            cells = [verdicts[name] or "", *[""] * 6, *agreement]
        else:
            cells = [*_figures(part, theirs), *agreement]
        cells = [name, _settings(part), *cells]
        lines.append([*cells, *[""] * (len(_TRAINER_COLUMNS) - len(cells))])
    title = f"**{trainer_label(row['case'])}, {row['case']['pairs_per_step']} pairs a step, "
    table = f"{title}{row['device']}**\n\n{markdown(_TRAINER_COLUMNS, lines, 2)}"
    doubt = vacuous(right) if right else None
    return f"{table}\n\n{doubt}" if doubt else table


def _figures(rows: list[Row], theirs: list[Row]) -> list[str]:
    speed, mfu, peak = (median(rows, name) for name in ("pairs_per_s", "mfu", "peak_mib"))
    tokens = [median(rows, f"{kind}_tokens_per_s") for kind in ("useful", "computed")]
    return [
        spread(values(rows, "pairs_per_s")),
        ratio(speed, median(theirs, "pairs_per_s")),
        *("" if found is None else f"{found:.0f}" for found in tokens),
        "" if mfu is None else f"{100 * mfu:.1f} %",
        "" if peak is None else f"{peak:.0f}",
        ratio(peak, median(theirs, "peak_mib")),
    ]


def _settings(rows: list[Row]) -> str:
    """Of a provider, and how many of its repetitions failed if others did not."""
    found = next((row["settings"] for row in rows if row.get("settings")), {})
    words = [f"{key} {value}" for key, value in found.items() if value not in (None, "")]
    failed = [row for row in rows if "error" in row]
    if 0 < len(failed) < len(rows):
        words.append(f"{len(failed)} of {len(rows)} repetitions {failure(failed)}")
    return ", ".join(words)


def memory_table(rows: Iterable[Row]) -> str:
    """The newest peak of every trainer, with its own keys, on one pair of so many tokens, beside
    TRL's; and the longest pairs that were found.
    """
    cases: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    longest: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        case, own = row["case"], _own_keys(row)
        if row["kind"] == "longest":
            model = trainer_label({**case, "data": "one pair"})
            longest[row["device"], model, row["provider"], own] = [f"{row['tokens']}"]
        else:
            key = (row["device"], trainer_label(case), *map(str, (case["dtype"], case["steps"])))
            cases.setdefault(key, {})[row["provider"], own] = row
    parts = []
    if cases:
        lines = [line for found in cases.values() for line in _peaks(found)]
        parts.append(markdown(_MEMORY_COLUMNS, lines, 3))
    if longest:
        columns = ("device", "model", "trainer", "its keys", "longest pair, tokens")
        parts.append(markdown(columns, ([*key, *found] for key, found in longest.items()), 4))
    return "\n\n".join(parts)


def _own_keys(row: Row) -> str:
    prefix = f"{row['provider']}."
    keys = (key for key in row["case"].get("keys", ()) if key.startswith(prefix))
    return ", ".join(key.removeprefix(prefix) for key in keys)


def _peaks(found: dict[tuple[str, str], Row]) -> Iterator[list[str]]:
    right = next((row for (name, _), row in found.items() if name == "trl"), None)
    done = right if right and "error" not in right else None
    for (name, own), row in found.items():
        label = trainer_label(row["case"])
        if "error" in row:
            yield [label, name, own, failure([row]) or "", *[""] * 4]
            continue
        planned = row.get("planned_mib")
        yield [
            label,
            name,
            own,
            f"{row['peak_mib']:.0f}",
            ratio(row["peak_mib"], done["peak_mib"]) if done else "",
            f"{planned:.0f}" if planned else "",
            _largest([row], done, "loss"),
            _largest([row], done, "grad_norm", True),
        ]


def curves(rows: Iterable[Row], name: str) -> dict[str, list[tuple[float, float]]]:
    """(step, figure) of every evaluation of one case, by provider.

    Without the accuracy before training: all rewards are ties there, which TRL decides by rounding.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "eval" in row and (row["step"] or name != "accuracy"):
            found.setdefault(row["provider"], []).append((row["step"], row["eval"][name]))
    return {provider: sorted(points) for provider, points in found.items()}


def convergence_table(rows: Iterable[Row]) -> str:
    """One table a case and run: reward accuracy, margin and loss on held-out data, step by step,
    and how far apart the providers are at most.
    """
    parts = []
    for run in runs(rows):
        whole = [row for part in run.values() for row in part]
        lines = {name: curves(whole, name) for name in ("accuracy", "margin", "loss")}
        columns = ["step", *(f"{name}, {p}" for name in lines for p in lines[name])]
        points = [dict(points) for line in lines.values() for points in line.values()]
        steps = sorted({step for found in points for step in found})
        cells = [
            [f"{step:g}", *(number(found[step]) if step in found else "" for found in points)]
            for step in steps
        ]
        case = first(run)["case"]
        title = f"**{case['model']}, {case['data']}, {case['eval_pairs']} held-out pairs, "
        title += f"{first(run)['device']}**"
        failed = [f"{p}: {part[-1]['error']}" for p, part in run.items() if failure(part)]
        notes = [largest_differences(whole), *failed]
        parts.append("\n\n".join([title, markdown(columns, cells), *notes]))
    return "\n\n".join(parts)


def largest_differences(rows: Sequence[Row]) -> str:
    """In a sentence how far apart the providers of one case are at most."""
    names = ("accuracy", "margin", "loss")
    apart = ", ".join(f"{name} {_apart(curves(rows, name)):.2g}" for name in names)
    return f"Largest difference between providers: {apart}."


def _apart(line: dict[str, list[tuple[float, float]]]) -> float:
    by_step: dict[float, list[float]] = {}
    for points in line.values():
        for step, value in points:
            by_step.setdefault(step, []).append(value)
    return max((max(found) - min(found) for found in by_step.values()), default=math.nan)
