"""fastdpo beside TRL on the same rows in the same order: the metrics of every step, and how far
they are apart.

    python -m bench.parity --model tiny-llama --steps 10

writes one row a step to bench/results/parity.jsonl: both providers' metrics, ours in every layout
and with several token budgets and accumulation steps, all in fp32.
"""

import argparse
from pathlib import Path
from typing import Any

from . import models, record
from .trainer_providers import Clock, run_fastdpo, run_trl
from .workloads import rows_of

COMPARED = (
    "loss",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "grad_norm",
    "entropy",
    "mean_token_accuracy",
    "logits/chosen",
    "logits/rejected",
    "learning_rate",
    "num_tokens",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "packed": {"share_prefix": False},
    "padded": {"attn_implementation": "sdpa"},
    "one pair a row": {"batch": 1},
    "one row": {"batch": 1 << 20},
    "ungrouped": {"group_prompts": False},
    "accumulate 2": {"accumulate": 2},
    "accumulate 4": {"accumulate": 4},
}


def differences(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """Absolute differences of every compared metric; of the gradient norm, the relative one."""
    found = {name: abs(ours[name] - theirs[name]) for name in COMPARED if name in theirs}
    found["grad_norm"] /= theirs["grad_norm"]
    return found


def run_variant(
    rows: list[dict[str, Any]], model: Path, steps: int, per_step: int, name: str, rate: float
) -> Clock:
    """Our run in one of the `VARIANTS`."""
    options = dict(VARIANTS[name])
    batch, accumulate = options.pop("batch", 0), options.pop("accumulate", 1)
    return run_fastdpo(
        rows,
        model,
        steps,
        per_step // accumulate,
        batch,
        learning_rate=rate,
        gradient_accumulation_steps=accumulate,
        **options,
    )


def main() -> None:
    """Run both, write the rows, print the largest difference of every metric."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", choices=models.NAMES, default="tiny-llama")
    parser.add_argument("--data", choices=("dpo_en_demo", "gsm8k"), default="dpo_en_demo")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--per-step", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    options = parser.parse_args()
    path, rows = (
        models.model_path(options.model),
        rows_of(options.data, options.steps * options.per_step),
    )
    peer = run_trl(
        rows, path, options.steps, options.per_step, options.per_step, learning_rate=options.rate
    )
    results = record.Results("parity", options)
    for name in options.variants:
        ours = run_variant(rows, path, options.steps, options.per_step, name, options.rate)
        worst: dict[str, float] = {}
        for step, (a, b) in enumerate(zip(ours.metrics, peer.metrics, strict=True), 1):
            apart = differences(a, b)
            worst = {k: max(v, worst.get(k, 0.0)) for k, v in apart.items()}
            results.add(
                variant=name,
                step=step,
                fastdpo={k: a[k] for k in COMPARED},
                trl={k: b[k] for k in COMPARED if k in b},
                difference=apart,
            )
        print(name, {k: f"{v:.2g}" for k, v in worst.items()}, flush=True)


if __name__ == "__main__":
    main()
