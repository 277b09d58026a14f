"""torchtune's full DPO recipe: `python -m bench.trainers.peers.torchtune JOB.json`.

The one recipe that trains all weights is the distributed one; it runs here as a single process,
with its own step, loss, collation and sharding. Put in place of its own are the rows, a linear
schedule (it has a cosine alone), no checkpoint at the end, and no gradient for the padding token.
It computes the reference with a second copy of the model in every step. It builds its own models,
of which plain Llama is tried here.
"""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..clock import Clock, Unsupported
from . import common

_VERSIONS = ("torchtune", "torchao", "transformers")


def _model(job: common.Job) -> dict[str, Any]:
    """torchtune's builder and its arguments. Unsupported for another architecture."""
    config = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    plain = (
        config["model_type"] == "llama"
        and not config.get("tie_word_embeddings")
        and not config.get("attention_bias")
        and rope.get("rope_type", "default") == "default"
        and config.get("head_dim", hidden // heads) * heads == hidden
    )
    if not plain:
        raise Unsupported("torchtune: another model than an untied Llama with plain rotations")
    return {
        "_component_": "torchtune.models.llama2.llama2",
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": hidden,
        "intermediate_dim": config["intermediate_size"],
        "max_seq_len": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_base": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
    }


def _settings(job: common.Job, pad: int) -> dict[str, Any]:
    weights = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": job.model,
        "checkpoint_files": [path.name for path in sorted(Path(job.model).glob("*.safetensors"))],
        "output_dir": f"{job.output}/run",
        "model_type": "LLAMA2",
    }
    return {
        "output_dir": f"{job.output}/run",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": job.dtype,
        "seed": 0,
        "model": _model(job),
        "tokenizer": {"_component_": "types.SimpleNamespace", "pad_id": pad},
        "checkpointer": weights,
        "ref_checkpointer": weights,
        "resume_from_checkpoint": False,
        "dataset": {},
        "shuffle": False,
        "batch_size": job.batch,
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "lr": job.learning_rate,
            "weight_decay": 0.0,
            "fused": True,
        },
        "lr_scheduler": {},
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": job.beta},
        "epochs": 1,
        "max_steps_per_epoch": job.steps,
        "gradient_accumulation_steps": job.accumulation,
        "clip_grad_norm": 1.0,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": f"{job.output}/logs",
        },
        "enable_activation_checkpointing": job.gradient_checkpointing,
    }


def _recipe(job: common.Job, rows: list[dict[str, list[int]]], pad: int) -> Any:
    """The recipe's class, out of its file: it is no module, by its authors' wish."""
    import torchtune
    from torchtune.data import padded_collate_dpo

    path = Path(torchtune.__file__).parents[1] / "recipes" / "full_dpo_distributed.py"
    spec = importlib.util.spec_from_file_location("full_dpo_distributed", path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not torch.cuda.is_available():
        module.training.get_memory_stats = lambda device: {}
        module.training.log_memory_stats = lambda stats: None
        module.training.cleanup_before_training = lambda: None

    data: Any = rows

    class Recipe(module.FullDPORecipeDistributed):  # type: ignore[name-defined]
        def _setup_data(self, *arguments: Any, **more: Any) -> Any:
            sampler: Any = torch.utils.data.DistributedSampler(data, 1, 0, shuffle=False)
            loader: Any = torch.utils.data.DataLoader(
                data,
                batch_size=job.batch,
                sampler=sampler,
                collate_fn=lambda batch: padded_collate_dpo(batch, padding_idx=pad),
            )
            return sampler, loader

        def _setup_lr_scheduler(self, *arguments: Any, **more: Any) -> Any:
            return torch.optim.lr_scheduler.LambdaLR(
                self._optimizer, lambda step: max(0.0, 1 - step / job.steps)
            )

        def save_checkpoint(self, epoch: int) -> None:
            pass

    return Recipe


class _Logger:
    """Takes the recipe's figures at the end of a step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._clip = torch.nn.utils.clip_grad_norm_
        self._norm: Any = None
        torch.nn.utils.clip_grad_norm_ = self._keep

    def _keep(self, *arguments: Any, **more: Any) -> Any:
        self._norm = self._clip(*arguments, **more)
        return self._norm

    def log_dict(self, figures: dict[str, Any], step: int) -> None:
        norm = float(self._norm.full_tensor())
        self._clock.stop({"loss": figures["loss"], "grad_norm": norm})

    def close(self) -> None:
        torch.nn.utils.clip_grad_norm_ = self._clip


def train(job: common.Job) -> Clock:
    """Run the job. Unsupported with a precomputed reference or another architecture."""
    job.only_online("torchtune")
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = OmegaConf.create(_settings(job, pad))
    clock = Clock()
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        recipe = _recipe(job, common.token_rows(job, tokenizer), pad)(settings)
        recipe.setup(settings)
        recipe._metric_logger = _Logger(clock)
        # Transformers gives the padding token no gradient, even where it also ends each turn.
        recipe._model.tok_embeddings.padding_idx = pad
        recipe.train()
        recipe.cleanup()
    return clock


if __name__ == "__main__":
    job = common.read_job()
    common.report(train(job), _VERSIONS, job)
