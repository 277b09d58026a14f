"""How many processes go over the rows of a data set."""

import multiprocessing
import os

_ROWS_OF_A_PROCESS = 4096
"""A process more for fewer rows than these is not worth its start."""


def processes_for(rows: int, asked: int | None) -> int | None:
    """As many as are asked for; or all cores, where rows are many, and where a new process does not
    run the caller's script once more. None for this process alone.
    """
    if asked is not None:
        return asked if asked > 1 else None
    if multiprocessing.get_all_start_methods()[0] != "fork":
        return None
    count = min(len(os.sched_getaffinity(0)), rows // _ROWS_OF_A_PROCESS)
    return count if count > 1 else None
