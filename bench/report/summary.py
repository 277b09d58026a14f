"""The table of the README, its rows selected from the results by rule and never by hand.

Of the devices that were measured, a GPU counts before a CPU. Of the trainers, the cases in which we
gain most and least on TRL; the long pair in which we save most memory; of the heads, the case with
the most tokens beside its fastest peer; and, of all that trainers were measured in, the figure in
which we come off worst.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .heads import most_tokens, peers_of, tokens_and_peers, total_times
from .memory import cases, right_of
from .rows import Row, Run, agreed, first, flat, median, origins, read
from .tables import NOTHING, markdown
from .trainers import beside_trl, fastest_trl, trainer_label

_COLUMNS = ("measured", "beside", "speed", "peak memory")
_NAMES = {
    "trl": "TRL",
    "trl-patched": "TRL with our head",
    "trl-flash": "TRL with flash-attn",
    "trl-liger": "TRL with Liger's kernels",
}
_LINKS = (
    "Commands, and what each figure means: [docs/benchmarks.md](docs/benchmarks.md). Every trainer "
    "and head in every case, those that failed included: [bench/results](bench/results/README.md)."
)


class Comparison(NamedTuple):
    """Ours beside another: both figures are ours over theirs."""

    case: str
    peer: str
    speed: float
    memory: float

    @property
    def worst(self) -> float:
        """How well we do in what we do worse; below 1 where we lose."""
        return min(self.speed, 1 / self.memory)

    def line(self) -> list[str]:
        """Of the table; where we lose, the figure is in bold."""
        cells = [self.case, _NAMES.get(self.peer, self.peer)]
        for value, lost in ((self.speed, self.speed < 1), (self.memory, self.memory > 1)):
            cells.append(f"**{value:.2f}×**" if lost else f"{value:.2f}×")
        return cells


def summary_block(folder: Path) -> str:
    """The table, and where its trainers were measured."""
    runs = _of_best_device(beside_trl(folder))
    every = [each for run in runs for each in _comparisons(run)]
    best = {fastest_trl(run, agreed(flat([run]))) for run in runs}
    trl = sorted((each for each in every if each.peer in best), key=lambda each: -each.speed)
    lines = [each.line() for each in (*trl[:1], *trl[1:][-1:])]
    pairs, heads = _long_pair(folder), _head(folder)
    lines += [line for line, _ in (*pairs, *heads)]
    shown = [*map(first, runs), *(row for _, row in (*pairs, *heads))]
    if every:
        worst = min(every, key=lambda each: each.worst)
        lines.append(worst._replace(case=f"{worst.case}: where we do worst").line())
    if not lines:
        return NOTHING
    return "\n\n".join(
        [markdown(_COLUMNS, lines, 2), "\n".join(origins(shown, False)) + ".", _LINKS]
    )


def _of_best_device(runs: Iterable[Run]) -> list[Run]:
    """Those of a GPU, where there are any."""
    every = list(runs)
    return [run for run in every if "CUDA" in first(run)["device"]] or every


def _comparisons(run: Run) -> Iterator[Comparison]:
    """Ours beside everyone who trained the same."""
    right = [name for name, verdict in agreed(flat([run])).items() if verdict is None]
    for name in right if "fastdpo" in right else ():
        if name != "fastdpo":
            speed, memory = (
                (median(run["fastdpo"], key) or 0.0) / (median(run[name], key) or 1.0)
                for key in ("pairs_per_s", "peak_mib")
            )
            yield Comparison(trainer_label(first(run)["case"]), name, speed, memory)


def _long_pair(folder: Path) -> list[tuple[list[str], Row]]:
    """The least memory beside TRL's; its speed was not measured in turns."""
    rows = [row for row in read(folder, "memory-*.jsonl") if row["kind"] != "longest"]
    shares: dict[float, Row] = {}
    for case in cases(rows):
        right = right_of(case)
        for row in case:
            if right and row["provider"] == "fastdpo" and "error" not in row:
                shares[row["peak_mib"] / right["peak_mib"]] = row
    if shares:
        row = shares[min(shares)]
        label = f"{trainer_label(row['case'])}, [frugal keys](docs/memory.md)"
        return [([label, _NAMES["trl"], "", f"{min(shares):.2f}×"], row)]
    return []


def _head(folder: Path) -> list[tuple[list[str], Row]]:
    """The case with the most tokens, and among those the one with the most peers."""
    runs = _of_best_device(most_tokens(folder))
    for run in sorted(runs, key=tokens_and_peers)[-1:]:
        case, times = first(run)["case"], total_times(run)
        peers = {name: seconds for name in peers_of(run) if (seconds := times[name])}
        if (ours := times["fastdpo"]) and peers:
            fastest = min(peers, key=lambda name: peers[name])
            label = f"the head alone, {case['head']}, {case['tokens']} tokens, {case['dtype']}"
            line = [label, f"{fastest}, the fastest peer", f"{peers[fastest] / ours:.2f}×"]
            return [(line, first(run))]
    return []


def tokens_block(folder: Path) -> str:
    """What a pass over a data set computes, as a share of what padded batches compute."""
    newest: dict[str, Row] = {row["data"]: row for row in read(folder, "tokens.jsonl")}
    if not newest:
        return NOTHING
    shares = ", ".join(
        f"{100 * row['epoch_over_padded']:.0f} % on `{name}`" for name, row in newest.items()
    )
    batch = next(iter(newest.values()))["options"]["batch"]
    return f"Of the tokens of padded batches of {batch} pairs, an epoch computes {shares}."
