"""What the pages show of memory: the peaks of one long pair, and the longest pairs that train."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from .rows import Row, failure, origins, read, vacuous
from .tables import NOTHING, largest, markdown, ratio, whole
from .trainers import trainer_label

_COLUMNS = (
    "case",
    "trainer",
    "its keys",
    "peak MiB",
    "÷ trl",
    "planned MiB",
    "loss",
    "gradient norm",
)
_NOTES = (
    "Loss and gradient norm: the largest absolute and relative difference from TRL's, of the steps "
    "after the first update. Before it, the loss is ln 2 whatever a trainer computes."
)


def memory_block(folder: Path) -> str:
    """Peaks of one long pair, and the longest pairs."""
    rows = read(folder, "memory-*.jsonl")
    if not rows:
        return NOTHING
    return "\n\n".join([memory_table(rows), _NOTES, ".\n\n".join(origins(rows)) + "."])


def memory_table(rows: Iterable[Row]) -> str:
    """The newest peak of every trainer, with its own keys, on one pair of so many tokens, beside
    TRL's; and the longest pairs that were found.
    """
    longest: dict[tuple[str, ...], list[str]] = {}
    peaks: list[Row] = []
    for row in rows:
        if row["kind"] == "longest":
            model = trainer_label({**row["case"], "data": "one pair"})
            key = (row["device"], model, row["provider"], own_keys(row))
            longest[key] = [f"{row['tokens']}"]
        else:
            peaks.append(row)
    parts = []
    if peaks:
        lines = [line for case in cases(peaks) for line in _lines(case)]
        parts.append(markdown(_COLUMNS, lines, 3))
    if longest:
        columns = ("device", "model", "trainer", "its keys", "longest pair, tokens")
        parts.append(markdown(columns, ([*key, *cell] for key, cell in longest.items()), 4))
    return "\n\n".join(parts)


def cases(rows: Iterable[Row]) -> list[list[Row]]:
    """The newest row of every trainer and its own keys, by case and device."""
    by_case: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        case = row["case"]
        key = (row["device"], trainer_label(case), case["dtype"], str(case["steps"]))
        by_case.setdefault(key, {})[row["provider"], own_keys(row)] = row
    return [list(case.values()) for case in by_case.values()]


def own_keys(row: Row) -> str:
    """The keys of the row's own trainer, as they were given."""
    prefix = f"{row['provider']}."
    keys = (key for key in row["case"].get("keys", ()) if key.startswith(prefix))
    return ", ".join(key.removeprefix(prefix) for key in keys)


def right_of(case: list[Row]) -> Row | None:
    """TRL's row of a case; None where it failed or was not measured."""
    return next((row for row in case if row["provider"] == "trl" and "error" not in row), None)


def _lines(case: list[Row]) -> Iterator[list[str]]:
    right = right_of(case)
    for row in case:
        start = [trainer_label(row["case"]), row["provider"], own_keys(row)]
        if "error" in row:
            yield [*start, failure([row]) or ""]
            continue
        loss = largest([row], right, "loss", first_step=2)
        doubt = vacuous(row) if right else None
        yield [
            *start,
            whole(row["peak_mib"]),
            ratio(row["peak_mib"], right["peak_mib"]) if right else "",
            whole(row.get("planned_mib")),
            "; ".join(filter(None, (loss, doubt))),
            largest([row], right, "grad_norm", first_step=2),
        ]
