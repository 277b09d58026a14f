"""Rows of preference data from wherever they are: a file, a directory or the hub.

Everything goes through the `datasets` library, so that files are memory-mapped and read once. What
a row says is judged later, by `tokenize_dataset`, which has to look at every row anyway; here a
data set must be found, be readable and have the columns of one of the layouts of
`fastdpo.data.rows`.
"""

import contextlib
import difflib
import gzip
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from ..errors import DataError
from .columns import PROBLEM_COLUMN, TEXT_FIELDS, row_kind
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


def load_rows(
    name: str,
    split: str,
    *,
    config_name: str | None = None,
    num_proc: int | None = None,
    skip_bad_rows: bool = False,
    trains: bool = True,
) -> datasets.Dataset:
    """Load one split of a data set, with the columns of one of the layouts in `fastdpo.data.rows`.

    Args:
        name: a JSONL, JSON (a list of objects), Parquet, CSV or Arrow file (JSON and CSV may be
            gzipped), a directory written by `save_to_disk`, a directory of data files, or a data
            set on the hub. In a CSV, messages and lists are JSON.
        split: a split's name, or a part of it such as "train[:100]". A file has only "train".
        config_name: which of a hub data set's configurations.
        num_proc: processes that read a data set of many files.
        skip_bad_rows: keep rows of JSONL and CSV files that cannot be read as rows of nulls whose
            `fastdpo_problem` says why, for `tokenize_dataset` to drop and count.
        trains: whether the columns have to be those of a layout, and others may be left out.

    Raises:
        DataError: naming the file and, for text files, the line that cannot be read.
    """
    path = Path(name).expanduser()
    try:
        with explain_disk(name):
            if path.is_file():
                kind = _KINDS.get(_suffix(path))
                if kind is None:
                    kinds = ", ".join(_KINDS)
                    raise DataError(f"{path}: unknown kind of file; expected one of {kinds}")
                files = {"train": [path]}
                rows = _load_files(kind, files, split, skip_bad_rows, trains, name)
            elif path.is_dir():
                rows = _load_directory(path, split, config_name, skip_bad_rows, trains)
            elif looks_local(name):
                raise DataError(_not_found(path))
            else:
                rows = _load_hub(name, split, config_name, num_proc)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}: damaged gzip file: {error}") from error
    if len(rows) == 0:
        raise DataError(f"{name}: split {split!r} has no rows")
    if trains:
        row_kind(rows.column_names, name)
    if PROBLEM_COLUMN in rows.column_names:
        unread = len(rows) - rows.data[PROBLEM_COLUMN].null_count
        if unread:
            logger.warning("%s: %d rows cannot be read and are skipped", name, unread)
    return rows


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
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def looks_local(name: str) -> bool:
    """Whether a data set of this name lies on a disk if anywhere, and not on the hub."""
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


def _load_directory(
    path: Path, split: str, config_name: str | None, skip_bad_rows: bool, trains: bool
) -> datasets.Dataset:
    where = str(path)
    if (path / "dataset_dict.json").is_file():
        return _take(_attempt(where, datasets.DatasetDict.load_from_disk, where), split, where)
    if (path / "state.json").is_file():
        saved = _attempt(where, datasets.Dataset.load_from_disk, where)
        return _take({"train": saved}, split, where)
    builder = _attempt(where, datasets.load_dataset_builder, where, config_name)
    files = {
        str(key): [Path(file) for file in listed]
        for key, listed in (builder.config.data_files or {}).items()
    }
    kind = builder.__module__.rpartition(".")[2]
    if kind not in _KINDS.values() or not files:
        raise DataError(f"{where}: no data files; expected some of {', '.join(_KINDS)}")
    return _load_files(kind, files, split, skip_bad_rows, trains, where)


def _load_files(
    kind: str,
    files: Mapping[str, Sequence[Path]],
    split: str,
    skip_bad_rows: bool,
    trains: bool,
    where: str,
) -> datasets.Dataset:
    wanted = [part.partition("[")[0].strip() for part in split.split("+")]
    if not set(wanted) <= set(files):
        raise DataError(_no_split(where, split, list(files)))
    selected = {base: files[base] for base in wanted}
    paths = [path for listed in selected.values() for path in listed]
    for path in paths:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty; expected at least one row")
    if kind in ("parquet", "arrow"):
        return _attempt(where, _read_fast, kind, selected, split)
    if kind == "json" and not any(map(may_fail_fast, paths)):
        # Whatever makes the fast reader fail, the slow one names it or does not mind.
        with contextlib.suppress(Exception), _quiet():
            rows = _read_fast(kind, selected, split)
            if not _mangles_text(rows.features):
                return rows
        logger.debug("%s: rows differ in type or cannot be read: reading line by line", where)
    read = {
        base: read_rows(listed, kind, skip_bad_rows=skip_bad_rows, trains=trains)
        for base, listed in selected.items()
    }
    return _take(read, split, where)


def _read_fast(kind: str, files: Mapping[str, Sequence[Path]], split: str) -> datasets.Dataset:
    names = {base: [str(path) for path in listed] for base, listed in files.items()}
    return datasets.load_dataset(kind, data_files=names, split=split)


def _mangles_text(features: Mapping[str, Any]) -> bool:
    """Whether text may have been stored as something else: as JSON without quotes, so that "42"
    reads as a number, or as a time.
    """

    def untyped(feature: Any) -> bool:
        if isinstance(feature, datasets.List) and isinstance(feature.feature, Mapping):
            return isinstance(feature.feature.get("content"), datasets.Json)
        is_time = isinstance(feature, datasets.Value) and feature.dtype.startswith(("time", "date"))
        return is_time or isinstance(feature, datasets.Json)

    responses = features.get("responses")
    inner = responses.feature if isinstance(responses, datasets.List) else responses
    return untyped(inner) or any(untyped(features.get(name)) for name in TEXT_FIELDS)


def _load_hub(
    name: str, split: str, config_name: str | None, num_proc: int | None
) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, config_name, split=split, num_proc=num_proc)
    except (FileNotFoundError, ConnectionError) as error:
        raise DataError(f"{_not_found(Path(name))}; as a data set of the hub: {error}") from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{name}: {error}") from error


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
