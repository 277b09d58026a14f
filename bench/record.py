"""Raw results: one JSON object a line, each with what is needed to repeat it."""

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets")


class Results:
    """Appends rows to `bench/results/NAME.jsonl` as they come."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.path = RESULTS / f"{name}.jsonl"
        self.common = {**environment(), "options": vars(options)}

    def add(self, **row: Any) -> None:
        """Write one row."""
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **self.common}) + "\n")


def environment() -> dict[str, Any]:
    """Date, commit, command, device and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "clean": not _git("status", "--porcelain", "--untracked-files=no"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "device": _cpu(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent)
    return result.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
