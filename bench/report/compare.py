"""Whether two sets of rows differ by more than their spread.

    fastdpo bench compare bench/results/heads-cpu.jsonl@abc1234 /tmp/rows/heads-cpu.jsonl

For every case and provider that both sets have measured on the same device: the medians, their
ratio, and an exact two-sided permutation test on the ranks of the repetitions. Its p is the share
of all ways to deal the repetitions to the two sets that set them apart at least as far. With few
repetitions no result can be below 0.05 (three against three reach 0.1): then it says so. The test
sees the spread among repetitions alone: a machine that was busier throughout one set differs, too.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import Parser
from ..jsonl import read_rows
from .heads import head_label
from .rows import LOSS_TOLERANCE, Row, case_key, failure, runs, values
from .tables import markdown, number, spread
from .trainers import trainer_label

LEVEL = 0.05
_COLUMNS = ("case", "provider", "figure", "A (least–most)", "B (least–most)", "B ÷ A", "verdict")
Key = tuple[str, str, str]
"""Case, device, provider."""


def p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the rank-sum permutation test of `a` against `b`, exact and two-sided, ties included."""
    both = sorted([*a, *b])
    # Twice the mean rank of a value: an integer even among ties.
    twice = {v: 2 * both.index(v) + both.count(v) + 1 for v in both}
    # ways[k][s]: in how many ways k of the values have ranks that sum to s / 2.
    ways: list[dict[int, int]] = [{0: 1}, *({} for _ in a)]
    for value in both:
        for count in range(len(a) - 1, -1, -1):
            for total, number_of in ways[count].items():
                larger = total + twice[value]
                ways[count + 1][larger] = ways[count + 1].get(larger, 0) + number_of
    middle = len(a) * (len(both) + 1)
    apart = abs(sum(twice[v] for v in a) - middle)
    extreme = sum(n for total, n in ways[len(a)].items() if abs(total - middle) >= apart)
    return extreme / math.comb(len(both), len(a))


def least_p(a: int, b: int) -> float:
    """The smallest p that `a` against `b` repetitions can give."""
    return min(1.0, 2 / math.comb(a + b, a))


def verdict(a: Sequence[float], b: Sequence[float], more_is_better: bool) -> str:
    """In words, of B against A."""
    if least_p(len(a), len(b)) > LEVEL:
        least = number(least_p(len(a), len(b)), 2)
        return f"too few repetitions to tell ({len(a)} and {len(b)}: p is {least} at least)"
    p = p_value(a, b)
    if p > LEVEL:
        return f"same within spread (p = {number(p, 2)})"
    # The mean rank and not the median: it is what the test has found to differ.
    wins = sum((y > x) - (y < x) for x in a for y in b)
    better = (wins > 0) == more_is_better
    return f"differs: B is {'faster' if better else 'slower'} (p = {number(p, 2)})"


def compare(a: Sequence[Row], b: Sequence[Row]) -> str:
    """A Markdown table with one line for each case and provider of either set."""
    left, right = _by_key(a), _by_key(b)
    lines, tests = [], 0
    for key in dict.fromkeys([*left, *right]):
        line = _line(key, left.get(key, []), right.get(key, []))
        tests += "(p = " in line[-1]
        lines.append(line)
    notes = [f"A: {_origin(a)}. B: {_origin(b)}."]
    if tests > 1:
        chance = number(tests * LEVEL, 2)
        notes.append(f"Of {tests} tests at p ≤ {LEVEL}, {chance} differ by chance.")
    return "\n\n".join([markdown(_COLUMNS, lines, 3), *notes])


def _by_key(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    by_key: dict[Key, list[Row]] = {}
    for run in runs(rows):
        for provider, part in run.items():
            key = (case_key(part[0]), part[0]["device"], provider)
            by_key.setdefault(key, []).extend(part)
    return by_key


def _line(key: Key, a: list[Row], b: list[Row]) -> list[str]:
    row = (a or b)[0]
    name = "pairs_per_s" if any("pairs_per_s" in row for row in [*a, *b]) else "total_s"
    unit, scale = ("pairs/s", 1.0) if name == "pairs_per_s" else ("ms", 1e3)
    left, right = ([scale * value for value in values(rows, name)] for rows in (a, b))
    case = (head_label if "regime" in row["case"] else trainer_label)(row["case"])
    start = [f"{case}, {key[1]}", key[2], unit, spread(left), spread(right)]
    missing = [
        f"in {name}: {failure(rows) or 'not measured'}"
        for name, rows, figures in (("A", a, left), ("B", b, right))
        if not figures
    ]
    refused = "; ".join(missing) or _losses(a, b)
    if refused:
        return [*start, "", refused]
    quotient = number(statistics.median(right) / statistics.median(left))
    return [*start, quotient, verdict(left, right, name == "pairs_per_s")]


def _losses(a: list[Row], b: list[Row]) -> str:
    """Why speeds are not compared: A and B did not train the same."""
    losses: list[list[float]] = [
        next((row["loss"] for row in rows if "pairs_per_s" in row), []) for rows in (a, b)
    ]
    tolerance = LOSS_TOLERANCE.get(a[0]["case"].get("dtype"), 0.0)
    if len(losses[0]) != len(losses[1]):
        return f"refused: losses of {len(losses[0])} and of {len(losses[1])} steps"
    apart = [abs(x - y) for x, y in zip(*losses, strict=True)]
    wrong = [difference for difference in apart if not difference <= tolerance]
    return f"refused: losses differ by {number(wrong[0])}" if wrong else ""


def _origin(rows: Sequence[Row]) -> str:
    commits = dict.fromkeys(row["commit"] for row in rows)
    versions = dict.fromkeys(
        f"{name} {version}"
        for row in rows
        for name, version in row.get("versions", {}).items()
        if name in ("torch", "trl") and version
    )
    return ", ".join([f"commit {' and '.join(commits)}", *versions])


def select(name: str) -> list[Row]:
    """Rows of `FILE`, or of one commit as `FILE@COMMIT`.

    Raises:
        ValueError: no such file, or no rows of that commit.
    """
    file, commit = Path(name), ""
    if not file.exists() and "@" in name:
        path, _, commit = name.rpartition("@")
        file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    rows = [row for row in read_rows(file) if isinstance(row.get("case"), dict)]
    selected = [row for row in rows if row["commit"].startswith(commit)]
    if not selected:
        known = ", ".join(dict.fromkeys(row["commit"] for row in rows)) or "none"
        raise ValueError(f"{file}: no rows of commit {commit or 'any'}; there are: {known}")
    return selected


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; the exit status, 2 where a file cannot be read."""
    parser = Parser("fastdpo bench compare", __doc__)
    parser.add_argument("a", metavar="A", help="a file of rows, or FILE@COMMIT")
    parser.add_argument("b", metavar="B", help="the same")
    options = parser.parse_args(arguments)
    try:
        sets = [select(name) for name in (options.a, options.b)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(compare(*sets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
