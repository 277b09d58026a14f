"""Which of several ranks' errors came first: rank 0 hears of all of them and decides.

Each rank holds a connection to it. The system closes the connection of a process at once, however
it ends; no collective of a GPU would notice. Rows and gradients never come here.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace

from .faults import Fault

ALIKE_S = 1.0
"""How long others may take to meet an error of the user's that all of them meet."""

CAUSE_S = 3.0
"""How long after the first broken connection its cause may be heard of."""

SPEAK_S = 3.0
"""How long a rank may take to say what it is to say before the others end."""


class Arbiter:
    """Hears the ranks on these hosts in a thread, and tells all of them the one fault that ended
    the run; collectives time out after `timeout` seconds.
    """

    def __init__(self, hosts: list[str], token: str, timeout: float) -> None:
        self.size, self.hosts, self.token, self.timeout = len(hosts), hosts, token, timeout
        self.server = _listening(self.size)
        self.port = int(self.server.getsockname()[1])
        self.selector = selectors.DefaultSelector()
        self.lines: dict[int, socket.socket] = {}
        self.reports: dict[int, Fault] = {}
        self.verdict: Fault | None = None
        self._first = 0.0
        self._left: set[int] = set()
        self._closing = threading.Event()
        self.selector.register(self.server, selectors.EVENT_READ, None)
        self.thread = threading.Thread(target=self._run, name="arbiter", daemon=True)
        self.thread.start()

    def sockets(self) -> list[socket.socket]:
        """Everything that is open."""
        return [self.server, *self.lines.values()]

    def close(self) -> None:
        """End, after a run that ended well."""
        self._closing.set()
        self.thread.join()

    def _run(self) -> None:
        while self.verdict is None and not self._closing.is_set():
            self._hear(0.2)
            self.verdict = self._decided()
        if self.verdict is None:
            self._tell({"bye": True})
        else:
            self._tell({"fault": self.verdict.line()})
            end = time.monotonic() + SPEAK_S
            while self.verdict.speaker in self.lines and time.monotonic() < end:
                self._hear(0.1)
        for line in self.sockets():
            line.close()
        self.selector.close()

    def _hear(self, wait: float) -> None:
        for found, _ in self.selector.select(wait):
            if found.data is None:
                self._welcome()
            else:
                self._read(found.data)

    def _welcome(self) -> None:
        with suppress(OSError, ValueError, KeyError):
            line, _ = self.server.accept()
            line.settimeout(5.0)
            said = json.loads(read_line(line))
            if said["token"] != self.token:
                line.close()
                return
            self.lines[said["rank"]] = line
            self.selector.register(line, selectors.EVENT_READ, said["rank"])

    def _read(self, rank: int) -> None:
        try:
            said = json.loads(read_line(self.lines[rank]))
        except (OSError, ValueError):
            said = {}
        if "fault" in said:
            self._first = self._first or time.monotonic()
            self.reports.setdefault(rank, Fault.read(said["fault"]))
            return
        self.selector.unregister(self.lines[rank])
        self.lines.pop(rank).close()
        if "bye" in said:
            self._left.add(rank)
        elif rank not in self.reports:
            self._first = self._first or time.monotonic()
            self.reports[rank] = Fault(rank, self.hosts[rank], "gone")

    def _decided(self) -> Fault | None:
        """The first fault that is not the mere effect of another; None while that is open."""
        since = time.monotonic() - self._first if self.reports else 0.0
        causes = [fault for fault in self.reports.values() if fault.kind != "connection"]
        if causes:
            return self._of_all(causes[0], since)
        waiting = len(self.reports) + len(self._left) < self.size
        if not self.reports or (waiting and since < CAUSE_S):
            return None
        absent = sorted(set(range(self.size)) - self.reports.keys() - self._left)
        if absent:
            also = f" (nor have ranks {', '.join(map(str, absent[1:]))})" if absent[1:] else ""
            late = any("timed out" in fault.text.lower() for fault in self.reports.values())
            how = "does not answer the others"
            if late:
                how = f"has not come in {self.timeout:.0f} s to where the others wait for it"
            return Fault(absent[0], self.hosts[absent[0]], "absent", how + also)
        return next(iter(self.reports.values()))

    def _of_all(self, fault: Fault, since: float) -> Fault | None:
        """An error of the user's that rank 0 meets too is said without a rank."""
        if fault.kind != "user":
            return fault
        own = self.reports.get(0)
        if own is not None and own.kind == "user" and own.text == fault.text:
            return replace(own, host=None)
        alone = len(self.reports) == self.size
        return fault if alone or since > ALIKE_S else None

    def _tell(self, what: dict[str, object]) -> None:
        data = json.dumps(what).encode() + b"\n"
        for line in self.lines.values():
            with suppress(OSError):
                line.sendall(data)


def _listening(size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(
                ("::", 0), family=socket.AF_INET6, backlog=size, dualstack_ipv6=True
            )
    return socket.create_server(("", 0), backlog=size)


def read_line(line: socket.socket) -> bytes:
    """The bytes up to the next end of line; none where the other side has closed."""
    found = bytearray()
    while not found.endswith(b"\n"):
        part = line.recv(1)
        if not part:
            raise ConnectionError("closed")
        found += part
    return bytes(found)
