"""`--devices N`: the processes of this machine, started as torchrun starts them."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..errors import FastDPOError


def launch(arguments: Sequence[str], devices: int) -> int:
    """Run `fastdpo ARGUMENTS` in so many processes and return the exit code of the first that
    failed, 0 if none did.

    Raises:
        FastDPOError: a process was killed.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if "OMP_NUM_THREADS" not in os.environ:  # each process would take every core
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // devices))
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
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode  # it has said why
        name = signal.Signals(-failure.exitcode).name
        raise FastDPOError(
            f"rank {rank} (process {failure.pid}) was ended by {name}, and the others with it; "
            "--resume_from_checkpoint goes on from the last checkpoint"
        ) from None
    return 0
