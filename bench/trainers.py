"""One training run by one provider in this process, measured step by step.

    python -m bench.trainers --provider trl --model tiny-llama --data gsm8k --batch 4

prints one JSON object: seconds and metrics of every optimizer step, and the peak resident memory of
the process. Both providers get the same rows in the same order, the same number of comparisons a
step, fp32, no dropout, a precomputed reference, and the same optimizer. The first steps warm up and
are not counted.
"""

import argparse
import itertools
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from . import data, models


def rows_of(name: str, count: int, skip: int = 0) -> list[dict[str, Any]]:
    """`count` preference pairs of a named data set, in its own order, without prompts that are cut
    off.

    Prompts of 3000 characters or more are left out, since both providers drop those that fill
    `max_length`.
    """
    rows = data.dpo_en_demo() if name == "dpo_en_demo" else data.gsm8k_pairs()
    if rows is None:
        raise SystemExit(f"{name}: the data is not here")
    short = (row for row in rows if len(json.dumps(row["prompt"])) < 3000)
    return list(itertools.islice(short, skip, skip + count))


class StepClock:
    """Collects the duration and the metrics of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self._last = time.perf_counter()

    def start(self) -> None:
        """A step begins now."""
        self._last = time.perf_counter()

    def stop(self) -> None:
        """A step ends now."""
        self.seconds.append(time.perf_counter() - self._last)


def run_trl(
    rows: list[dict[str, Any]], model: Path, steps: int, per_step: int, batch: int, **options: Any
) -> StepClock:
    """TRL's own DPOTrainer: `per_step / batch` accumulated batches a step, rows in their order."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = StepClock()

    class Timer(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
            if logs and "loss" in logs:
                clock.metrics.append({k: float(v) for k, v in logs.items()})

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as output:
        settings = {
            "precompute_ref_log_probs": True,
            "gradient_checkpointing": False,
            "learning_rate": 1e-5,
            **options,
        }
        args = DPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=per_step // batch,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = InOrder(
            model=str(model),
            args=args,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Timer()],
        )
        trainer.train()
    return clock


def run_fastdpo(
    rows: list[dict[str, Any]], model: Path, steps: int, per_step: int, batch: int, **options: Any
) -> StepClock:
    """`fastdpo.train.run.train`; `batch` is the token budget of a row, 0 the default one."""
    from fastdpo.config import TrainConfig
    from fastdpo.train import loop
    from fastdpo.train.run import train

    clock = StepClock()
    take = loop.Trainer._take

    def timed(self: Any, step: Any) -> None:
        clock.start()
        take(self, step)
        clock.stop()

    with tempfile.TemporaryDirectory() as output:
        file = Path(output) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {"gradient_checkpointing": False, "learning_rate": 1e-5, **options}
        config = TrainConfig.from_dict(
            {
                "model_name_or_path": str(model),
                "dataset_name": str(file),
                "output_dir": f"{output}/run",
                "reference_cache_dir": f"{output}/reference",
                "use_cpu": True,
                "bf16": False,
                "shuffle": False,
                "max_steps": steps,
                "per_device_train_batch_size": per_step,
                "max_tokens_per_batch": batch or None,
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
                **settings,
            }
        )
        loop.Trainer._take = timed  # type: ignore[method-assign]
        try:
            train(config, say=lambda text: None)
        finally:
            loop.Trainer._take = take  # type: ignore[method-assign]
        lines = (Path(output) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        clock.metrics = [json.loads(line) for line in lines]
    return clock


PROVIDERS = {"trl": run_trl, "fastdpo": run_fastdpo}


def main() -> None:
    """Parse the command line, run, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--provider", choices=PROVIDERS, required=True)
    parser.add_argument("--model", choices=models.NAMES, required=True)
    parser.add_argument("--data", choices=("dpo_en_demo", "gsm8k"), required=True)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--per-step", type=int, default=8, help="comparisons a step")
    parser.add_argument("--batch", type=int, default=0, help="trl: pairs a batch; fastdpo: tokens")
    parser.add_argument("--skip", type=int, default=0, help="rows to leave out at the start")
    options = parser.parse_args()
    rows = rows_of(options.data, options.steps * options.per_step, options.skip)
    run = PROVIDERS[options.provider]
    clock = run(
        rows, models.model_path(options.model), options.steps, options.per_step, options.batch
    )
    counted = clock.seconds[options.warm_up :]
    print(
        json.dumps(
            {
                **vars(options),
                "step_seconds": clock.seconds,
                "pairs_per_second": len(counted) * options.per_step / sum(counted),
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "loss": [m["loss"] for m in clock.metrics],
            }
        )
    )


if __name__ == "__main__":
    main()
