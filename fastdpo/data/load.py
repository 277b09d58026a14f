"""Rows of preference data from wherever they are: a file, a directory or the hub.

Everything goes through the `datasets` library, so that files are memory-mapped and read once. What
a row says is judged later, by `tokenize_dataset`, which has to look at every row anyway; here a
data set must be found, be readable and have one of `fastdpo.data.layouts`, which is made TRL's.
"""

import contextlib
import difflib
import gzip
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from ..errors import DataError
from .columns import FIELDS, PROBLEM_COLUMN, TEXT_FIELDS, row_kinds
from .copies import Copies, is_url, whole_repository
from .dates import dates_as_text, holds_times
from .layouts.convert import to_canonical
from .readers import may_fail_fast, read_rows

logger = logging.getLogger(__name__)

_KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}


FILE_KINDS = frozenset(_KINDS.values())
"""The readers of the `datasets` library for files, which its `path` may name."""


def load_rows(
    name: str,
    split: str,
    *,
    config_name: str | None = None,
    num_proc: int | None = None,
    skip_bad_rows: bool = False,
    layout: str | None = None,
    columns: Mapping[str, Any] | None = None,
    scores: bool = False,
) -> datasets.Dataset:
    """Load one split of a data set in any of `fastdpo.data.layouts`, with the columns of one of the
    layouts in `fastdpo.data.rows`.

    Args:
        name: a JSONL, JSON (a list of objects), Parquet, CSV or Arrow file (JSON and CSV may be
            packed by gzip or zstd), a directory written by `save_to_disk`, a directory of data
            files, the URL of a file or a directory, or a data set on the hub. In a CSV, messages
            and lists are JSON.
        split: a split's name, or a part of it such as "train[:100]". A file has only "train".
        config_name: which of a hub data set's configurations.
        num_proc: processes that read a data set of many files.
        skip_bad_rows: keep rows of JSONL and CSV files that cannot be read as rows of nulls whose
            `fastdpo_problem` says why, for `tokenize_dataset` to drop and count.
        layout: the layout, where it is not to be told from the columns.
        columns: which column holds each field, in place of a layout.
        scores: whether the scores of a pair's answers are to be read.

    Raises:
        DataError: naming the file and, for text files, the line that cannot be read; a layout that
            is not known, or may be read in two ways.
    """
    every = bool(layout or columns or scores)
    rows = Reader(split, config_name, num_proc, skip_bad_rows, every).read(name)
    return to_canonical(
        rows, name, layout=layout, columns=columns, scores=scores, num_proc=num_proc
    )


@dataclass(frozen=True)
class Reader:
    """Reads a split of a data set as it stands.

    Attributes:
        split: as in `load_rows`, and so the next three.
        config_name: see there.
        num_proc: see there.
        skip_bad_rows: see there.
        all_columns: whether to keep columns that training does not read.
    """

    split: str
    config_name: str | None = None
    num_proc: int | None = None
    skip_bad_rows: bool = False
    all_columns: bool = False
    copies: Copies = field(default_factory=Copies)

    def read(self, name: str) -> datasets.Dataset:
        """The rows of the data set of this name.

        Raises:
            DataError: as `load_rows` does.
        """
        try:
            with self.copies.named(), explain_disk(name):
                rows = self._read(name)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{name}: damaged gzip file: {error}") from error
        if len(rows) == 0:
            raise DataError(f"{name}: split {self.split!r} has no rows")
        if PROBLEM_COLUMN in rows.column_names:
            unread = len(rows) - rows.data[PROBLEM_COLUMN].null_count
            if unread:
                logger.warning("%s: %d rows cannot be read and are skipped", name, unread)
        return rows

    def _read(self, name: str) -> datasets.Dataset:
        path, revision = Path(name).expanduser(), None
        if is_url(name):
            repository = whole_repository(name)
            if repository is None:
                path = self.copies.fetch(name)
            else:
                name, revision = repository
        elif not path.exists() and looks_local(name):
            raise DataError(_not_found(path))
        if path.is_file():
            return self._file(path, name)
        if path.is_dir():
            return self._directory(path)
        return self.hub(name, revision=revision)

    def hub(self, name: str, **options: Any) -> datasets.Dataset:
        """The rows of a data set on the hub.

        Args:
            name: of it.
            **options: of `datasets.load_dataset`.

        Raises:
            DataError: where it cannot be had.
        """
        options |= {"split": self.split, "num_proc": self.num_proc}
        try:
            rows = datasets.load_dataset(name, self.config_name, **options)
            if rows.info.builder_name == "json" and holds_times(rows.features):
                with dates_as_text():
                    rows = datasets.load_dataset(
                        name, self.config_name, cache_dir=_with_dates_as_text(), **options
                    )
            return rows
        except (FileNotFoundError, ConnectionError) as error:
            message = f"{_not_found(Path(name))}; as a data set of the hub: {error}"
            raise DataError(message) from error
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise DataError(f"{name}: {error}") from error

    def _file(self, path: Path, name: str) -> datasets.Dataset:
        kind = _KINDS.get(_suffix(path))
        if kind is None:
            kinds = ", ".join(_KINDS)
            raise DataError(f"{path}: unknown kind of file; expected one of {kinds}")
        return self.files(kind, {"train": [path]}, name)

    def _directory(self, path: Path) -> datasets.Dataset:
        where, split = str(path), self.split
        if (path / "dataset_dict.json").is_file():
            return _take(_attempt(where, datasets.DatasetDict.load_from_disk, where), split, where)
        if (path / "state.json").is_file():
            saved = _attempt(where, datasets.Dataset.load_from_disk, where)
            return _take({"train": saved}, split, where)
        builder = _attempt(where, datasets.load_dataset_builder, where, self.config_name)
        files = {
            str(key): [Path(file) for file in listed]
            for key, listed in (builder.config.data_files or {}).items()
        }
        kind = builder.__module__.rpartition(".")[2]
        if kind not in _KINDS.values() or not files:
            raise DataError(f"{where}: no data files; expected some of {', '.join(_KINDS)}")
        _say_other_kinds(path, kind)
        return self.files(kind, files, where)

    def files(self, kind: str, files: Mapping[str, Sequence[Path]], where: str) -> datasets.Dataset:
        """The rows of files of one kind, by their splits.

        Raises:
            DataError: as `load_rows` does.
        """
        wanted = [part.partition("[")[0].strip() for part in self.split.split("+")]
        if not set(wanted) <= set(files):
            raise DataError(_no_split(where, self.split, list(files)))
        for path in (path for base in wanted for path in files[base]):
            if path.stat().st_size == 0:
                raise DataError(f"{path}: is empty; expected at least one row")
        selected = {base: [self.copies.unpack(path) for path in files[base]] for base in wanted}
        paths = [path for listed in selected.values() for path in listed]
        if kind in ("parquet", "arrow"):
            return _attempt(where, _read_fast, kind, selected, self.split)
        if kind == "json" and not any(map(may_fail_fast, paths)):
            # Whatever makes the fast reader fail, the slow one names it or does not mind.
            with contextlib.suppress(Exception), _quiet():
                with dates_as_text():
                    rows = _read_fast(kind, selected, self.split, _with_dates_as_text())
                if not _mangles_text(rows.features, every=self.all_columns):
                    return rows
            logger.debug("%s: rows differ in type or cannot be read: reading line by line", where)
        read = {
            base: read_rows(
                listed, kind, skip_bad_rows=self.skip_bad_rows, all_columns=self.all_columns
            )
            for base, listed in selected.items()
        }
        return _take(read, self.split, where)


@contextlib.contextmanager
def explain_disk(name: str) -> Iterator[None]:
    """Turn what the disk refuses while a data set is read, or written to the library's cache, into
    an error of one line.
    """
    try:
        yield
    except gzip.BadGzipFile:
        raise
    except (OSError, datasets.exceptions.DatasetGenerationError) as raised:
        error = raised if isinstance(raised, OSError) else raised.__cause__
        if not isinstance(error, OSError):
            raise
        cache = str(datasets.config.HF_DATASETS_CACHE)
        place = str(error.filename or cache)
        in_cache = place.startswith(cache) or cache.startswith(place)
        hint = "; HF_DATASETS_CACHE names another cache" if in_cache else ""
        reason = error.strerror or str(error)
        raise DataError(f"{name}: {place}: cannot be read or written ({reason}){hint}") from error


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix


def _say_other_kinds(folder: Path, kind: str) -> None:
    """Warn of data files that are not read since most of the directory's are of another kind."""
    kinds = {file: _KINDS.get(_suffix(file), kind) for file in folder.rglob("*")}
    if others := sorted(str(f.relative_to(folder)) for f in kinds if kinds[f] != kind):
        logger.warning(
            f"{folder}: only its {kind} files are read, not {len(others)} of other kinds, such as "
            f"{others[0]}; the key datasets reads several kinds"
        )


def looks_local(name: str) -> bool:
    """Whether a data set of this name lies on a disk if anywhere, and not on the hub."""
    if is_url(name):
        return False
    starts = name.startswith((".", "/", "~"))
    return starts or name.count("/") > 1 or _suffix(Path(name)) in _KINDS


def _not_found(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: not found; neither is the directory {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3)
    if not near:
        near = [entry for entry in names if _suffix(Path(entry)) in _KINDS][:3]
    hint = f"; in {folder} there is {', '.join(near)}" if near else ""
    return f"{path}: not found{hint}"


def _with_dates_as_text() -> str:
    """The cache of what is read by `dates_as_text`."""
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "fastdpo")


def _read_fast(
    kind: str, files: Mapping[str, Sequence[Path]], split: str, cache: str | None = None
) -> datasets.Dataset:
    names = {base: [str(path) for path in listed] for base, listed in files.items()}
    return datasets.load_dataset(kind, data_files=names, split=split, cache_dir=cache)


def _mangles_text(features: Mapping[str, Any], *, every: bool) -> bool:
    """Whether text may have been stored as JSON without quotes, so that "42" reads as a number, in
    `every` column or in those that training reads.
    """
    read = features if every or not row_kinds(features) else set(features) & set(FIELDS)
    messages = datasets.List(datasets.Json())  # of other fields each, and objects all of them
    return any(
        _holds_json(features[name])
        for name in read
        if name not in (*TEXT_FIELDS, "tools") or features[name] != messages
    )


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_holds_json, feature.values()))
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _holds_json(feature.feature)
    return isinstance(feature, datasets.Json)


def _take(splits: Mapping[str, datasets.Dataset], split: str, where: str) -> datasets.Dataset:
    """A split, or a part of one, by the notation of `datasets.ReadInstruction`."""
    if split in splits:
        return splits[split]
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({key: len(rows) for key, rows in splits.items()})
    except (ValueError, AssertionError):
        raise DataError(_no_split(where, split, list(splits))) from None
    # A range that begins at the end is one that `select` refuses.
    taken = [splits[p.splitname].select(range(p.from_, p.to) or ()) for p in parts]
    return taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)


def _no_split(where: str, split: str, existing: Sequence[str]) -> str:
    return f"{where}: no split {split!r}; expected one of {', '.join(existing)}"


def _attempt(where: str, read: Any, *arguments: Any) -> Any:
    """Call a reader of the `datasets` library and say in one line what it stopped at."""
    try:
        with _quiet():
            return read(*arguments)
    except FileNotFoundError as error:
        raise DataError(f"{where}: {error}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"{where}: cannot be read: {cause}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own error lines from the terminal: our message follows."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
