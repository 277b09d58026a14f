"""`fastdpo score`."""

import json
from collections.abc import Sequence
from typing import Any

from .. import terminal
from ..arguments import own_flags
from ..config import TrainConfig

USAGE = """\
fastdpo score: log-probabilities and implicit rewards of the responses in a file

  fastdpo score --model_name_or_path MODEL --dataset_name pairs.jsonl -o scored.parquet
  fastdpo score --model_name_or_path out --ref_model_name_or_path MODEL --dataset_name test.jsonl
  fastdpo score config.yaml --by subset --json

Every row keeps its columns and its place and gets those of its layout: log-probabilities in nats,
counts of tokens and, where there is a reference, implicit rewards beta * (logp - ref_logp). An
adapter's reference is its base. Rows may be those of fastdpo train, or responses of which nothing
is said: prompt and responses, or prompt and completion. Printed is how often the better response
has the higher reward, log-probability, and log-probability a token.

It takes the keys of fastdpo train that say which model, reference, data, precision and device.

  -o, --output FILE   where the rows go: .jsonl, .jsonl.gz or .parquet
  --by COLUMN         accuracies for each value of this column too
  --json              print JSON
"""
_MEASURES = {"reward": "reward", "logp": "log-probability", "logp_per_token": "a token"}


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        FastDPOError: as `fastdpo.score`.
    """
    values = {"output": "a file", "by": "a column"}
    words, given, switches = own_flags(arguments, values, ("json",), "fastdpo score --help")
    config = TrainConfig.parse(words, (*values, "json"))
    config.require("model_name_or_path", "dataset_name")
    from .score import score

    with terminal.heard("json" not in switches):
        summary = score(config, by=given.get("by"), output=given.get("output")).summary
    if "output" in given:
        summary["output"] = given["output"]
    print(json.dumps(summary, indent=2) if "json" in switches else describe(summary))


def describe(summary: dict[str, Any]) -> str:
    """The summary of a `ScoreResult` as lines for a terminal."""
    left = f", {summary['unscored']} of them not scored" if summary["unscored"] else ""
    lines = [
        f"{summary['rows']} rows{left}: {summary['responses']} responses, {summary['tokens']} "
        f"tokens in {summary['seconds']:.1f} s ({summary['tokens_per_second']:,.0f} a second)",
        f"reference: {summary['reference']}",
    ]
    if summary["accuracy"]:
        lines.append(f"{summary['pairs']} pairs in the right order: {_shares(summary['accuracy'])}")
    if labels := summary.get("label_accuracy"):
        lines.append(f"a desirable response before an undesirable one: {_shares(labels)}")
    if by := summary.get("by"):
        lines += _table(by)
    if "output" in summary:
        lines.append(f"rows: {summary['output']}")
    return "\n".join(lines)


def _shares(accuracy: dict[str, float]) -> str:
    return ", ".join(f"{_MEASURES[name]} {share:.3f}" for name, share in accuracy.items())


def _table(by: dict[str, dict[str, float]]) -> list[str]:
    names = [name for name in _MEASURES if any(name in part for part in by.values())]
    width = max(len("value"), *map(len, by))
    lines = [f"{'value':{width}}  {'pairs':>7}" + "".join(f"  {_MEASURES[n]:>15}" for n in names)]
    for value, part in by.items():
        shares = "".join(f"  {part[n]:15.3f}" if n in part else f"  {'':15}" for n in names)
        lines.append(f"{value:{width}}  {part['pairs']:7}{shares}")
    return lines
