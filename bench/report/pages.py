"""What the pages show of the measurements: written from the rows, never by hand.

    make readme                 # or: fastdpo bench readme
    make readme ARGS=--check    # exit status 1 where a page or a chart differs from the rows

In a page, what stands between `<!-- bench:NAME -->` and `<!-- /bench -->` is replaced. Charts and
the full tables of every provider go to bench/results. Of each case the newest complete run counts:
rows of one command at one commit.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..cli import Parser
from .balance import balance_block
from .cards import cards_block
from .checks import faults_block, labels_block, speed_block
from .convergence import convergence_block, convergence_chart, convergence_table
from .heads import head_tables, heads_all_block, heads_block, heads_chart
from .losses import demo_block, forms_block, kto_tokens_block, score_block
from .memory import memory_block
from .ranks import context_block, hosts_block
from .robustness import kill_block, kill_devices_block, soak_block
from .rounds import rounds_demo_block, rounds_kills_block, rounds_sampling_block
from .rows import first, flat, newest_runs, origins
from .scaling import scaling_block
from .start import start_block
from .summary import summary_block, tokens_block
from .tables import NOTHING
from .trainers import gaps_block, losses_block, trainer_tables, trainers_block, trainers_chart

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/cards.md",
    "docs/checks.md",
    "docs/data.md",
    "docs/devices.md",
    "docs/losses.md",
    "docs/memory.md",
    "docs/rounds.md",
    "docs/scoring.md",
    "kernels/README.md",
)
RESULTS = Path("bench/results")
FULL = RESULTS / "README.md"
_BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)

BLOCKS: dict[str, Callable[[Path], str]] = {
    "summary": summary_block,
    "tokens": tokens_block,
    "trainers": trainers_block,
    "losses": losses_block,
    "heads": heads_block,
    "heads-all": heads_all_block,
    "convergence": convergence_block,
    "demo": demo_block,
    "forms": forms_block,
    "kto-tokens": kto_tokens_block,
    "score": score_block,
    "check-faults": faults_block,
    "check-labels": labels_block,
    "check-speed": speed_block,
    "start": start_block,
    "rounds-demo": rounds_demo_block,
    "rounds-sampling": rounds_sampling_block,
    "rounds-kills": rounds_kills_block,
    "memory": memory_block,
    "balance": balance_block,
    "cards": cards_block,
    "context": context_block,
    "hosts": hosts_block,
    "scaling": scaling_block,
    "kill": kill_block,
    "kill-devices": kill_devices_block,
    "soak": soak_block,
}
CHARTS: dict[str, Callable[[Path], str | None]] = {
    "trainers.svg": trainers_chart,
    "heads.svg": heads_chart,
    "convergence.svg": convergence_chart,
}


def full_tables(folder: Path) -> str:
    """Every provider in every case, as a page."""
    parts = ["# Results", "Written by `make readme` from the rows in this folder."]
    subjects = {
        "trainers": trainer_tables,
        "losses": trainer_tables,
        "convergence": convergence_table,
        "heads": head_tables,
    }
    for name, make in subjects.items():
        runs = newest_runs(folder, name)
        table = make(flat(runs)) or NOTHING
        parts += [f"## {name.capitalize()}", table, *origins(map(first, runs))]
    blocks = {
        "Memory": memory_block,
        "Time between steps": gaps_block,
        "Runs that were killed": kill_block,
        "Runs of several processes that were killed": kill_devices_block,
        "Long runs": soak_block,
    }
    for title, block in blocks.items():
        parts += [f"## {title}", block(folder)]
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
    for page in map(Path, PAGES):
        text = (root / page).read_text(encoding="utf-8")
        made[page] = _BLOCK.sub(partial(_block, folder=folder, page=page), text)
    return made


def _block(match: re.Match[str], folder: Path, page: Path) -> str:
    """What belongs between the markers, its links relative to the page."""
    text = BLOCKS[match[2]](folder)
    for top in ("bench", "docs"):
        text = text.replace(f"]({top}/", f"]({os.path.relpath(top, page.parent)}/")
    return f"{match[1]}{text}\n{match[3]}"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write what differs, or with --check name it; the exit status."""
    parser = Parser("fastdpo bench readme", __doc__)
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
