"""One training run by one provider in this process: what the trainer benchmark starts.

    python -m bench.trainers.job JOB.json

The job is a case with its provider, that one's batch, the model's directory and the file with the
rows; the last line of the output is one JSON object with what was measured. A process of its own
makes the peak memory that of this run alone, and lets the operating system take everything back.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from .clock import Clock, print_report
from .providers import PROVIDERS
from .with_trl import REFERENCE_FREE, trl_keys


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job; seconds, tokens, loss and gradient norm of every step, and the peak memory."""
    name = job["provider"]
    lines = Path(job["rows"]).read_text(encoding="utf-8").splitlines()
    limit = job.get("limit_gib")
    if limit and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 2**30 / whole))
    clock: Clock = PROVIDERS[name](
        [json.loads(line) for line in lines],
        Path(job["model"]),
        job["steps"],
        **sizes_for(name, job),
        **keys_of(job),
        **loss_for(name, job.get("loss")),
        **keys_for(name, job.get("keys", ())),
    )
    return {**clock.report(job["dtype"]), "planned_mib": clock.planned_mib}


def sizes_for(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Rows of a step and of a batch. A loss may depend on who is in its batch, so fastdpo has those
    of TRL for it; its rows of tokens have their default length.
    """
    per_step, batch = job["pairs_per_step"], job["batch"]
    if name == "fastdpo" and job.get("loss"):
        accumulated = {"gradient_accumulation_steps": per_step // batch}
        return {"per_step": batch, "batch": 0, **accumulated}
    return {"per_step": per_step, "batch": batch}


def loss_for(name: str, loss: str | None) -> dict[str, Any]:
    """The keys that select a loss, none where it is the usual one."""
    if loss is None:
        return {}
    return {"loss_type": [loss]} if name == "fastdpo" else trl_keys(loss)


def keys_of(case: dict[str, Any]) -> dict[str, Any]:
    """A case as keys of a trainer's configuration, the same for TRL and for fastdpo."""
    keys: dict[str, Any] = {
        "gradient_checkpointing": case["gradient_checkpointing"],
        "learning_rate": case["learning_rate"],
        "max_length": case["max_length"],
        "bf16": case["dtype"] == "bf16",
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[case["dtype"]],
    }
    if trl_keys(case.get("loss", "sigmoid"))["trainer"] not in REFERENCE_FREE:
        keys["precompute_ref_log_probs"] = case["reference"] == "precomputed"
    if case["lora"]:
        adapter = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
        keys |= {"use_peft": True, "lora_target_modules": "all-linear", **adapter}
    return keys


def keys_for(name: str, keys: Sequence[str]) -> dict[str, Any]:
    """Those of `PROVIDER.KEY=VALUE` that are for this provider, values read as YAML."""
    parted = [key.partition("=") for key in keys]
    named = [(*left.partition(".")[::2], value) for left, _, value in parted]
    return {key: yaml.safe_load(value) for provider, key, value in named if provider == name}


if __name__ == "__main__":
    print_report(measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
