"""The same DPO run by fastdpo and by TRL, and how both do on pairs that neither was trained on.

    python -m bench.convergence --data dpo_en_demo --steps 100 --device cpu

Equal losses in the first steps do not yet show that a whole run ends at the same model: Adam turns
a difference in rounding into a difference in weights, and it grows. So a small Llama is first
taught the chosen answers of the training pairs (`first_model`), and both trainers start from there:
the same pairs in the same order, the same comparisons a step, the same schedule, fp32, no dropout,
a precomputed reference. Both evaluate on the same held-out pairs, of prompts that are neither in
the training pairs nor in the first model's texts (`held_out`).

Rows go to bench/results/convergence-<device>.jsonl, one an evaluation. Step 0 is before training,
where every reward is zero but for rounding: fastdpo counts a tie as one half, TRL as what the
rounding says, so accuracies of step 0 are not compared. Rows of --quick are kept only where
FASTDPO_RESULTS says in which folder.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import AutoTokenizer

from fastdpo.demo.model import demo_model_path
from fastdpo.memory.allocator import keep_freed_memory

from ..cli import Parser
from ..jsonl import read_rows
from ..report import record
from ..report.convergence import convergence_table
from ..trainers.providers import fastdpo_config
from ..trainers.with_trl import make_trainer
from .first_model import FirstModel
from .held_out import Split, read_pairs, split_pairs

Rows = Sequence[Mapping[str, Any]]
Curve = dict[int, dict[str, float]]
"""Of every evaluated step, the figures that `FIGURES` names."""

FIGURES = {
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "loss": "eval_loss",
    "chosen": "eval_rewards/chosen",
    "rejected": "eval_rewards/rejected",
}
"""What a row calls a figure, and what both trainers call it."""

_SIZES = {
    "steps": (100, 6, "optimizer steps"),
    "every": (10, 3, "steps between two evaluations"),
    "pairs_per_step": (4, 2, "comparisons of a step"),
    "eval_pairs": (48, 4, "held-out pairs"),
    "max_length": (384, 96, "tokens of a prompt and a response"),
    "layers": (4, 2, "layers of the Llama"),
    "width": (256, 64, "its hidden size"),
    "first_steps": (150, 4, "steps of its training on the chosen answers"),
}
"""Of every size, its value in a whole run and with --quick."""


def common_keys(options: argparse.Namespace) -> dict[str, Any]:
    """What the configurations of both trainers say in the same words."""
    return {
        "beta": options.beta,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": options.steps // 10,
        "max_steps": options.steps,
        "max_length": options.max_length,
        "eval_strategy": "steps",
        "eval_steps": options.every,
        "eval_on_start": True,
        "logging_steps": options.every,
        "seed": options.seed,
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": options.device == "cpu",
    }


def run_trl(split: Split, model: Path, options: argparse.Namespace) -> Curve:
    """TRL's DPOTrainer, `trl_batch` pairs a forward pass, accumulated to a step."""
    trainer = make_trainer(
        model,
        split.train,
        split.held_out,
        per_device_train_batch_size=options.trl_batch,
        per_device_eval_batch_size=options.trl_batch,
        gradient_accumulation_steps=options.pairs_per_step // options.trl_batch,
        **common_keys(options),
    )
    trainer.train()
    return curve_of(trainer.state.log_history)


def run_fastdpo(split: Split, model: Path, options: argparse.Namespace) -> Curve:
    """`fastdpo.train` with rows of its default length."""
    from fastdpo import train

    per_step, keys = options.pairs_per_step, common_keys(options)
    with tempfile.TemporaryDirectory() as output:
        config = fastdpo_config(model, output, per_device_train_batch_size=per_step, **keys)
        result = train(config, split.train, split.held_out)
        return curve_of(read_rows(result.output_dir / "metrics.jsonl"))


PROVIDERS: dict[str, Callable[[Split, Path, argparse.Namespace], Curve]] = {
    "trl": run_trl,
    "fastdpo": run_fastdpo,
}


def curve_of(log: Rows) -> Curve:
    """The evaluations among the metrics that a trainer logged."""
    rows = (row for row in log if FIGURES["margin"] in row)
    return {int(row["step"]): {k: float(row[name]) for k, name in FIGURES.items()} for row in rows}


def verdict(provider: str, curve: Curve, eval_pairs: int) -> str:
    """Whether the policy learnt anything: its margin is above zero and its accuracy at least two
    standard errors of a coin above one half.
    """
    wanted, last = 0.5 + 1 / eval_pairs**0.5, curve[max(curve)]
    learnt = last["accuracy"] >= wanted and last["margin"] > 0
    return (
        f"{provider}: accuracy {last['accuracy']:.3f} of {eval_pairs} held-out pairs after step "
        f"{max(curve)}, margin {last['margin']:.3f}: "
        + ("learnt" if learnt else f"NOT clearly learnt (an accuracy of {wanted:.3f} would be)")
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; sizes that are not given are those of a whole run, or of --quick."""
    parser = Parser("fastdpo bench convergence", __doc__)
    parser.add_argument("--data", default="dpo_en_demo", help="dpo_en_demo, gsm8k or a file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="seconds; shows only that it runs")
    for name, (whole, quick, text) in _SIZES.items():
        text = f"{text} ({whole}; with --quick {quick})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=text)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trl-batch", type=int, default=1, help="pairs of TRL's forward pass")
    parser.add_argument("--tokenizer", help="a directory; by default that of SmolLM2")
    options = parser.parse_args(arguments)
    for name, (whole, quick, _) in _SIZES.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else whole)
    # TRL's metrics are means over batches, so all have to be of one size.
    multiples = {"steps": "every", "pairs_per_step": "trl_batch", "eval_pairs": "trl_batch"}
    for name, divisor in multiples.items():
        if getattr(options, name) % getattr(options, divisor):
            parser.error(f"{name} has to be a multiple of {divisor}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both, write a row an evaluation, print the curves."""
    options = parse(arguments)
    disable_progress_bars()
    device = torch.device(options.device)
    if device.type == "cpu":
        keep_freed_memory()  # time is not compared here, so TRL may have it as well
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or demo_model_path())
    split = split_pairs(read_pairs(options.data), tokenizer, options)
    first = FirstModel(options.layers, options.width, options.first_steps, seed=options.seed)
    print(f"{len(split.train)} pairs to train on, {len(split.held_out)} held out", flush=True)
    results = record.Results("convergence", options, device)
    names = ("steps", "pairs_per_step", "learning_rate", "beta", "seed", "eval_pairs")
    case = {"model": first.name, "data": options.data}
    case |= {name: getattr(options, name) for name in names}
    rows, keep = [], not options.quick or "FASTDPO_RESULTS" in os.environ
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder), split.texts, tokenizer, device)
        for name, run in PROVIDERS.items():
            start = time.perf_counter()
            curve = run(split, Path(folder), options)
            verdicts.append(verdict(name, curve, options.eval_pairs))
            for step, figures in curve.items():
                row = {"case": case, "provider": name, "step": step, "eval": figures}
                rows.append(results.add(**row) if keep else row | results.common)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    print("\n".join([convergence_table(rows), "", *verdicts]))
