"""What the pages show of the balance of work over ranks."""

from pathlib import Path

from .rows import Row, origins, read
from .tables import NOTHING, markdown, number

_KEY = ("workload", "layout", "ranks", "units")


def balance_block(folder: Path) -> str:
    """The newest rows of every case, those of one budget."""
    rows = read(folder, "balance.jsonl")
    if not rows:
        return NOTHING
    budget = rows[-1]["options"]["max_tokens"]
    newest = {
        tuple(row[key] for key in _KEY): row
        for row in rows
        if row["options"]["max_tokens"] == budget
    }
    columns = (
        "lengths of",
        "layout",
        "ranks",
        "comparisons a rank",
        "rows a rank",
        "work, dearest ÷ mean",
        "the same, row by row",
        "worst step",
        "least possible",
        "for another model",
        "at random",
        "s to plan",
    )
    table = markdown(columns, [_line(row) for row in newest.values()], 2)
    return "\n\n".join([table, *origins(newest.values())])


def _line(row: Row) -> list[str]:
    figures = [row["imbalance"], row["imbalance_of_rounds"], row["worst_step"], row["bound"]]
    figures += [max(row["other_models"].values()), row.get("at_random")]
    return [
        row["workload"],
        row["layout"],
        str(row["ranks"]),
        str(row["units"]),
        number(row["rounds"], 2),
        *("" if figure is None else f"{figure:.3f}" for figure in figures),
        number(row["seconds"], 2),
    ]
