"""fastdpo bench: ours beside the peers, on the same rows, in one run

  fastdpo bench --quick                         everything on small shapes, in five minutes
  fastdpo bench --model_config smollm2-135m --data ultrafeedback
  fastdpo bench heads --tokens 4096,16384       the output head alone
  fastdpo bench convergence                     both trainers' curves on held-out pairs
  fastdpo bench memory --model_config llama-3.1-8b --lora     the longest pair that trains
  fastdpo bench gaps --model_config qwen2.5-1.5b              how long the GPU waits between steps
  fastdpo bench score                           N-best groups scored, beside padded batches
  fastdpo bench check faults                    planted faults that fastdpo check finds
  fastdpo bench balance                         how evenly work is spread over 8, 64, 512 ranks
  fastdpo bench hosts                           two hosts, made of network namespaces
  fastdpo bench scaling                         1, 2 and 4 processes: time, bytes, memory
  fastdpo bench compare OLD.jsonl NEW.jsonl     do two sets of rows differ beyond their spread?
  fastdpo bench readme --check                  tables and charts of the README from the rows

Without a command it compares trainers. Each command has its own --help. Rows, one JSON object a
repetition, go to bench/results, or to the folder that FASTDPO_RESULTS names; those of --quick are
not kept unless it is set.
"""

import argparse
import importlib
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn

COMMANDS = {
    "heads": ".heads.run",
    "trainers": ".trainers.run",
    "convergence": ".convergence.run",
    "memory": ".trainers.memory",
    "gaps": ".trainers.gaps",
    "score": ".score",
    "check": ".check",
    "balance": ".balance",
    "hosts": ".hosts",
    "scaling": ".scaling.run",
    "compare": ".report.compare",
    "readme": ".report.pages",
}
_QUICK = ("heads", "trainers", "convergence")


class Parser(argparse.ArgumentParser):
    """Shows its module's docstring as the help, and says what is wrong in one line, as every other
    command does.
    """

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog, None, description)
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {self.prog}: {message} ({self.prog} --help)\n")


def main(arguments: Sequence[str]) -> None:
    """Run one command; SystemExit where it fails."""
    first, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if first in COMMANDS:
        raise SystemExit(_run(first, rest))
    if first in ("", "--help", "-h"):
        print(__doc__, end="")
    elif list(arguments) == ["--quick"]:
        quick()
    else:
        raise SystemExit(_run("trainers", list(arguments)))


def quick() -> None:
    """Every kind of case on small shapes."""
    with tempfile.TemporaryDirectory() as scratch:
        kept = os.environ.setdefault("FASTDPO_RESULTS", scratch)
        try:
            for name in _QUICK:
                print(f"\n# {name}\n", flush=True)
                _run(name, ["--quick"])
        finally:
            if kept == scratch:
                del os.environ["FASTDPO_RESULTS"]


def split_lists(
    parser: argparse.ArgumentParser, options: argparse.Namespace, known: Mapping[str, Collection]
) -> None:
    """Make lists of the options that are written A,B; end with an error where one is not known."""
    for name, names in known.items():
        selected = getattr(options, name).split(",")
        setattr(options, name, selected)
        if unknown := sorted(set(selected) - set(names)):
            parser.error(f"--{name}: unknown {', '.join(unknown)}")


def _run(name: str, arguments: list[str]) -> int:
    status = importlib.import_module(COMMANDS[name], __package__).main(arguments)
    return status if isinstance(status, int) else 0
