"""Other DPO trainers, each run by an interpreter of its own, since they pin what they build on.

A peer is a module of this package that reads a job from a JSON file, trains, and prints one JSON
object as its last line. Its interpreter is what the variable FASTDPO_BENCH_<NAME>_PYTHON names, or
this one where it has the versions that were tried. Only the standard library is imported here:
the peers' interpreters import this package too.
"""

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A trainer and what it takes to run it."""

    module: str
    """What `python -m` runs, from the root of the repository."""
    needs: Mapping[str, str]
    """Distributions and the beginnings of their versions that were tried; the first is measured."""
    recipe: str
    """How to install it, in an empty environment."""


def _peer(module: str, needs: Mapping[str, str], recipe: str) -> Peer:
    return Peer(f"{__name__}.{module}", needs, f"pip install {recipe} torch==2.13.0")


PEERS = {
    "llamafactory": _peer("llamafactory", {"llamafactory": "0.9.5"}, "llamafactory==0.9.5"),
    "axolotl": _peer(
        "axolotl", {"axolotl": "0.19.", "trl": "1.9."}, "axolotl==0.19.0 gradio==6.10.0"
    ),
    "ms-swift": _peer("ms_swift", {"ms-swift": "4.6."}, "ms-swift==4.6.0"),
    "torchtune": _peer(
        "torchtune",
        {"torchtune": "0.6.1", "torchao": "0.15."},
        "torchtune==0.6.1 torchao==0.15.0 transformers",
    ),
    "trl-1.9-liger": _peer(
        "trl_liger",
        {"trl": "1.9.", "liger-kernel": "0.8.1"},
        "trl==1.9.0 liger-kernel==0.8.1",
    ),
}


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
