"""Before the first collective: who is there, and whether all run the same program and keys.

Each rank leaves a card in the store that torchrun holds, and reads those of the others. A rank that
cannot begin says so on its card, so that an error is said once and nobody waits for it.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError, FastDPOError, one_line
from ..version import __version__
from .faults import Fault, OtherRankError

PLACES = (
    "model_name_or_path",
    "ref_model_name_or_path",
    "dataset_name",
    "eval_dataset_name",
    "output_dir",
    "reference_cache_dir",
    "resume_from_checkpoint",
    "run_name",
    "report_to",
)
"""Keys that may differ between hosts: what is found in those places is compared instead."""

_POLL_S = 0.05
_REFUSED_S = 5.0
_ROUND = "fastdpo/round"
"""Where rank 0 says under which name this run's ranks meet. The store may outlive them."""


@dataclass(frozen=True)
class Card:
    """What a rank says of itself.

    Attributes:
        host: its name.
        versions: of what the numbers depend on.
        keys: the configuration.
        error: why it cannot begin.
        number: its own, at random: no other process has it.
    """

    host: str = field(default_factory=socket.gethostname)
    versions: dict[str, str] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    number: str = field(default_factory=lambda: secrets.token_hex(8))

    @staticmethod
    def of(keys: dict[str, Any]) -> Card:
        """This rank's, with its configuration."""
        keys = {name: value for name, value in keys.items() if name not in PLACES}
        return Card(versions={"fastdpo": __version__, "torch": torch.__version__}, keys=keys)


def attempt() -> int:
    """How many times torchrun has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def agent_holds_store() -> bool:
    """Whether torchrun's own process holds the store, and not that of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(timeout: float) -> dist.Store:
    """The store that all ranks share, as torchrun's variables say.

    Raises:
        ConfigError: it cannot be reached.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        found = f"{host or 'nothing'} and {port or 'nothing'}"
        raise ConfigError(
            "MASTER_ADDR and MASTER_PORT: expected the first rank's host and a port, as torchrun "
            f"sets them, got {found}"
        )
    holds = os.environ.get("RANK") == "0" and not agent_holds_store()
    try:
        return dist.TCPStore(
            host,
            int(port),
            is_master=holds,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            "MASTER_ADDR and MASTER_PORT: the store of all ranks cannot be reached at "
            f"{host}:{port} ({one_line(error)})"
        ) from error


def meet(
    store: dist.Store, rank: int, size: int, card: Card, timeout: float
) -> tuple[list[Card], dist.Store]:
    """The cards of all ranks, and a part of the store that is this run's alone.

    Raises:
        FastDPOError: one of them cannot begin, has not come or has something else to do; the same
            on every rank, one of which says it.
    """
    name, cards = (_gather if rank == 0 else _attend)(store, rank, size, card, timeout)
    failed = [number for number, one in cards.items() if one.error is not None]
    if failed:
        first, error = failed[0], str(cards[failed[0]].error)
        host = None if first == 0 else cards[first].host
        raise _told(Fault(first, host, "user", error), rank, first)
    absent = [number for number in range(size) if number not in cards]
    if absent:
        also = f" (nor have {len(absent) - 1} others)" if absent[1:] else ""
        here = "; there are " + ", ".join(sorted({one.host for one in cards.values()}))
        text = f"has not joined the other {len(cards)} within {timeout:.0f} s{also}{here}"
        raise _told(Fault(absent[0], None, "user", f"rank {absent[0]} {text}"), rank, min(cards))
    found = [cards[number] for number in range(size)]
    for number, one in enumerate(found):
        if difference := _difference(found[0], one):
            text = f"{difference} (rank 0 is on {found[0].host})"
            raise _told(Fault(number, one.host, "user", text), rank, 0)
    return found, dist.PrefixStore(name, store)


def refused(error: FastDPOError) -> FastDPOError:
    """What this rank raises in place of an error that it met before it joined the others."""
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        meet(open_store(_REFUSED_S), rank, size, Card(error=str(error)), _REFUSED_S)
    except OtherRankError as told:
        error.said = told.said
        if not told.said:
            error.args = (str(told),)
    except (KeyError, ValueError, RuntimeError):
        pass  # alone with it
    return error


Found = tuple[str, dict[int, Card]]


def _gather(store: dist.Store, rank: int, size: int, card: Card, timeout: float) -> Found:
    """The cards that come in time, which rank 0 shows to all."""
    name = f"fastdpo/{secrets.token_hex(8)}"
    store.set(f"{name}/{rank}", json.dumps(asdict(card)))
    store.set(_ROUND, name)
    names = [f"{name}/{number}" for number in range(size)]
    end = time.monotonic() + (timeout if card.error is None else _REFUSED_S)
    broken = False
    while not store.check(names) and time.monotonic() < end:
        time.sleep(_POLL_S)
        if not broken and store.check([f"{name}/refused"]):
            broken, end = True, min(end, time.monotonic() + _REFUSED_S)
    there = [number for number in range(size) if store.check([names[number]])]
    cards = {number: json.loads(store.get(names[number])) for number in there}
    store.set(f"{name}/all", json.dumps(cards))
    return name, {number: Card(**one) for number, one in cards.items()}


def _attend(store: dist.Store, rank: int, size: int, card: Card, timeout: float) -> Found:
    """The cards that rank 0 shows, this rank's among them: a name of ranks that have gone, which
    torchrun has started anew since, leads to others.
    """
    name, end = "", time.monotonic() + timeout + _REFUSED_S
    while time.monotonic() < end:
        if store.check([_ROUND]) and (now := store.get(_ROUND).decode()) != name:
            name = now
            store.set(f"{name}/{rank}", json.dumps(asdict(card)))
            if card.error is not None:
                store.set(f"{name}/refused", "1")
        if name and store.check([f"{name}/all"]):
            cards = json.loads(store.get(f"{name}/all"))
            if cards.get(str(rank), {}).get("number") == card.number:
                return name, {int(number): Card(**one) for number, one in cards.items()}
        time.sleep(_POLL_S)
    return name, dict.fromkeys(range(1, size), card)


def _difference(expected: Card, got: Card) -> str | None:
    for name, version in expected.versions.items():
        if got.versions.get(name) != version:
            return f"expected {name} {version}, as on rank 0, got {got.versions.get(name)}"
    for key in expected.keys | got.keys:
        ours, theirs = expected.keys.get(key), got.keys.get(key)
        if ours != theirs:
            return f"{key}: expected {ours}, as on rank 0, got {theirs}"
    return None


def _told(fault: Fault, rank: int, speaker: int) -> OtherRankError:
    if rank != speaker or not agent_holds_store():
        time.sleep(1.0)  # whoever ends first may take the others, or the store, along
    return OtherRankError(fault.message(), fault.status, said=rank != speaker)
