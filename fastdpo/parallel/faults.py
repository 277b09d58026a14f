"""What ended a run of several processes: which rank it happened on, and who says it.

Whatever happens to one rank reaches the others as a broken connection a moment later. So the ranks
agree on what came first (see `watch`), one of them says it, and all of them raise it.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict, dataclass
from typing import Literal

import torch.distributed as dist

from ..errors import FastDPOError, one_line

Kind = Literal["user", "program", "connection", "interrupted", "gone", "absent"]

GO_ON = "--resume_from_checkpoint goes on from the last checkpoint"

_OF_CONNECTIONS = (
    "gloo",
    "nccl",
    "connection",
    "timed out",
    "socket",
    "broken pipe",
    "process group",
    "processgroup",
)
"""Words of the errors that torch's engines raise where another rank has gone; most of them are
plain RuntimeErrors.
"""


class OtherRankError(FastDPOError):
    """What ended the run happened on another rank, which says it where several share a terminal.

    Attributes:
        status: the exit code of that rank.
    """

    def __init__(self, message: str, status: int, said: bool) -> None:
        super().__init__(message)
        self.status, self.said = status, said


@dataclass(frozen=True)
class Fault:
    """What ended the run.

    Attributes:
        rank, host: where it happened; None as the host where it happened to every rank alike.
        kind: an error of the user's or the program's, a broken or timed out connection, an
            interruption, a process that has gone or that the others wait for in vain.
        text: of the error.
    """

    rank: int
    host: str | None
    kind: Kind
    text: str = ""

    @staticmethod
    def of(error: BaseException, rank: int, host: str) -> Fault:
        """What an exception on this rank is."""
        if isinstance(error, FastDPOError):
            return Fault(rank, host, "user", str(error))
        if _is_interruption(error):
            return Fault(rank, host, "interrupted")
        name = type(error).__name__
        text = one_line(error) if isinstance(error, Exception) else name
        text = text if text.startswith(name) else f"{name}: {text}"
        if is_of_connection(error):
            return Fault(rank, host, "connection", text)
        return Fault(rank, host, "program", f"{text} ({_place(error)})")

    @staticmethod
    def read(line: str) -> Fault:
        """What `line` wrote."""
        return Fault(**json.loads(line))

    def line(self) -> str:
        """In one line, for another process."""
        return json.dumps(asdict(self))

    @property
    def where(self) -> str:
        """The rank and its host."""
        return f"rank {self.rank} ({self.host})" if self.host else f"rank {self.rank}"

    @property
    def status(self) -> int:
        """The exit code that it means."""
        return {"user": 2, "interrupted": 130}.get(self.kind, 1)

    @property
    def speaker(self) -> int:
        """The rank that says it."""
        if self.kind in ("gone", "absent"):
            return 1 if self.rank == 0 else 0
        return self.rank

    def message(self) -> str:
        """What a user is told."""
        if self.kind == "user":
            return f"{self.where}: {self.text}" if self.host else self.text
        if self.kind == "interrupted":
            return f"{self.where} was interrupted"
        if self.kind == "gone":
            return f"{self.where} has gone without a word: killed, or its host is; {GO_ON}"
        if self.kind == "absent":
            return f"{self.where} {self.text}; {GO_ON}"
        return f"{self.where} failed: {self.text}; {GO_ON}"


def is_of_connection(error: BaseException) -> bool:
    """Whether an error says that ranks do not reach each other."""
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _OF_CONNECTIONS)


def _is_interruption(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "nowhere"
    return f"{frames[-1].filename}, line {frames[-1].lineno}"


def raised(error: BaseException, fault: Fault, rank: int) -> BaseException:
    """What this rank raises in place of `error`, now that `fault` is what ended the run."""
    if fault.kind == "interrupted":
        return error if isinstance(error, KeyboardInterrupt) else KeyboardInterrupt()
    if fault.kind == "user" and isinstance(error, FastDPOError):
        if fault.rank == rank:
            error.args = (fault.message(),)
            return error
        if str(error) == fault.text:
            error.said = True
            return error
    if fault.rank == rank and fault.kind in ("program", "connection"):
        # What `add_note` does, which Python 3.10 has not.
        error.__notes__ = [*getattr(error, "__notes__", []), f"on {fault.where}"]  # type: ignore[attr-defined]
        return error
    return OtherRankError(fault.message(), fault.status, said=fault.speaker != rank)
