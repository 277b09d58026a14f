"""Other DPO trainers, each run by an interpreter of its own, since they pin what they build on.

A peer is a module of this package that reads a job from a JSON file, trains, and prints one JSON
object as its last line. Its interpreter is what the variable FASTDPO_BENCH_<NAME>_PYTHON names, or
this one where it has the versions that were tried. Only the standard library is imported here:
the peers' interpreters import this package too.
"""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_ERROR = re.compile(r"[A-Za-z_][\w.]*: \S")
_NOT_ERRORS = ("Warning:", "INFO:", "WARNING:", "DEBUG:")


class NotInstalled(Exception):
    """No interpreter has this peer."""


@dataclass(frozen=True)
class Peer:
    """A trainer and what it takes to run it."""

    name: str
    module: str
    """What `python -m` runs, from the root of the repository."""
    package: str
    """The distribution that is measured."""
    needs: Mapping[str, str]
    """Distributions and the beginnings of their versions that were tried."""
    recipe: str
    """How to install it, in an empty environment."""


def _peer(name: str, module: str, package: str, recipe: str, **needs: str) -> Peer:
    tried = {key.replace("_", "-"): version for key, version in needs.items()}
    return Peer(name, f"{__name__}.{module}", package, tried, f"pip install {recipe}")


_ALL = (
    _peer(
        "llamafactory",
        "llamafactory",
        "llamafactory",
        "llamafactory==0.9.5 torch==2.13.0",
        llamafactory="0.9.5",
    ),
    _peer(
        "axolotl",
        "axolotl",
        "axolotl",
        "axolotl==0.19.0 gradio==6.10.0 torch==2.13.0",
        axolotl="0.19.",
        trl="1.9.",
    ),
    _peer("ms-swift", "ms_swift", "ms-swift", "ms-swift==4.6.0 torch==2.13.0", ms_swift="4.6."),
    _peer(
        "torchtune",
        "torchtune",
        "torchtune",
        "torchtune==0.6.1 torchao==0.15.0 transformers torch==2.13.0",
        torchtune="0.6.1",
        torchao="0.15.",
    ),
    _peer(
        "trl-1.9-liger",
        "trl_liger",
        "trl",
        "trl==1.9.0 liger-kernel==0.8.1 torch==2.13.0",
        trl="1.9.",
        liger_kernel="0.8.1",
    ),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def variable(name: str) -> str:
    """The variable that names the peer's interpreter."""
    return f"FASTDPO_BENCH_{re.sub('[^A-Za-z0-9]', '_', name).upper()}_PYTHON"


def interpreter(name: str) -> str | None:
    """Who can run the peer: its variable's interpreter, else this one, else None. KeyError if
    unknown.
    """
    peer = PEERS[name]
    named = os.environ.get(variable(name))
    if named:
        return shutil.which(named)
    try:
        have = {package: importlib.metadata.version(package) for package in peer.needs}
    except importlib.metadata.PackageNotFoundError:
        return None
    fits = all(have[package].startswith(version) for package, version in peer.needs.items())
    return sys.executable if fits else None


def run_job(name: str, job: Mapping[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """Run one job of `bench.peers.common.Job`'s fields in the peer's interpreter; its report.

    `output` defaults to a temporary directory. Nothing is loaded from a hub.

    Raises:
        NotInstalled: no interpreter has it; the message says how to install it.
        RuntimeError: it failed; the error that it ended with, after "OutOfMemory: " where memory
            ran out, or a report without all steps.
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    python = interpreter(name)
    if python is None:
        raise NotInstalled(f"{name}: {PEERS[name].recipe}, then set {variable(name)}")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps({"output": f"{scratch}/output", **job}), encoding="utf-8")
        result = subprocess.run(
            [python, "-m", PEERS[name].module, str(path)],
            cwd=_ROOT,
            env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    if result.returncode:
        raise RuntimeError(_reason(result.stderr, result.returncode))
    return _report(result.stdout, int(job["steps"]))


def _report(output: str, steps: int) -> dict[str, Any]:
    lines = output.strip().splitlines()
    try:
        report: dict[str, Any] = json.loads(lines[-1])
        counts = {key: len(report[key]) for key in ("step_s", "loss", "tokens")}
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"no report as the last line of the output: {lines[-1:]}") from error
    if set(counts.values()) != {steps}:
        raise RuntimeError(f"the report is of {counts} steps, {steps} were asked for")
    return report


def _reason(errors: str, code: int) -> str:
    """The last line that names an error, else the last line."""
    whole = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in errors.splitlines()]
    lines = [line.strip() for line in whole if line.strip()]
    named = [
        line
        for line in lines
        if _ERROR.match(line) and not any(word in line for word in _NOT_ERRORS)
    ]
    reason = (named or lines or [f"exit code {code}"])[-1]
    if code == -signal.SIGKILL:
        return f"OutOfMemory: killed, after: {reason}"
    if "out of memory" in reason.lower() or re.match(r"[\w.]*(MemoryError|can't allocate)", reason):
        return f"OutOfMemory: {reason}"
    return reason
