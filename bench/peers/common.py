"""What the peers share: the job, its rows as token ids, the clock of the steps, the report.

It is imported by the interpreters of other trainers, so it needs the standard library and torch
alone.

Trainers differ in templates, in ends of sequence and in how they cut what is too long. A benchmark
of their speed has to give all of them the same tokens, so rows are tokenized here as TRL does and
handed over as ids: conversations through the tokenizer's chat template, strings with one end of
sequence behind each response, cut at the end, without rows whose prompt leaves no response.
"""

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch


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
    warm_up: int = 0
    """Steps that whoever reads the report leaves out; the trainer runs them all the same."""
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


class Unsupported(Exception):
    """The trainer has no such setting."""


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


def token_rows(job: Job, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Rows as `chosen_input_ids` and `rejected_input_ids` with `chosen_labels` and
    `rejected_labels`, -100 at the prompt; `steps * pairs_per_step` of them.

    Raises:
        ValueError: there are fewer.
    """
    found = []
    for row in read_rows(job):
        prompt, responses = _ids(row, tokenizer)
        if len(prompt) >= job.max_length:
            continue
        item = {}
        for name, response in zip(("chosen", "rejected"), responses, strict=True):
            item[f"{name}_input_ids"] = (prompt + response)[: job.max_length]
            item[f"{name}_labels"] = ([-100] * len(prompt) + response)[: job.max_length]
        found.append(item)
    need = job.steps * job.pairs_per_step
    if len(found) < need:
        raise ValueError(f"{job.steps} steps need {need} rows, {len(found)} are there")
    return found[:need]


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


class StepClock:
    """Seconds, loss, gradient norm and tokens of every step.

    A step is timed from the end of the one before to its own end, with the device idle at both.
    """

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self.loss: list[float] = []
        self.grad_norm: list[float] = []
        self.tokens: list[int] = []
        self._computed = 0
        self._last = 0.0

    def start(self, embedding: torch.nn.Module) -> None:
        """The first step begins now; `embedding` is that of the tokens of the trained model."""
        embedding.register_forward_pre_hook(self._count)
        self._last = _now()

    def stop(self) -> None:
        """A step ends now."""
        now = _now()
        self.step_s.append(now - self._last)
        self.tokens.append(self._computed)
        self._last, self._computed = now, 0

    def metrics(self, loss: float, grad_norm: float | None) -> None:
        """What the trainer says of the step that ended."""
        self.loss.append(float(loss))
        if grad_norm is not None:
            self.grad_norm.append(float(grad_norm))

    def _count(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._computed += inputs[0].numel()

    def callback(self) -> Any:
        """A callback for trainers that are built on that of Transformers."""
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):
            def on_train_begin(self, *arguments: Any, model: Any = None, **more: Any) -> None:
                clock.start(model.get_input_embeddings())

            def on_step_end(self, *arguments: Any, **more: Any) -> None:
                clock.stop()

            def on_log(self, *arguments: Any, logs: Any = None, **more: Any) -> None:
                if logs and "loss" in logs:
                    clock.metrics(logs["loss"], logs.get("grad_norm"))

        return Steps()


def report(clock: StepClock, packages: Sequence[str]) -> None:
    """Print what was measured as the last line of the output."""
    versions: dict[str, str | None] = {}
    for name in ("torch", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    figures = {
        "step_s": clock.step_s,
        "loss": clock.loss,
        "grad_norm": clock.grad_norm,
        "peak_mib": _peak_mib(),
        "tokens": clock.tokens,
        "versions": versions,
    }
    sys.stderr.flush()
    print("\n" + json.dumps(figures), flush=True)


def _peak_mib() -> float:
    """Allocated on a GPU; otherwise what was resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins with that of the process that started this one
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 1024 if sys.platform != "darwin" else kib / 2**20


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
