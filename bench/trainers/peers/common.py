"""What the peers share: the job, its rows as token ids, the report.

It is imported by the interpreters of other trainers, so it needs the standard library and torch
alone.

Trainers differ in templates, in ends of sequence and in how they cut what is too long. A benchmark
of their speed has to give all of them the same tokens, so rows are tokenized here as TRL does and
handed over as ids: conversations through the tokenizer's chat template, strings with one end of
sequence behind each response, cut at the end, without rows whose prompt leaves no response.
"""

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..clock import Clock, Unsupported, print_report


@dataclass(frozen=True)
class Job:
    """One training run, as the file names it."""

    model: str
    """Directory with configuration, weights and tokenizer."""
    rows: str
    """JSON lines of prompt, chosen and rejected: strings or lists of messages."""
    steps: int
    pairs_per_step: int
    batch: int
    """Pairs in a forward."""
    learning_rate: float
    output: str
    """A directory for what the trainer writes."""
    beta: float = 0.1
    dtype: str = "fp32"
    """Of the weights and of the computation: fp32 or bf16."""
    gradient_checkpointing: bool = False
    reference: str = "precomputed"
    """precomputed, or online for the reference's forward in every step."""
    max_length: int = 1024
    lora: bool = False
    """An adapter instead of all weights: no peer has been tried with one."""

    @property
    def accumulation(self) -> int:
        """Forwards a step. ValueError where `batch` does not divide `pairs_per_step`."""
        if self.pairs_per_step % self.batch:
            raise ValueError(f"{self.pairs_per_step} pairs a step are no multiple of {self.batch}")
        return self.pairs_per_step // self.batch

    def only_online(self, trainer: str) -> None:
        """Raise `Unsupported` if the reference should be precomputed."""
        if self.reference != "online":
            raise Unsupported(f"{trainer} computes the reference in every step")


def read_job(arguments: Sequence[str] | None = None) -> Job:
    """The job in the file that the command line names. Unsupported with an adapter."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    known = {field.name for field in fields(Job)}
    job = Job(**{name: value for name, value in values.items() if name in known})
    if job.lora:
        raise Unsupported("an adapter has not been tried with this trainer")
    return job


def read_rows(job: Job) -> list[dict[str, Any]]:
    """The rows that the run takes, in their order."""
    with Path(job.rows).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def transformers_keys(job: Job) -> dict[str, Any]:
    """What trainers that are built on that of Transformers say in the same words."""
    return {
        "use_cpu": not torch.cuda.is_available(),
        "max_steps": job.steps,
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": job.accumulation,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def token_rows(job: Job, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Rows as `chosen_input_ids` and `rejected_input_ids` with `chosen_labels` and
    `rejected_labels`, -100 at the prompt; `steps * pairs_per_step` of them.

    Raises:
        ValueError: there are fewer.
    """
    rows = []
    for row in read_rows(job):
        prompt, responses = _ids(row, tokenizer)
        if len(prompt) >= job.max_length:
            continue
        item = {}
        for name, response in zip(("chosen", "rejected"), responses, strict=True):
            item[f"{name}_input_ids"] = (prompt + response)[: job.max_length]
            item[f"{name}_labels"] = ([-100] * len(prompt) + response)[: job.max_length]
        rows.append(item)
    need = job.steps * job.pairs_per_step
    if len(rows) < need:
        raise ValueError(f"{job.steps} steps need {need} rows, {len(rows)} are there")
    return rows[:need]


def _ids(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """The longest beginning that prompt and both sequences share; what follows it in each."""
    if isinstance(row["prompt"], str):
        ends = [
            text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
            for text in (row["chosen"], row["rejected"])
        ]
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = [tokenizer(row["prompt"] + text)["input_ids"] for text in ends]
    else:
        options = {"tokenize": True, "return_dict": True}
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, **options
        )["input_ids"]
        whole = [
            tokenizer.apply_chat_template(row["prompt"] + row[name], **options)["input_ids"]
            for name in ("chosen", "rejected")
        ]
    length = min(_shared(prompt, ids) for ids in whole)
    return prompt[:length], [ids[length:] for ids in whole]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def report(clock: Clock, packages: Sequence[str], job: Job) -> None:
    """Print what was measured as the last line of the output."""
    versions: dict[str, str | None] = {}
    for name in ("torch", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    print_report({**clock.report(job.dtype), "versions": versions})
