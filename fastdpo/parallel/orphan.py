"""Processes that end with the one that started them, however that ends."""

import ctypes
import os
import signal
import sys

from ..terminal import LAUNCHER

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Where torchrun or `--devices` started this process: never live on without it (on Linux)."""
    started = LAUNCHER in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not started or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.getppid()
    if parent == 1 or os.environ.get(LAUNCHER, str(parent)) != str(parent):  # it has gone by now
        os._exit(1)
