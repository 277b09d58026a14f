"""The same DPO run by fastdpo and by TRL, and how both do on pairs that neither was trained on.

    python -m bench.convergence --data dpo_en_demo --steps 100 --device cpu

Equal losses in the first steps do not yet show that a whole run ends at the same model: Adam turns
a difference in rounding into a difference in weights, and it grows. So a small Llama is first
taught the chosen answers of the training pairs (`bench.first_model`), and both trainers start from
there: the same pairs in the same order, the same comparisons a step, the same schedule, fp32, no
dropout, a precomputed reference. Both evaluate on the same held-out pairs, of prompts that are
neither in the training pairs nor in the first model's texts (`bench.held_out`).

Rows go to bench/results/convergence-<device>.jsonl, one an evaluation. Step 0 is before training,
where every reward is zero but for rounding: fastdpo counts a tie as one half, TRL as what the
rounding says, so accuracies of step 0 are not compared. Rows of --quick are kept only where
FASTDPO_RESULTS says in which folder.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

from fastdpo.demo.model import demo_model_path
from fastdpo.memory.allocator import keep_freed_memory

from . import record
from .cli import Parser
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
        "save_strategy": "no",
        "seed": options.seed,
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": options.device == "cpu",
        "disable_tqdm": True,
    }


def run_trl(split: Split, model: Path, options: argparse.Namespace) -> Curve:
    """TRL's DPOTrainer, `trl_batch` pairs a forward pass, accumulated to a step."""
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as output:
        args = DPOConfig(
            output_dir=output,
            per_device_train_batch_size=options.trl_batch,
            per_device_eval_batch_size=options.trl_batch,
            gradient_accumulation_steps=options.pairs_per_step // options.trl_batch,
            report_to="none",
            **common_keys(options),
        )
        trainer = InOrder(
            model=str(model),
            args=args,
            train_dataset=Dataset.from_list(split.train),
            eval_dataset=Dataset.from_list(split.held_out),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return curve_of(trainer.state.log_history)


def run_fastdpo(split: Split, model: Path, options: argparse.Namespace) -> Curve:
    """`fastdpo.train` with rows of its default length."""
    from fastdpo import TrainConfig, train

    with tempfile.TemporaryDirectory() as output:
        config = TrainConfig.from_dict(
            {
                "model_name_or_path": str(model),
                "output_dir": f"{output}/run",
                "reference_cache_dir": f"{output}/reference",
                "per_device_train_batch_size": options.pairs_per_step,
                "shuffle": False,
                **common_keys(options),
            }
        )
        train(config, split.train, split.held_out)
        lines = Path(output, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return curve_of([json.loads(line) for line in lines])


PROVIDERS: dict[str, Callable[[Split, Path, argparse.Namespace], Curve]] = {
    "trl": run_trl,
    "fastdpo": run_fastdpo,
}


def curve_of(log: Rows) -> Curve:
    """The evaluations among the metrics that a trainer logged."""
    found = (row for row in log if FIGURES["margin"] in row)
    return {int(row["step"]): {k: float(row[name]) for k, name in FIGURES.items()} for row in found}


def differences(ours: Curve, theirs: Curve) -> dict[str, float]:
    """The largest difference of every figure over all steps; of the accuracy, without step 0.

    Raises:
        ValueError: curves of other steps.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"evaluated at other steps: {sorted(ours)} and {sorted(theirs)}")
    return {
        name: max(
            abs(ours[step][name] - theirs[step][name])
            for step in ours
            if step or name != "accuracy"
        )
        for name in FIGURES
    }


def report(curves: Mapping[str, Curve], eval_pairs: int) -> str:
    """The curves side by side, how far they are apart, and whether the policy learnt anything.

    It did where the margin is above zero and the accuracy at least two standard errors of a coin
    above one half.
    """
    ours, theirs = curves["fastdpo"], curves["trl"]
    names = ("accuracy", "margin")
    lines = ["| step | " + " | ".join(f"{name}, {who}" for name in names for who in curves) + " |"]
    lines.append("|--:" * (1 + len(names) * len(curves)) + "|")
    for step in ours:
        cells = (f"{curve[step][name]:.4f}" for name in names for curve in curves.values())
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    apart = ", ".join(f"{name} {value:.2g}" for name, value in differences(ours, theirs).items())
    lines += ["", f"Largest differences between the curves: {apart}."]
    wanted = 0.5 + 1 / eval_pairs**0.5
    for who, curve in curves.items():
        last = curve[max(curve)]
        learnt = last["accuracy"] >= wanted and last["margin"] > 0
        lines.append(
            f"{who}: accuracy {last['accuracy']:.3f} of {eval_pairs} held-out pairs after step "
            f"{max(curve)}, margin {last['margin']:.3f}: "
            + ("learnt" if learnt else f"NOT clearly learnt (an accuracy of {wanted:.3f} would be)")
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; sizes that are not given are those of a whole run, or of --quick."""
    parser = Parser(
        prog="fastdpo bench convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    for name, divisor in (("steps", "every"), ("pairs_per_step", "trl_batch")):
        if getattr(options, name) % getattr(options, divisor):
            parser.error(f"{name} has to be a multiple of {divisor}")
    if options.eval_pairs % options.trl_batch:
        parser.error("eval_pairs has to be a multiple of trl_batch")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both, write a row an evaluation, print the curves."""
    options = parse(arguments)
    disable_progress_bars()
    device = torch.device(options.device)
    if device.type == "cpu":
        keep_freed_memory()  # time is not compared here, so TRL may have it as well
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or demo_model_path())
    split = split_pairs(read_pairs(options.data), tokenizer, options)
    first = FirstModel(options.layers, options.width, options.first_steps, seed=options.seed)
    path = first.path(split.texts, tokenizer, device)
    print(f"{len(split.train)} pairs to train on, {len(split.held_out)} held out", flush=True)
    results = record.Results(f"convergence-{record.short_name(device)}", options, device)
    names = ("steps", "pairs_per_step", "learning_rate", "beta", "seed", "eval_pairs")
    case = {"model": first.name, "data": options.data}
    case |= {name: getattr(options, name) for name in names}
    curves, keep = {}, not options.quick or "FASTDPO_RESULTS" in os.environ
    for name, run in PROVIDERS.items():
        start = time.perf_counter()
        curves[name] = run(split, path, options)
        for step, figures in curves[name].items() if keep else ():
            results.add(case=case, provider=name, step=step, eval=figures)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(report(curves, options.eval_pairs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
