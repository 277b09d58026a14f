"""TRL with Liger's fused DPO loss: `python -m bench.peers.trl_liger JOB.json`.

TRL took the loss from Liger up to 1.12; later ones have a head of their own. Liger's kernels for
the layers go with it on a GPU; without one they cannot run and are left out, the loss, which is
compiled PyTorch, stays. Neither works with a precomputed reference.
"""

from typing import Any

import torch

from . import common

_VERSIONS = ("trl", "liger-kernel", "transformers", "accelerate")
_LAYERS = ("rope", "rms_norm", "swiglu", "geglu", "cross_entropy", "fused_linear_cross_entropy")


def train(job: common.Job) -> common.StepClock:
    """Run the job. Unsupported with a precomputed reference."""
    job.only_online("TRL with Liger's loss")
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    gpu = torch.cuda.is_available()
    clock = common.StepClock()
    arguments = DPOConfig(
        output_dir=job.output,
        use_cpu=not gpu,
        bf16=job.dtype == "bf16",
        model_init_kwargs={"dtype": "bfloat16" if job.dtype == "bf16" else "float32"},
        gradient_checkpointing=job.gradient_checkpointing,
        use_liger_kernel=True,
        liger_kernel_config=None if gpu else dict.fromkeys(_LAYERS, False),
        beta=job.beta,
        max_length=job.max_length,
        max_steps=job.steps,
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=job.accumulation,
        learning_rate=job.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = InOrder(
        model=job.model,
        args=arguments,
        train_dataset=Dataset.from_list(common.read_rows(job)),
        callbacks=[clock.callback()],
    )
    trainer.train()
    return clock


if __name__ == "__main__":
    common.report(train(common.read_job()), _VERSIONS)
