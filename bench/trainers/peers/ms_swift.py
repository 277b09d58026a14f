"""ms-swift's DPO: `python -m bench.trainers.peers.ms_swift JOB.json`.

Its own pipeline trains the full model. It computes the reference with a second copy of the model in
every step. What it sets otherwise than the other trainers (weight decay, the second moment's rate,
a cosine schedule with warm-up) is set back.
"""

import json
from pathlib import Path
from typing import Any

from ..clock import Clock
from . import common

_VERSIONS = ("ms-swift", "transformers", "trl", "accelerate")


def _model_type(job: common.Job) -> str:
    """The architecture's own name: several of ms-swift's models may share an architecture."""
    config = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    return str(config["model_type"])


def _arguments(job: common.Job) -> list[str]:
    settings: dict[str, Any] = {
        "rlhf_type": "dpo",
        "model": job.model,
        "model_type": _model_type(job),
        "template": "dummy",
        "dataset": job.rows,
        "tuner_type": "full",
        "torch_dtype": "bfloat16" if job.dtype == "bf16" else "float32",
        "bf16": job.dtype == "bf16",
        "fp16": False,
        "beta": job.beta,
        "attn_impl": "sdpa",
        "max_length": job.max_length,
        **common.transformers_keys(job),
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": job.gradient_checkpointing,
        "train_dataloader_shuffle": False,
        "dataset_shuffle": False,
        "dataloader_num_workers": 0,
        "split_dataset_ratio": 0.0,
        "check_model": False,
        "output_dir": f"{job.output}/run",
    }
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def train(job: common.Job) -> Clock:
    """Run the job. Unsupported with a precomputed reference."""
    job.only_online("ms-swift")
    from swift.pipelines.train.rlhf import SwiftRLHF

    clock = Clock()

    class Tokenized(SwiftRLHF):
        def _prepare_dataset(self) -> list[Any]:
            return [common.token_rows(job, self.tokenizer), None]

        def train(self, trainer: Any) -> Any:
            trainer.add_callback(clock.callback())
            return super().train(trainer)

    Tokenized(_arguments(job)).main()
    return clock


if __name__ == "__main__":
    job = common.read_job()
    common.report(train(job), _VERSIONS, job)
