"""What one process of a measured run does: trains, and says what it has seen of every step.

torchrun's own agent starts the processes. They are forked from a server that has imported the
trainers, so that a run of a few seconds does not begin with as many of imports.
"""

import logging
import multiprocessing
import os
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..jsonl import read_rows
from ..trainers.clock import Clock, Unsupported
from ..trainers.process import ROOT, Failed, reason
from .memory import Peak, held, optimizer_alive
from .wire import Sent, loopback_bytes

_LAUNCHER = re.compile(r"(LOCAL_|GROUP_|ROLE_|TORCHELASTIC_|MASTER_)\w+|RANK|WORLD_SIZE")
_ERRORS = "TORCHELASTIC_ERROR_FILE"
SECONDS = 120
"""How long ranks wait for each other before a run has failed."""


def serve() -> None:
    """Prepare the server of this process's runs; to be called before the first."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "TQDM_DISABLE": "1"}
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    modules = ["fastdpo.training.run", "trl.trainer.dpo_trainer", __name__]
    multiprocessing.set_forkserver_preload(modules)


def run_ranks(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run a job in its `processes`; what each of them has seen.

    Raises:
        Failed: one of them failed.
    """
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job["processes"],
        run_id=Path(job["folder"]).name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
    )
    try:
        seen: dict[int, dict[str, Any]] = elastic_launch(settings, on_rank)(dict(job))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        said = failure.message
        text = said["message"] if isinstance(said, dict) else str(said)
        raise Failed(reason(failure.exitcode, text)) from None
    return [seen[rank] for rank in sorted(seen)]


@record
def on_rank(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job as one of its ranks; figures of every step."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    folder = Path(job["folder"])
    if job["apart"]:
        for name in [name for name in os.environ if _LAUNCHER.fullmatch(name) and name != _ERRORS]:
            del os.environ[name]
        folder = folder / str(rank)
    watch = Watch(job, rank)
    with ExitStack() as stack:
        if watch.sent is not None:
            stack.enter_context(watch.sent)
        {"fastdpo": _fastdpo, "trl": _trl}[job["provider"]](job, folder, watch)
    metrics = watch.clock.metrics
    named = {name: [line.get(name) for line in metrics] for name in ("loss", "grad_norm")}
    return {"step_s": watch.clock.seconds, **named, **watch.seen}


class Watch:
    """What is asked for of every step: its time; or what it sends; or what it holds."""

    def __init__(self, job: Mapping[str, Any], rank: int) -> None:
        self.job, self.rank = job, rank
        self.clock = Clock()
        self.sent = Sent() if job["kind"] == "bytes" else None
        self.peak = Peak() if job["kind"] == "memory" else None
        self.seen: dict[str, Any] = {"sent": [], "loopback": [], "rows": [], "tokens": []}
        self.rows = self.tokens = 0
        self.steps = 0
        torch.nn.modules.module.register_module_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and torch.is_grad_enabled():
            self.rows += 1
            self.tokens += inputs[0].numel()

    def step(self, metrics: Mapping[str, float] | None = None) -> None:
        """A step has ended."""
        self.steps += 1
        self.clock.stop(metrics)
        self.seen["rows"].append(self.rows)
        self.seen["tokens"].append(self.tokens)
        self.rows = self.tokens = 0
        if self.sent is not None:
            self.seen["sent"].append(self.sent.take())
            self.seen["loopback"].append(loopback_bytes())
        if self.peak is not None:
            self._memory(self.peak)
        if self.job["apart"] and self.steps == self.job["case"]["warm_up"]:
            self._meet()
            self.clock.restart()

    def _memory(self, peak: Peak) -> None:
        """Of the last step but one what is held after it, of the last one the peak."""
        left = self.job["steps"] - self.steps
        if left == 1:
            self.seen["held"] = held(optimizer_alive())
            peak.start()
        elif left == 0:
            self.seen["beyond"] = peak.stop()

    def _meet(self) -> None:
        """Wait for the processes that have nothing else to do with this one."""
        place = Path(self.job["folder"]) / "met"
        place.mkdir(exist_ok=True)
        (place / str(self.rank)).touch()
        end = time.monotonic() + SECONDS
        while len(list(place.iterdir())) < self.job["processes"]:
            if time.monotonic() > end:
                raise Failed("Timeout: other processes did not come as far")
            time.sleep(0.002)


def _fastdpo(job: Mapping[str, Any], folder: Path, watch: Watch) -> None:
    from fastdpo import train

    from ..trainers.providers import fastdpo_config

    keys = _keys(job["case"]) | {"bf16": False, "logging_steps": 1}
    config = fastdpo_config(
        Path(job["model"]),
        folder,
        max_steps=job["steps"],
        per_device_train_batch_size=job["units"],
        ddp_timeout=SECONDS,
        **keys | job["keys"],
    )
    train(config, rows=read_rows(Path(job["rows"])), on_step=lambda _, metrics: watch.step(metrics))


def _trl(job: Mapping[str, Any], folder: Path, watch: Watch) -> None:
    from datasets import load_dataset
    from transformers import TrainerCallback

    from ..trainers.with_trl import make_trainer

    keys = _keys(job["case"]) | job["keys"]
    cache = str(folder / "cache")
    rows = load_dataset("json", data_files=job["rows"], split="train", cache_dir=cache)
    trainer = make_trainer(
        Path(job["model"]),
        rows,
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        per_device_eval_batch_size=job["batch"],
        gradient_accumulation_steps=job["units"] // job["batch"],
        precompute_ref_log_probs=True,
        model_init_kwargs={"dtype": keys.pop("dtype")},
        bf16=False,
        logging_steps=1,
        ddp_timeout=SECONDS,
        **keys,
    )
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    if job["keys"].get("fsdp") and kind != "FSDP":
        raise Unsupported(f"accelerate has no FSDP on a CPU: {kind} is what it made of it")

    class Steps(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            watch.step()

        def on_log(self, *arguments: Any, logs: Any = None, **more: Any) -> None:
            if logs and "loss" in logs:
                watch.clock.metrics.append(logs)

    trainer.add_callback(Steps())
    trainer.train()


def _keys(case: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that both trainers have."""
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[case["dtype"]]
    named = ("learning_rate", "gradient_checkpointing")
    return {name: case[name] for name in named} | {"dtype": dtype, "max_length": None}
