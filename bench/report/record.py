"""Raw results: one JSON object a line, each with what is needed to repeat it."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parents[1] / "results"
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "peft",
    "datasets",
)


class Results:
    """Appends rows as they come to `NAME-DEVICE.jsonl`, or to `NAME.jsonl` where no device matters.

    The files are in bench/results, or in the folders that the variable `FASTDPO_RESULTS` lists as a
    search path does.
    """

    def __init__(
        self, name: str, options: argparse.Namespace, device: "torch.device | None" = None
    ) -> None:
        folders = os.environ.get("FASTDPO_RESULTS", str(RESULTS)).split(os.pathsep)
        file = f"{name}-{short_name(device)}.jsonl" if device else f"{name}.jsonl"
        self.paths = [Path(folder) / file for folder in folders]
        self.common = {**environment(device), "options": vars(options)}

    def add(self, **row: Any) -> dict[str, Any]:
        """Write one row; give it back whole."""
        row = {**row, **self.common}
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, default=str) + "\n")
        return row


def environment(device: "torch.device | None" = None) -> dict[str, Any]:
    """Date, commit, command, device and versions.

    Where the sources were copied without their repository, the variable `FASTDPO_COMMIT` says which
    commit they are.
    """
    commit = _git("rev-parse", "--short", "HEAD")
    # Rows that this very run is writing do not make it another program.
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)bench/results"
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or os.environ.get("FASTDPO_COMMIT", ""),
        "clean": not changed if commit else None,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "device": _cpu() if device is None or device.type == "cpu" else _cuda(device),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def short_name(device: "torch.device") -> str:
    """cpu, h100, h200, ...: for names of files."""
    if device.type == "cpu":
        return "cpu"
    import torch

    words = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).split("-")
    short = [word for word in words if re.fullmatch(r"[a-z]+[0-9]+[a-z]?", word)]
    return short[0] if short else "-".join(words)


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    except FileNotFoundError:
        return ""
    return result.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda(device: "torch.device") -> str:
    import torch

    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, {properties.total_memory >> 30} GiB, "
        f"{properties.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"
    )


def _cpu() -> str:
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
