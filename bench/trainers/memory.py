"""The longest pair that each trainer trains: prompt and two responses of 1024 tokens.

    fastdpo bench memory --model_config llama-3.1-8b --lora --gradient_checkpointing on \
        --limit_gib 80 --keys fastdpo.memory=auto trl.activation_offloading=true

The options are those of `fastdpo bench`, which measures peaks itself (`--data pair-16384`). A
length fits if two steps of one pair end without running out of memory. It doubles until one does
not fit, then the gap is halved until it is at most an eighth. Every try is a row, and so is the
answer, in bench/results/memory-<device>.jsonl.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..report import record
from . import run
from .cases import workloads
from .clock import device

OWN = argparse.ArgumentParser(add_help=False)
OWN.add_argument("--shortest", type=int, default=8192, help="tokens of the first try")
OWN.add_argument("--longest", type=int, default=1 << 20, help="tokens that are enough")


def search(fits: Callable[[int], bool], shortest: int, longest: int) -> int:
    """The largest length that fits, to an eighth; 0 where the shortest does not."""
    good, bad = 0, shortest
    while fits(bad):
        good = bad
        if good >= longest:
            return good
        bad = min(2 * good, longest)
    while good and bad - good > good // 8:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def tried(
    options: argparse.Namespace, results: record.Results, provider: str, tokens: int
) -> dict[str, Any]:
    """Two steps of one pair of this length by one trainer; the row."""
    options.data = f"pair-{tokens}"
    options.pairs_per_step, options.steps, options.warm_up = 1, 2, 1
    with tempfile.TemporaryDirectory() as scratch:
        (workload,) = workloads(options, Path(scratch))
        figures = run.run(workload, provider, 1, options.timeout)
    row = results.add(kind="try", case=workload.case, provider=provider, tokens=tokens, **figures)
    if "error" in row and not row["error"].startswith("OutOfMemory"):
        raise SystemExit(f"{provider}, {tokens} tokens: {row['error']}")
    print(f"{provider}, {tokens} tokens: {row.get('error') or row['peak_mib']}", flush=True)
    return row


def main(arguments: list[str] | None = None) -> None:
    """Search for every provider, print the lengths."""
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(given):
        print(__doc__)
        OWN.print_help()
    own, rest = OWN.parse_known_args(given)
    options = run.parse(rest)
    results = record.Results("memory", options, device())
    for provider in options.providers:
        rows: dict[int, dict[str, Any]] = {}

        def fits(tokens: int, provider: str = provider, rows: dict = rows) -> bool:
            rows[tokens] = tried(options, results, provider, tokens)
            return "error" not in rows[tokens]

        tokens = search(fits, own.shortest, own.longest)
        case = rows[max(tokens, own.shortest)]["case"]
        results.add(kind="longest", case=case, provider=provider, tokens=tokens)
        print(f"{provider}: {tokens} tokens")


if __name__ == "__main__":
    main()
