"""`--devices N`: the processes of this machine, started as torchrun starts them."""

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..errors import FastDPOError
from ..terminal import LAUNCHER
from .faults import GO_ON


def launch(arguments: Sequence[str], devices: int) -> int:
    """Run `fastdpo ARGUMENTS` in so many processes and return the exit code of the first that
    failed, 0 if none did.

    Raises:
        FastDPOError: a process ended without saying why.
        KeyboardInterrupt: the run was interrupted; no process of it is left.
    """
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    if "OMP_NUM_THREADS" not in os.environ:  # each process would take every core
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // devices))
    os.environ[LAUNCHER] = str(os.getpid())
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "fastdpo", *arguments)
    except ChildFailedError as error:
        said = [f.exitcode for f in error.failures.values() if _has_said(f)]
        if said:  # the others were ended for it
            return said[0]
        return _status(*error.get_first_failure())
    except SignalException as ended:
        if ended.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + ended.sigval
    finally:
        del os.environ[LAUNCHER]
    return 0


def _has_said(failure: ProcessFailure) -> bool:
    """Whether a process has said why it ended."""
    return failure.exitcode >= 0 and os.path.exists(failure.error_file)


def _status(rank: int, failure: ProcessFailure) -> int:
    if failure.exitcode >= 0:
        how = f"ended with exit code {failure.exitcode}"
    else:
        how = f"was ended by {signal.Signals(-failure.exitcode).name}"
    place = f"rank {rank} ({socket.gethostname()}, process {failure.pid})"
    error = FastDPOError(f"{place} {how}, and the others with it; {GO_ON}")
    error.status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    raise error
