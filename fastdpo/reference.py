"""Reference log-probabilities: computed once per model and response, kept on disk, found again
whatever else changes.

The store of a model is a directory named by everything that its numbers depend on: weights,
configuration, precision. In it every response is found by a digest of its tokens and its prompt's.
So a change of `output_dir`, `learning_rate`, order, packing or split hits, and a change of a model
or of a token misses, for that response alone.
"""

import errno
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from . import files
from .data.batch import idle_batch, make_batch
from .data.digests import as_rows, find_rows, number_rows
from .data.groups import Group, Groups
from .data.packing import PackedRow
from .data.plan import reference_rows
from .data.ragged import Lists, ends_of
from .model.scorer import Scorer
from .parallel.world import ALONE, World

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_WRITES = 20.0
"""How much of an interrupted pass is computed again, at the most."""
_FORMAT = "2"
_NOT_IN_THE_NUMBERS = {
    *("_name_or_path", "name_or_path", "transformers_version", "use_cache"),
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout"),
}


def weights_digest(model: torch.nn.Module) -> str:
    """32 hex digits of the weights: names, dtypes, shapes, bytes."""
    content = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        content.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return content.hexdigest()


def model_fingerprint(model: torch.nn.Module, autocast: torch.dtype | None, weights: str) -> str:
    """32 hex digits of the weights (their `weights_digest`), the configurations of the architecture
    and its adapters, and the precision.
    """
    content = xxhash.xxh3_128(f"{_FORMAT} {weights}".encode())
    config = getattr(model, "config", None)
    if config is not None:
        known = {k: v for k, v in config.to_dict().items() if k not in _NOT_IN_THE_NUMBERS}
        content.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, adapter in sorted(getattr(model, "peft_config", {}).items()):
        known = {k: v for k, v in adapter.to_dict().items() if k not in _NOT_IN_THE_NUMBERS}
        content.update(json.dumps([name, known], sort_keys=True, default=_plain).encode())
    content.update(str(autocast).encode())
    return content.hexdigest()


def _plain(value: Any) -> Any:
    """A set in an order that is the same in every process, anything else as text."""
    return sorted(value) if isinstance(value, set) else str(value)


class LogpStore:
    """The log-probabilities of one reference model: digest of (prompt, response) → its sum over
    tokens, or that of each token: a store holds one or the other.

    Shards are written atomically, so an interrupted run leaves whole ones, and the next run
    computes only the rest.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._held = [(np.zeros((0, 2), np.int64), Lists(np.zeros(0), np.zeros(1, np.int64)))]
        self._shards: set[Path] = set()
        self._refresh()

    @property
    def logps(self) -> dict[bytes, np.ndarray]:
        """Log-probabilities of every response that is known, nats, (1,) or (n,), by its digest."""
        digests, logps = self._columns()
        return {digest.tobytes(): logps[place] for place, digest in enumerate(digests)}

    def _columns(self) -> tuple[np.ndarray, Lists]:
        """The digests of all that is known, (N, 2), and its log-probabilities."""
        if len(self._held) > 1:
            digests, lists = zip(*self._held, strict=True)
            counts = np.concatenate([each.lengths for each in lists])
            logps = Lists(np.concatenate([each.values for each in lists]), ends_of(counts))
            self._held = [(np.concatenate(digests), logps)]
        return self._held[0]

    def missing(self, digests: np.ndarray) -> np.ndarray:
        """Which of these digests (N, 2) are not known."""
        return find_rows(digests, self._columns()[0]) < 0

    def take(self, digests: np.ndarray) -> Lists:
        """The log-probabilities of these digests (N, 2), all of which are known."""
        known, logps = self._columns()
        return logps.take(find_rows(digests, known))

    def _refresh(self) -> None:
        """Read what other processes have added."""
        for shard in sorted(set(self.directory.glob("*.safetensors")) - self._shards):
            self._shards.add(shard)
            self._read(shard)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Be the only process that adds values, after what others have added has been read.

        Raises:
            FastDPOError: the directory cannot be made or written to.
        """
        with files.explain(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "not writable")

        def wait() -> None:
            logger.warning("%s: waiting for another process that fills it", self.directory)

        with files.locked(self.directory, wait):
            files.remove_leftovers(self.directory)
            self._refresh()
            yield

    def _read(self, shard: Path) -> None:
        try:
            data = load_file(shard)
            digests, logps = data["digests"], data["logps"]
            counts = data["counts"] if "counts" in data else np.ones(len(logps), np.int64)
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("%s: unreadable (%s), its values are computed again", shard, error)
            return
        self._held.append((digests.view(np.int64), Lists(logps, ends_of(counts))))

    def add(self, digests: Sequence[bytes], logps: Sequence[np.ndarray]) -> None:
        """Keep the log-probabilities of these responses, in memory and as one new shard on disk."""
        if not digests:
            return
        data = {
            "digests": np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), 16),
            "logps": np.concatenate(logps),
            "counts": np.array([len(values) for values in logps], np.int64),
        }
        self._held.append((as_rows(list(digests)), Lists(data["logps"], ends_of(data["counts"]))))
        shard = self.directory / f"{uuid.uuid4().hex}.safetensors"
        with files.atomic_file(shard) as path:
            save_file(data, path)
        self._shards.add(shard)


@dataclass(frozen=True)
class ReferenceReport:
    """How many of the distinct responses were found, and how many were computed."""

    found: int
    computed: int
    directory: Path

    def __str__(self) -> str:
        return f"{self.found} found, {self.computed} computed ({self.directory})"


def fill_reference(
    groups: Sequence[Group],
    scorer: Scorer,
    store: LogpStore,
    *,
    max_tokens: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
    by_tokens: bool = False,
    world: World = ALONE,
) -> ReferenceReport:
    """Set `ref_logps` of every group, or `by_tokens` its `ref_token_logps`, from the store where
    they are known, computing and keeping the others: each rank some of the rows, in which they are
    what one process would compute. The first rank alone reads and writes the store.

    Runs that fill the same store do so one after the other, each taking over what is there.
    """
    columns = Groups.of(groups)
    numbers, first = number_rows(columns.digests)
    wanted = columns.digests[first]
    missing = world.share(store.missing(wanted))
    if missing.any():
        with store.filling() if world.first else nullcontext():
            missing = world.share(store.missing(wanted))
            windows = reference_rows(
                columns,
                columns.places(first),
                max_tokens=max_tokens,
                layout=scorer.layout.name,
                missing=set(columns.places(first[missing])),
            )
            rows = [row for window in windows for row in window]
            if rows:
                logger.info(f"reference: computing {missing.sum()} log-probabilities")
                shown = progress(rows, len(rows)) if progress else rows
                _compute(columns, rows, shown, scorer, store, by_tokens, world)
    known = world.share(store.take(wanted) if world.first else None)
    columns.set_references(known.take(numbers), by_tokens=by_tokens)
    for group, filled in zip(groups, columns, strict=True) if columns is not groups else ():
        if by_tokens:
            group.ref_token_logps = filled.ref_token_logps
        else:
            group.ref_logps = filled.ref_logps
    computed = int(missing.sum())
    return ReferenceReport(len(wanted) - computed, computed, store.directory)


def _compute(
    groups: Groups,
    rows: Sequence[PackedRow],
    shown: Iterable[PackedRow],
    scorer: Scorer,
    store: LogpStore,
    by_tokens: bool,
    world: World,
) -> None:
    """Score the rows, one on each rank at a time, and keep what they give."""
    names: list[bytes] = []
    values: list[np.ndarray] = []
    written = time.monotonic()
    for number, _ in enumerate(shown):
        place = number % world.data_size
        last = number == len(rows) - 1
        if place != world.data_size - 1 and not last:
            continue
        mine = number - place + world.data_rank
        if mine < len(rows):
            row = rows[mine]
            values += _row_logps(groups, row, scorer, by_tokens)
            places = [groups.response_ends[p.group] + r for p in row for r in p.responses]
            names += [digest.tobytes() for digest in groups.digests[places]]
        elif world.sharded:
            scorer.token_logps(idle_batch(scorer.layout.name).to(scorer.device))
        if world.share(last or time.monotonic() - written > SECONDS_BETWEEN_WRITES):
            found = world.gather((names, values))
            if world.first:
                store.add([n for ns, _ in found for n in ns], [v for _, vs in found for v in vs])
            names, values, written = [], [], time.monotonic()


def _row_logps(
    groups: Sequence[Group], row: PackedRow, scorer: Scorer, by_tokens: bool
) -> list[np.ndarray]:
    """The log-probabilities of a row's responses."""
    batch = make_batch(groups, row, scorer.layout.name)
    logps = scorer.token_logps(batch.to(scorer.device)).double().cpu().numpy()
    count = np.bincount(batch.response_ids.numpy(), minlength=len(batch.response_lengths))
    parts = np.split(logps, np.cumsum(count)[:-1])
    return parts if by_tokens else [part.sum(keepdims=True) for part in parts]
