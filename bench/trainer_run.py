"""One training run by one provider in this process: what the trainer benchmark starts.

    python -m bench.trainer_run JOB.json

The job names the case, the provider, its batch, the model's directory and the file with the rows;
the last line of the output is one JSON object with what was measured. A process of its own makes
the peak memory that of this run alone, and lets the operating system take everything back.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fastdpo.devices import peak_memory_mib

from . import peers
from .trainer_providers import PROVIDERS, Clock
from .workloads import Row


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job; seconds, tokens, loss and gradient norm of every step, and the peak memory."""
    case, name = job["case"], job["provider"]
    if name in peers.PEERS:
        wanted = {**case, **job, "beta": 0.1}
        return {**peers.run_job(name, wanted), "product_tflops": product_tflops(case["dtype"])}
    lines = Path(job["rows"]).read_text(encoding="utf-8").splitlines()
    rows: list[Row] = [json.loads(line) for line in lines]
    limit = case.get("limit_gib")
    if limit and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 2**30 / whole))
    clock: Clock = PROVIDERS[name](
        rows,
        Path(job["model"]),
        case["steps"],
        case["pairs_per_step"],
        job["batch"],
        **options(case),
        **keys_for(name, case.get("keys", ())),
    )
    return {
        "step_s": clock.seconds,
        "tokens": clock.tokens,
        "loss": [metrics["loss"] for metrics in clock.metrics],
        "grad_norm": [metrics["grad_norm"] for metrics in clock.metrics],
        "attention": clock.attention,
        "peak_mib": peak_memory_mib(device()),
        "planned_mib": clock.planned_mib,
        "product_tflops": product_tflops(case["dtype"]),
    }


def options(case: dict[str, Any]) -> dict[str, Any]:
    """A case as keys of a trainer's configuration, the same for TRL and for fastdpo."""
    chosen: dict[str, Any] = {
        "precompute_ref_log_probs": case["reference"] == "precomputed",
        "gradient_checkpointing": case["gradient_checkpointing"],
        "learning_rate": case["learning_rate"],
        "max_length": case["max_length"],
        "bf16": case["dtype"] == "bf16",
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[case["dtype"]],
    }
    if case["lora"]:
        adapter = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
        chosen |= {"use_peft": True, "lora_target_modules": "all-linear", **adapter}
    return chosen


def keys_for(name: str, keys: Sequence[str]) -> dict[str, Any]:
    """Those of `PROVIDER.KEY=VALUE` that are for this provider, values read as YAML."""
    parted = [key.partition("=") for key in keys]
    named = [(*left.partition(".")[::2], value) for left, _, value in parted]
    return {key: yaml.safe_load(value) for provider, key, value in named if provider == name}


def device() -> torch.device:
    """What is trained on here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_tflops(dtype: str) -> float:
    """What a large matrix product of this dtype reaches here, in TFLOP/s: the best of five."""
    size = 8192 if device().type == "cuda" else 2048
    a = torch.ones(size, size, device=device(), dtype={"bf16": torch.bfloat16}.get(dtype))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        if a.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def main() -> None:
    """Read the job, run it, print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("job", type=Path)
    found = measure(json.loads(parser.parse_args().job.read_text(encoding="utf-8")))
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
