"""Pairs per second and peak memory of fastdpo and TRL on this CPU, process by process in turn.

    python -m bench.alternate --repetitions 2

For every case TRL runs once at each of several batch sizes to find its fastest; then the two take
turns. Rows go to bench/results/trainers-cpu.jsonl, one a process, the losses of every step with
them.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from . import record

CASES = {
    "tiny-llama gsm8k": {"model": "tiny-llama", "data": "gsm8k", "per-step": 8, "steps": 5},
    "tiny-llama dpo_en_demo": {
        "model": "tiny-llama",
        "data": "dpo_en_demo",
        "per-step": 4,
        "steps": 5,
    },
    "smollm2-135m gsm8k": {"model": "smollm2-135m", "data": "gsm8k", "per-step": 8, "steps": 5},
    "smollm2-135m dpo_en_demo": {
        "model": "smollm2-135m",
        "data": "dpo_en_demo",
        "per-step": 4,
        "steps": 3,
        "warm-up": 1,
    },
}


def run(case: dict[str, Any], provider: str, batch: int, steps: int | None = None) -> Any:
    """One process of `bench.trainers`; its JSON."""
    options = {**case, "provider": provider, "batch": batch, "steps": steps or case["steps"]}
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "bench.trainers", *flags], capture_output=True, text=True
    )
    if done.returncode:
        return {**options, "error": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Search TRL's best batch size, alternate, write rows, print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 2, 4])
    options = parser.parse_args()
    results = record.Results("trainers-cpu", options)
    for name in options.cases:
        case, speed = CASES[name], {}
        for batch in options.batches if len(options.batches) > 1 else ():
            row = run(case, "trl", batch, 3)
            results.add(case=name, kind="batch search", **row)
            speed[batch] = row.get("pairs_per_second", 0.0)
        best = max(speed, key=lambda batch: speed[batch]) if speed else options.batches[0]
        for repetition in range(options.repetitions):
            pair = {}
            for provider, batch in (("trl", best), ("fastdpo", 0)):
                pair[provider] = run(case, provider, batch)
                results.add(case=name, kind="measurement", repetition=repetition, **pair[provider])
            ours, theirs = pair["fastdpo"], pair["trl"]
            print(
                f"{name}: {ours['pairs_per_second']:.3f} against {theirs['pairs_per_second']:.3f} "
                f"pairs/s ({ours['pairs_per_second'] / theirs['pairs_per_second']:.2f}x), "
                f"{ours['peak_rss_mib']:.0f} against {theirs['peak_rss_mib']:.0f} MiB "
                f"({ours['peak_rss_mib'] / theirs['peak_rss_mib']:.2f}x), TRL's batch {best}",
                flush=True,
            )


if __name__ == "__main__":
    main()
