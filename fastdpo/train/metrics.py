"""Metrics under TRL's names: summed over the rows of a step on the device, averaged exactly over
its comparisons.
"""

import json
import resource
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.batch import Batch
from ..errors import ConfigError
from ..files import explain, sync, write_text
from ..model.quantised import count_weights

TOKEN_STATS = ("entropy", "mean_logit", "is_top1")
# Rewards closer than this differ by the rounding of fp32 sums alone.
_TIE = 1e-5
_SUMS = (
    "loss",
    "comparisons",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "chosen_tokens",
    "rejected_tokens",
    "entropy",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
)


class StepSums:
    """Sums over the comparisons and tokens of one step (or one evaluation).

    A token of a response that several comparisons name counts once for each, as it does where every
    comparison is a pair of sequences. A tie of rewards counts one half, so a policy that still is
    its reference has accuracy 0.5.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self.comparisons = 0
        self.pair_tokens = 0
        self.computed_tokens = 0

    def add(
        self, batch: Batch, loss: Tensor, logps: Tensor, ref_logps: Tensor, stats: Any, beta: float
    ) -> None:
        """Add one row: its share of the loss, (R,) log-probabilities of both models, per-token
        statistics.
        """
        win, lose = batch.comparisons.unbind(1)
        # Both rounded alike, so that equal models have equal rewards.
        ratios = beta * (logps - ref_logps.to(logps.dtype))
        chosen, rejected = ratios[win], ratios[lose]
        margins = chosen - rejected
        count = logps.new_zeros(2, len(logps))
        ones = logps.new_ones(len(win))
        wins = count[0].index_add_(0, win, ones)[batch.response_ids]
        losses = count[1].index_add_(0, lose, ones)[batch.response_ids]
        values = [
            loss.detach(),
            ones.sum(),
            chosen.sum(),
            rejected.sum(),
            (margins > _TIE).sum() + 0.5 * (margins.abs() <= _TIE).sum(),
            margins.sum(),
            logps[win].sum(),
            logps[lose].sum(),
            wins.sum(),
            losses.sum(),
            ((wins + losses) * stats.entropy).sum(),
            (wins * stats.mean_logit).sum(),
            (losses * stats.mean_logit).sum(),
            (wins * stats.is_top1).sum(),
        ]
        self.sums += torch.stack([v.double() for v in values])
        self.comparisons += len(win)
        self.pair_tokens += batch.pair_tokens
        self.computed_tokens += batch.computed_tokens

    def means(self, sums: list[float] | None = None) -> dict[str, float]:
        """The metrics, each a mean over comparisons or over tokens; reads the device, unless its
        `sums` are given.
        """
        total = dict(zip(_SUMS, self.sums.tolist() if sums is None else sums, strict=True))
        pairs = max(total.pop("comparisons"), 1.0)
        chosen = max(total.pop("chosen_tokens"), 1.0)
        rejected = max(total.pop("rejected_tokens"), 1.0)
        divisor = {
            "loss": 1.0,
            "entropy": chosen + rejected,
            "logits/chosen": chosen,
            "logits/rejected": rejected,
            "mean_token_accuracy": chosen,
        }
        return {name: value / divisor.get(name, pairs) for name, value in total.items()}


def rates(
    model: torch.nn.Module, comparisons: int, pair_tokens: int, computed_tokens: int, seconds: float
) -> dict[str, float]:
    """Throughput of steps that took `seconds`.

    `tokens_per_second` counts the tokens that two unpadded sequences per comparison hold, so
    sharing shows in it.
    """
    found = {
        "tokens_per_second": pair_tokens / seconds,
        "pairs_per_second": comparisons / seconds,
        "tokens_saved_by_sharing": 1 - computed_tokens / pair_tokens,
    }
    parameters = sum(count_weights(p) for p in model.parameters())
    mfu = model_flops_utilisation(parameters, computed_tokens, seconds)
    return found if mfu is None else found | {"mfu": mfu}


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: allocated on the GPU, or resident in this process on a CPU. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins with that of the process that started this one
        lines = status.read_text().splitlines()
        found = next((line for line in lines if line.startswith("VmHWM:")), None)
        if found is not None:
            return int(found.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


_PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "B200": 2250.0, "A100": 312.0, "L40S": 362.0}


def model_flops_utilisation(parameters: int, tokens: int, seconds: float) -> float | None:
    """6·parameters·tokens / seconds over the GPU's dense bf16 peak; None where the peak is not
    known.
    """
    peak = peak_tflops()
    return None if peak is None else 6.0 * parameters * tokens / seconds / (peak * 1e12)


def peak_tflops() -> float | None:
    """The GPU's dense bf16 peak; None where there is no GPU or its peak is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((v for key, v in _PEAK_TFLOPS.items() if key in name), None)


class Tracker(Protocol):
    """What a metrics service has to offer."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""


class _TensorBoard:
    def __init__(self, output_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.make = partial(SummaryWriter, str(output_dir / "runs"))
        self.writer: Any = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.writer = self.writer or self.make()  # it writes a file when it is made
        for name, value in metrics.items():
            prefix = "" if name.startswith("eval_") else "train/"
            self.writer.add_scalar(prefix + name, value, step)
        self.writer.flush()


class _Run:
    """wandb and trackio share this interface."""

    def __init__(self, module: str, run_name: str | None, config: dict[str, Any]) -> None:
        service = __import__(module)
        self.run = service.init(project="fastdpo", name=run_name, config=config)
        self.service = service

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.service.log(metrics, step=step)


def make_trackers(
    report_to: Iterable[str], output_dir: Path, run_name: str | None, config: dict[str, Any]
) -> list[Tracker]:
    """The services that `report_to` names. ConfigError for one that is not installed."""
    trackers: list[Tracker] = []
    for name in report_to:
        if name == "none":
            continue
        try:
            if name == "tensorboard":
                trackers.append(_TensorBoard(output_dir))
            else:
                trackers.append(_Run(name, run_name, config))
        except ImportError as error:
            raise ConfigError(f"report_to: {name} is not installed ({error})") from error
    return trackers


def show(metrics: dict[str, float]) -> str:
    """The few metrics that a person watches, in one line."""
    names = {
        "loss": "loss",
        "rewards/margins": "margin",
        "rewards/accuracies": "reward accuracy",
        "tokens_per_second": "tokens/s",
    }
    found = ((short, metrics.get(n, metrics.get(f"eval_{n}"))) for n, short in names.items())
    return ", ".join(f"{short} {value:.4g}" for short, value in found if value is not None)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line; what is written before `open` waits for it."""

    def __init__(self, path: Path, trackers: list[Tracker], resumed_step: int | None) -> None:
        self.path, self.trackers = path, trackers
        self._waiting: list[tuple[dict[str, float], int]] | None = []
        self._kept: list[str] = []
        if resumed_step is not None and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            self._kept = [line for line in lines if _step(line) <= resumed_step]

    def last(self) -> dict[str, float]:
        """The last value of every metric in the lines that a resumed run keeps."""
        found: dict[str, float] = {}
        for line in self._kept:
            found |= json.loads(line)
        found.pop("step", None)
        return found

    def open(self) -> None:
        """Start the file; a resumed run keeps the lines of the steps that it does not repeat."""
        if self._waiting is None:
            return
        write_text(self.path, "".join(line + "\n" for line in self._kept))
        self._kept = []
        waiting, self._waiting = self._waiting, None
        for metrics, step in waiting:
            self.write(metrics, step)

    def write(self, metrics: dict[str, float], step: int) -> None:
        """Append the metrics of a step and hand them to the trackers."""
        if self._waiting is not None:
            self._waiting.append((metrics, step))
            return
        with explain(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def sync(self) -> None:
        """Bring every line to the disk, where a checkpoint of their steps is about to be."""
        with explain(self.path):
            sync(self.path)


def _step(line: str) -> float:
    """Of a line of metrics; infinite where it is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return float("inf")
