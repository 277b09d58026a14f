"""TRL with Liger's fused DPO loss: `python -m bench.trainers.peers.trl_liger JOB.json`.

TRL took the loss from Liger up to 1.12; later ones have a head of their own. Liger's kernels for
the layers go with it on a GPU; without one they cannot run and are left out, the loss, which is
compiled PyTorch, stays. Neither works with a precomputed reference.
"""

import torch

from ..clock import Clock
from ..with_trl import make_trainer
from . import common

_VERSIONS = ("trl", "liger-kernel", "transformers", "accelerate")
_LAYERS = ("rope", "rms_norm", "swiglu", "geglu", "cross_entropy", "fused_linear_cross_entropy")


def train(job: common.Job) -> Clock:
    """Run the job. Unsupported with a precomputed reference."""
    job.only_online("TRL with Liger's loss")
    gpu, clock = torch.cuda.is_available(), Clock()
    trainer = make_trainer(
        job.model,
        common.read_rows(job),
        bf16=job.dtype == "bf16",
        model_init_kwargs={"dtype": "bfloat16" if job.dtype == "bf16" else "float32"},
        gradient_checkpointing=job.gradient_checkpointing,
        use_liger_kernel=True,
        liger_kernel_config=None if gpu else dict.fromkeys(_LAYERS, False),
        beta=job.beta,
        max_length=job.max_length,
        **common.transformers_keys(job),
    )
    trainer.add_callback(clock.callback())
    trainer.train()
    return clock


if __name__ == "__main__":
    job = common.read_job()
    common.report(train(job), _VERSIONS, job)
