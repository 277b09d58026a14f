"""What a finished run says last: what came of it, where things are, what to do next."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

from .output import METRICS
from .run import TrainResult

REPORT = "report.html"
_ACCURACY, _LOSS = "eval_rewards/accuracies", "eval_loss"
_LABEL = 10
_NARROW = 40


def summary(result: TrainResult, width: int = 80, bold: bool = False) -> str:
    """Five lines, folded to `width`, or below each of their labels where that is very narrow; names
    of files and commands are never broken. With `bold` labels for a terminal.
    """
    lines = {
        "Held out": _held_out(result),
        "Took": _took(result),
        "Model": f"{result.output_dir}" + (f" and {result.url}" if result.url else ""),
        "Figures": " and ".join(_figures(result.output_dir)),
        "Try it": f"fastdpo chat {result.output_dir}",
    }
    return "\n".join(_line(label, text, width, bold) for label, text in lines.items())


def _line(label: str, text: str, width: int, bold: bool) -> str:
    shown = f"\033[1m{label}\033[0m" if bold else label
    indent = 2 if width < _NARROW else _LABEL
    parts = textwrap.wrap(
        text, max(1, width - indent), break_long_words=False, break_on_hyphens=False
    )
    rest = ("\n" + " " * indent).join(parts)
    between = "\n  " if width < _NARROW else " " * (_LABEL - len(label))
    return f"{shown}{between}{rest}"


def _held_out(result: TrainResult) -> str:
    name = _ACCURACY if _ACCURACY in result.metrics else _LOSS
    after = result.metrics.get(name)
    if after is None:
        return "not evaluated (do_eval or eval_strategy evaluates)"
    what = "accuracy" if name == _ACCURACY else "loss"
    before = _at_start(result.output_dir).get(name)
    if before is None:
        return f"{what} {after:.3f} (eval_on_start evaluates before the first step too)"
    return f"{what} {before:.3f} before, {after:.3f} after"


def _at_start(folder: Path) -> Mapping[str, float]:
    """The metrics that were evaluated before the first step; {} where none were."""
    try:
        with (folder / METRICS).open(encoding="utf-8") as lines:
            first = json.loads(next(lines))
    except (OSError, ValueError, StopIteration):
        return {}
    return first if isinstance(first, dict) and first.get("step") == 0 else {}


def _took(result: TrainResult) -> str:
    speed = f", {result.tokens / result.seconds:,.0f} tokens/s" if result.seconds else ""
    return f"{_duration(result.seconds)} for the steps up to {result.step}{speed}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _figures(folder: Path) -> list[str]:
    """The files that tell of the run, those that are there."""
    return [str(folder / name) for name in (REPORT, METRICS) if (folder / name).exists()]
