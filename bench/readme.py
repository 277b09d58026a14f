"""What the README shows of the measurements: written from the rows, never by hand.

    python -m bench.readme            # or: make readme
    python -m bench.readme --check    # exit status 1 where a page or a chart differs from the rows

In a page, what stands between `<!-- bench:NAME -->` and `<!-- /bench -->` is replaced. Charts and
the full tables of every provider go to bench/results. Of each case the newest complete run counts:
rows of one command at one commit.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import charts, tables
from .charts import Bar
from .cli import Parser
from .rows import (
    Row,
    Run,
    agreed,
    case_key,
    failure,
    first,
    is_ours,
    median,
    newest,
    read,
    runs,
    values,
)

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "kernels/README.md")
RESULTS = Path("bench/results")
FULL = RESULTS / "README.md"
TRL = ("trl", "trl-flash", "trl-liger")
"""TRL's own trainer; the fastest stands in the README's table."""
_BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_PACKAGES = ("torch", "triton", "transformers", "trl")
_NOTHING = "Not measured yet."
_SCALES = "Each case has a scale of its own; the line across a bar's end: least to most."


def chosen(folder: Path, pattern: str) -> list[Run]:
    """The newest complete runs of each case."""
    return newest(runs(read(folder, pattern)))


def flat(found: Iterable[Run]) -> list[Row]:
    """Their rows."""
    return [row for run in found for rows in run.values() for row in rows]


def source(found: Iterable[Run], commands: bool = True) -> list[str]:
    """Device, versions, commit, date and commands of runs, one line each combination."""
    lines: dict[str, list[str]] = {}
    for row in map(first, found):
        known = row.get("versions", {})
        versions = [f"{name} {known[name]}" for name in _PACKAGES if known.get(name)]
        line = f"{row['device']}; {', '.join(versions)}; commit {row['commit']}, {row['date']}"
        lines.setdefault(line, []).append(command(row["command"]))
    return [
        line + (": " + ", ".join(f"`{each}`" for each in dict.fromkeys(ran)) if commands else "")
        for line, ran in lines.items()
    ]


def command(text: str) -> str:
    """What was typed, without the directories of this machine."""
    words = text.split(" ")
    if len(words) > 1 and Path(words[1]).name == "fastdpo":
        words = words[1:]
    return " ".join(Path(word).name if word.startswith("/") else word for word in words)


def by_device(found: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by device."""
    devices: dict[str, list[Run]] = {}
    for run in found:
        devices.setdefault(first(run)["device"], []).append(run)
    return devices


def _page(chart: str, alt: str, parts: Iterable[str]) -> str:
    return "\n\n".join([f"![{alt}]({RESULTS / chart})", *parts])


def trainers_block(folder: Path) -> str:
    """A chart, and a table for each device: ours beside TRL's fastest."""
    found = _beside_trl(chosen(folder, "trainers-*.jsonl"))
    if not found:
        return _NOTHING
    columns = ("model", "data", "run", "fastdpo, pairs/s", "TRL, pairs/s", "speed", "peak memory")
    parts = []
    for device in by_device(found).values():
        parts.append(tables.markdown(columns, map(_trainer_line, device), 3))
        parts.append("\n".join(source(device)) + ".")
    return _page("trainers.svg", "Pairs per second of every trainer", parts)


def _beside_trl(found: Iterable[Run]) -> list[Run]:
    """Of each case and device the newest run of both."""
    last = {
        (case_key(first(run)), first(run)["device"]): run
        for run in found
        if {"fastdpo", "trl"} <= set(run)
    }
    return list(last.values())


def _trainer_line(run: Run) -> list[str]:
    case, verdicts = first(run)["case"], agreed(flat([run]))
    done = [name for name in TRL if verdicts.get(name, "") is None]
    best = max(done, key=lambda name: median(run[name], "pairs_per_s") or 0.0, default="trl")
    ours, theirs = (_speed(run, name, verdicts) for name in ("fastdpo", best))
    line = tables.trainer_label(case).split(", ", 2)
    speed = memory = ""
    if verdicts.get("fastdpo", "") is None and done:
        pairs = [(median(run["fastdpo"], key), median(run[best], key)) for key in _COMPARED]
        speed, memory = (f"{tables.ratio(*pair)}×" for pair in pairs)
        speed = f"**{speed}**"
    return [*line, ours, theirs + ("" if best == "trl" else f", {best}"), speed, memory]


_COMPARED = ("pairs_per_s", "peak_mib")


def _speed(run: Run, name: str, verdicts: dict[str, str | None]) -> str:
    if name not in verdicts:
        return failure(run[name]) or ""
    return verdicts[name] or tables.spread(values(run[name], "pairs_per_s"), 3)


def heads_block(folder: Path) -> str:
    """A chart, and a table for each device: the head of DPO with trained weights."""
    found = [r for r in chosen(folder, "heads-*.jsonl") if first(r)["case"]["regime"] == "dpo"]
    if not found:
        return _NOTHING
    parts = []
    for device in by_device(found).values():
        parts += [tables.head_summary(flat(device)), "\n".join(source(device)) + "."]
    return _page("heads.svg", "Time of the head, ours and its peers'", parts)


def heads_all_block(folder: Path) -> str:
    """The head in every regime, in a table for each device."""
    found = by_device(chosen(folder, "heads-*.jsonl"))
    parts = [
        part for runs in found.values() for part in (tables.head_summary(flat(runs)), *source(runs))
    ]
    return "\n\n".join(parts) or _NOTHING


def convergence_block(folder: Path) -> str:
    """The curves of the same run by both trainers."""
    found = chosen(folder, "convergence-*.jsonl")
    if not found:
        return _NOTHING
    parts = [tables.largest_differences(flat([run])) for run in found]
    parts.append("\n".join(source(found)) + ".")
    return _page("convergence.svg", "Held-out reward accuracy and margin, both trainers", parts)


def memory_block(folder: Path) -> str:
    """Peaks of one long pair, and the longest pairs."""
    rows = read(folder, "memory-*.jsonl")
    if not rows:
        return _NOTHING
    return f"{tables.memory_table(rows)}\n\n" + ".\n\n".join(_origins(rows)) + "."


def _origins(rows: Iterable[Row]) -> list[str]:
    """Where rows come from: those of one command are one run."""
    return source({"": [row]} for row in rows)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "trainers": trainers_block,
    "heads": heads_block,
    "heads-all": heads_all_block,
    "convergence": convergence_block,
    "memory": memory_block,
}


def _bar(rows: Sequence[Row], name: str, scale: float = 1.0) -> Bar | str:
    found = sorted(scale * value for value in values(rows, name))
    if not found:
        return failure(rows) or "not measured"
    return Bar((median(rows, name) or 0.0) * scale, found[0], found[-1])


def trainers_chart(folder: Path) -> str | None:
    """Pairs a second of every trainer in every case; None without rows."""
    found, groups = _beside_trl(chosen(folder, "trainers-*.jsonl")), {}
    for run in found:
        verdicts = agreed(flat([run]))
        group = {name: verdicts.get(name) or _bar(run[name], "pairs_per_s") for name in run}
        groups[_named(run, tables.trainer_label)] = _sorted(group, largest_first=True)
    caption = "\n".join([*source(found, commands=False), _SCALES])
    unit = "pairs per second, longer is faster; × the speed of TRL"
    title = "DPO training, ours and other trainers"
    return charts.bars(title, unit, groups, caption, "trl") if found else None


def heads_chart(folder: Path) -> str | None:
    """Milliseconds of the head of DPO at the most tokens measured; None without rows."""
    best: dict[tuple[str, str, str], Run] = {}
    for run in chosen(folder, "heads-*.jsonl"):
        row = first(run)
        key = (row["device"], row["case"]["head"], row["case"]["dtype"])
        if row["case"]["regime"] == "dpo" and "fastdpo" in run:
            best[key] = max((best.get(key, run), run), key=_tokens_and_providers)
    groups = {}
    for run in best.values():
        shown = {name: rows for name, rows in run.items() if not name.startswith("Config(")}
        group = {name: _bar(rows, "total_s", 1e3) for name, rows in shown.items()}
        groups[_named(run, tables.head_label)] = _sorted(group, largest_first=False)
    caption = "\n".join([*source(best.values(), commands=False), _SCALES])
    unit = "milliseconds of forward and backward, shorter is faster; × the bare matrix products"
    title = "The head of DPO, ours and its peers"
    return charts.bars(title, unit, groups, caption, "products") if best else None


def _named(run: Run, label: Callable[[Row], str]) -> str:
    row = first(run)
    return f"{label(row['case'])} · {row['device'].split(',')[0].replace('(R)', '')}"


def _tokens_and_providers(run: Run) -> tuple[int, int]:
    return first(run)["case"]["tokens"], len([name for name in run if not is_ours(name)])


def _sorted(group: dict[str, Bar | str], largest_first: bool) -> dict[str, Bar | str]:
    """Fastest first, then those without a bar."""

    def rank(name: str) -> tuple[bool, float]:
        bar = group[name]
        if isinstance(bar, str):
            return True, 0.0
        return False, -bar.value if largest_first else bar.value

    return {name: group[name] for name in sorted(group, key=rank)}


def convergence_chart(folder: Path) -> str | None:
    """Held-out reward accuracy and margin of both trainers; None without rows."""
    found, parts = chosen(folder, "convergence-*.jsonl"), []
    for run in found:
        case = first(run)["case"]
        for name, unit in (("accuracy", "share of pairs"), ("margin", "reward")):
            series = tables.curves(flat([run]), name)
            if series:
                parts.append(charts.lines(f"{name}, {case['data']}", "step", unit, series))
    title, caption = "Held-out pairs, the same run by both trainers", source(found, commands=False)
    return charts.panels(title, parts, "\n".join(caption)) if parts else None


CHARTS: dict[str, Callable[[Path], str | None]] = {
    "trainers.svg": trainers_chart,
    "heads.svg": heads_chart,
    "convergence.svg": convergence_chart,
}


def full_tables(folder: Path) -> str:
    """Every provider in every case, as a page."""
    parts = ["# Results", "Written by `make readme` from the rows in this folder."]
    kinds = {
        "trainers": tables.trainer_tables,
        "convergence": tables.convergence_table,
        "heads": tables.head_tables,
    }
    for name, make in kinds.items():
        found = chosen(folder, f"{name}-*.jsonl")
        parts += [f"## {name.capitalize()}", make(flat(found)) or _NOTHING, *source(found)]
    parts += ["## Memory", memory_block(folder)]
    return "\n\n".join(parts) + "\n"


def outputs(root: Path) -> dict[Path, str | None]:
    """Every file that is made from the rows, with its right content; None where there should be
    none.

    Raises:
        KeyError: a page has a marker of an unknown name.
    """
    folder = root / RESULTS
    made: dict[Path, str | None] = {RESULTS / name: make(folder) for name, make in CHARTS.items()}
    made[FULL] = full_tables(folder)
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8")

        def block(match: re.Match[str]) -> str:
            return f"{match[1]}{BLOCKS[match[2]](folder)}\n{match[3]}"

        made[Path(page)] = _BLOCK.sub(block, text)
    return made


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write what differs, or with --check name it; the exit status."""
    parser = Parser(
        prog="fastdpo bench readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options, status = parser.parse_args(arguments), 0
    for path, text in outputs(root).items():
        file = root / path
        if text == (file.read_text(encoding="utf-8") if file.exists() else None):
            continue
        if options.check:
            print(f"{path}: differs from the rows; run make readme")
            status = 1
        elif text is None:
            file.unlink()
        else:
            file.write_text(text, encoding="utf-8")
            print(f"{path}: written")
    return status


if __name__ == "__main__":
    sys.exit(main())
