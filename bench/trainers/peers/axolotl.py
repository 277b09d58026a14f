"""axolotl's DPO: `python -m bench.trainers.peers.axolotl JOB.json`.

Its trainer is a subclass of that of TRL 1.9, which it pins, with its own loading of
models, its own optimizer step, and a garbage collection after every forward. Its data sets hand
rows to TRL as text, which ends conversations otherwise than TRL does with messages, so the rows go
to the trainer as they are.
"""

import os
from pathlib import Path
from typing import Any

from ..clock import Clock
from . import common

_VERSIONS = ("axolotl", "trl", "transformers", "accelerate")


def _settings(job: common.Job) -> dict[str, Any]:
    return {
        "base_model": job.model,
        "rl": "dpo",
        "rl_beta": job.beta,
        "datasets": [
            {"path": job.rows, "ds_type": "json", "split": "train", "type": "passthrough.default"}
        ],
        "output_dir": f"{job.output}/run",
        "shuffle_merged_datasets": False,
        "sequence_len": job.max_length,
        "precompute_ref_log_probs": job.reference == "precomputed",
        "bf16": job.dtype == "bf16",
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": job.gradient_checkpointing,
        "micro_batch_size": job.batch,
        "gradient_accumulation_steps": job.accumulation,
        "max_steps": job.steps,
        "num_epochs": 1,
        "optimizer": "adamw_torch_fused",
        "learning_rate": job.learning_rate,
        "lr_scheduler": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "save_first_step": False,
    }


def train(job: common.Job) -> Clock:
    """Run the job."""
    for name in ("AXOLOTL_DO_NOT_TRACK", "DO_NOT_TRACK"):
        os.environ[name] = "1"
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import TrainDatasetMeta
    from axolotl.train import setup_model_and_trainer
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    Path(job.output).mkdir(parents=True, exist_ok=True)
    clock = Clock()
    settings = load_cfg(DictDefault(_settings(job)))
    rows = Dataset.from_list(common.read_rows(job))
    meta = TrainDatasetMeta(train_dataset=rows, eval_dataset=None, total_num_steps=job.steps)
    trainer = setup_model_and_trainer(settings, meta)[0]
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    trainer.add_callback(clock.callback())
    trainer.train()
    return clock


if __name__ == "__main__":
    job = common.read_job()
    common.report(train(job), _VERSIONS, job)
