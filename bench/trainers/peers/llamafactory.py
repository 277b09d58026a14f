"""LLaMA-Factory's DPO stage: `python -m bench.trainers.peers.llamafactory JOB.json`.

Its own entry point trains the full model. It computes the reference with a second copy of the model
in every step, and pads to a multiple of eight tokens.
"""

import importlib
import importlib.machinery
import sys
import types
from typing import Any

from ..clock import Clock
from . import common

_VERSIONS = ("llamafactory", "transformers", "trl", "accelerate")


def _without_media() -> None:
    """Hide torchvision and torchaudio where they cannot be loaded.

    LLaMA-Factory requires them for images and sound; their wheels are built for CUDA and fail
    beside a torch for the CPU. Text needs nothing of them, but torchaudio is imported all the same:
    an empty module stands in for it.
    """
    for name in ("torchvision", "torchaudio"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
                del sys.modules[loaded]
            sys.modules[name] = None  # type: ignore[assignment]
    if sys.modules["torchaudio"] is None:
        empty = types.ModuleType("torchaudio")
        empty.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = empty


def _tokens(job: common.Job) -> str:
    """The rows as LLaMA-Factory keeps tokenized ones; the directory."""
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    rows: list[dict[str, Any]] = []
    for row in common.token_rows(job, AutoTokenizer.from_pretrained(job.model)):
        masks = {
            f"{name}_attention_mask": [1] * len(row[f"{name}_input_ids"])
            for name in ("chosen", "rejected")
        }
        rows.append({**row, **masks, "images": None, "videos": None, "audios": None})
    path = f"{job.output}/tokens"
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(path)
    return path


def train(job: common.Job) -> Clock:
    """Run the job. Unsupported with a precomputed reference."""
    job.only_online("LLaMA-Factory")
    from llamafactory.train.tuner import run_exp

    clock = Clock()
    settings = {
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": job.model,
        "ref_model": job.model,
        "template": "empty",
        "dataset": "tokenized",
        "tokenized_path": _tokens(job),
        "cutoff_len": job.max_length,
        "disable_shuffling": True,
        "pref_loss": "sigmoid",
        "pref_beta": job.beta,
        "output_dir": f"{job.output}/run",
        "overwrite_output_dir": True,
        "pure_bf16": job.dtype == "bf16",
        "disable_gradient_checkpointing": not job.gradient_checkpointing,
        **common.transformers_keys(job),
    }
    run_exp(settings, callbacks=[clock.callback()])
    return clock


if __name__ == "__main__":
    _without_media()
    job = common.read_job()
    common.report(train(job), _VERSIONS, job)
