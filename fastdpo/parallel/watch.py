"""A rank's connection to the one that decides what ended the run; see `arbiter`."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from .arbiter import Arbiter, read_line
from .faults import Fault, OtherRankError

VERDICT_S = 15.0
"""How long a rank waits to be told what ended the run before it says what it knows."""

END_S = 30.0
"""How long a rank may take to end once it has been told that the run has."""

_OPEN: set[Watch] = set()


class Watch:
    """Reports this rank's fault, and learns of the one that ended the run, in a thread."""

    def __init__(self, store: dist.Store, rank: int, hosts: list[str], timeout: float) -> None:
        self.rank, self.hosts = rank, hosts
        self.verdict: Fault | None = None
        self.arbiter: Arbiter | None = None
        self._told, self._quiet, self._ended = (threading.Event() for _ in range(3))
        if rank == 0:
            token = secrets.token_hex(8)
            self.arbiter = Arbiter(hosts, token, timeout)
            store.set("arbiter", json.dumps([_addresses(), self.arbiter.port, token]))
        try:
            addresses, port, token = json.loads(store.get("arbiter"))
        except RuntimeError as error:  # it went between its card and here
            fault = Fault(0, hosts[0], "gone")
            raise OtherRankError(fault.message(), fault.status, said=rank > 1) from error
        self.line = _reach(addresses, port)
        if self.line is None:
            return
        self._send({"token": token, "rank": rank})
        _OPEN.add(self)
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def report(self, fault: Fault) -> Fault:
        """What ended the run, given that this happened here."""
        self._ended.set()
        if self.line is None:
            return fault
        self._send({"fault": fault.line()})
        self._told.wait(VERDICT_S)
        return self.verdict or fault

    def wait_for_speaker(self) -> None:
        """Return once what ended the run has been said: who ends may take the others along."""
        self._quiet.wait(END_S)

    def close(self) -> None:
        """End, after a run that ended well."""
        self._ended.set()
        _OPEN.discard(self)
        if self.line is not None:
            self._send({"bye": True})
            self._told.set()
        if self.arbiter is not None:
            self.arbiter.close()
        if self.line is not None:
            self.line.close()

    def sockets(self) -> list[socket.socket]:
        """Everything that is open."""
        held = [] if self.line is None else [self.line]
        return held + (self.arbiter.sockets() if self.arbiter else [])

    def _send(self, what: dict[str, Any]) -> None:
        assert self.line is not None
        with suppress(OSError):
            self.line.sendall(json.dumps(what).encode() + b"\n")

    def _listen(self) -> None:
        assert self.line is not None
        try:
            said = json.loads(read_line(self.line))
        except (OSError, ValueError):
            said = {}
        if "bye" in said or self._told.is_set():
            self._told.set()
            self._quiet.set()
            return
        gone = Fault(0, self.hosts[0], "gone")
        self.verdict = Fault.read(said["fault"]) if "fault" in said else gone
        self._told.set()
        _abort()
        with suppress(OSError):
            read_line(self.line)
        self._quiet.set()
        _OPEN.discard(self)
        self.line.close()
        if not self._ended.wait(END_S):  # it computes, or waits where nothing wakes it
            os._exit(self.verdict.status)


def _abort() -> None:
    """Wake this rank where it waits for GPUs that wait for each other."""
    if dist.is_initialized() and dist.is_nccl_available():
        with suppress(Exception):
            dist.distributed_c10d._abort_process_group()


def _addresses() -> list[str]:
    """Where other ranks may reach this process, most likely first."""
    master, found = os.environ.get("MASTER_ADDR", ""), []
    with suppress(OSError):
        family, kind, _, _, place = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing: it chooses the interface
            found.append(probe.getsockname()[0])
    return [*dict.fromkeys([*found, master, socket.gethostname()])]


def _reach(addresses: list[str], port: int) -> socket.socket | None:
    for address in addresses:
        with suppress(OSError):
            line = socket.create_connection((address, port), timeout=5.0)
            line.settimeout(None)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return line
    return None


def _close_in_child() -> None:
    """A forked child would keep the connection open after the rank has gone."""
    while _OPEN:
        for line in _OPEN.pop().sockets():
            line.close()


os.register_at_fork(after_in_child=_close_in_child)
