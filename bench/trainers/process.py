"""A training run in a process of its own: the job goes in as a JSON file, and what was measured
comes back as the last line of the output.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import peers
from .clock import NotInstalled

ROOT = Path(__file__).parents[2]
_ERROR = re.compile(r"[\w.]*(Error|Exception|Installed|Unsupported|Exit)(:|$)")
_NO_MEMORY = ("OutOfMemoryError", "MemoryError")


class Failed(Exception):
    """The run gave no figures; why, in one line that begins with the kind of failure."""


def run_job(job: Mapping[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """Run a job of `bench.trainers.job` or, where its provider is a peer, of that peer.

    A peer's interpreter does not see our packages, and nothing is loaded from a hub there.

    Raises:
        Failed: no interpreter has this peer, in which case the message says how to install it; or
            the run ended with an error, took longer than `timeout` seconds, or reported otherwise
            than on every step.
    """
    name, env = job["provider"], {**os.environ}
    if name in peers.PEERS:
        python, module = peers.interpreter(name), peers.PEERS[name].module
        env = {key: value for key, value in env.items() if key != "PYTHONPATH"}
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    else:
        python, module = sys.executable, f"{__package__}.job"
        path = [str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(path)
    if python is None:
        recipe = f"{peers.PEERS[name].recipe}, then set {peers.variable(name)}"
        raise Failed(f"{NotInstalled.__name__}: {name}: {recipe}")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps({"output": f"{scratch}/output", **job}), encoding="utf-8")
        try:
            done = subprocess.run(
                [python, "-m", module, str(file)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                cwd=ROOT,
                env=env,
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"Timeout: over {timeout:.0f} s") from None
    if done.returncode:
        raise Failed(reason(done.returncode, done.stderr))
    return _report(done.stdout, job["steps"])


def _report(output: str, steps: int) -> dict[str, Any]:
    lines = output.strip().splitlines()
    try:
        report: dict[str, Any] = json.loads(lines[-1])
        counts = {key: len(report[key]) for key in ("step_s", "loss", "tokens")}
    except (IndexError, KeyError, TypeError, ValueError):
        raise Failed(f"NoReport: the last line of the output is {lines[-1:]}") from None
    if set(counts.values()) != {steps}:
        raise Failed(f"NoReport: of {counts} steps, {steps} were asked for")
    return report


def reason(status: int, errors: str) -> str:
    """Why a process failed, from its status and what it wrote to the standard error."""
    if status in (-9, 137):
        return "OutOfMemory: killed by the operating system"
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line).strip() for line in errors.splitlines()]
    named = [line for line in lines if _ERROR.match(line)]
    last = (named or [line for line in lines if line] or [f"status {status}"])[-1]
    kind, _, rest = last.partition(": ")
    if kind.endswith(_NO_MEMORY) or "out of memory" in last.lower():
        kind = "OutOfMemory"
    return f"{kind.rpartition('.')[2]}: {rest[:160]}".replace("|", "/")
