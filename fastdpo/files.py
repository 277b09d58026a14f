"""Writing that is either whole or not there: temporary names, then one rename. And locks, which end
with the process that holds them, however it ends.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import FastDPOError

_TEMPORARY = ".fastdpo-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOCKS: set[int] = set()
"""Open directories whose locks this process holds."""


def cache_root() -> Path:
    """The user's cache directory for this program: `$XDG_CACHE_HOME/fastdpo`, else
    `~/.cache/fastdpo`.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdpo"


@contextmanager
def explain(path: Path) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written into an error of one line."""
    try:
        yield
    except FastDPOError:
        raise
    except Exception as error:
        text = str(error).lower()
        code = error.errno if isinstance(error, OSError) else None
        if code in _FULL or "no space left" in text or "disk quota exceeded" in text:
            problem = "the disk is full"
        elif code is not None:
            problem = f"cannot be written ({os.strerror(code)})"
        elif "os error" in text or "i/o error" in text or "ioerror" in text:
            problem = f"cannot be written ({error})"
        else:
            raise
        raise FastDPOError(
            f"{path}: {problem}; checkpoints and files that were whole before are as they were"
        ) from error


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that appears as `path` when the block ends well, and not at all
    otherwise.
    """
    with explain(path), temporary_directory(path) as temporary:
        yield temporary
        flush(temporary)
        if path.exists():
            with temporary_directory(path) as old:
                path.rename(old / path.name)
                temporary.rename(path)
        else:
            temporary.rename(path)
        sync(path.parent)


@contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` that is gone afterwards, unless it was renamed."""
    temporary = make_temporary(path)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_temporary(path: Path) -> Path:
    """An empty directory beside `path`; `remove_leftovers` knows it by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{path.name}-", dir=path.parent))
    temporary.chmod(0o755)
    return temporary


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file name to write to that becomes `path` when the block ends well."""
    with explain(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{_TEMPORARY}{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            os.chmod(name, 0o644)
            sync(Path(name))
            os.replace(name, path)
            sync(path.parent)
        finally:
            Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The whole text as `path`, or what was there before."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(file: Path) -> Any:
    """What a JSON file holds; None where it cannot be read or is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def names_below(folder: Path) -> list[str]:
    """The files below a directory, named from there."""
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def move(names: Iterable[str], source: Path, target: Path) -> None:
    """Move files of one directory into another in this order, each in place of its namesake."""
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        os.replace(source / name, target / name)


def remove(names: Iterable[str], folder: Path) -> None:
    """Remove files of a directory in this order, and the directories in it that are empty then."""
    for name in names:
        file = folder / name
        file.unlink(missing_ok=True)
        if file.parent != folder:
            with suppress(OSError):  # not empty
                file.parent.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`; nobody may be writing there."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


@contextmanager
def locked(folder: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a directory; no file is needed for it, and a killed process leaves none,
    even if processes that it has forked live on. Some network file systems have no locks.

    Where another process holds it, `wait` is called before it is waited for.

    Raises:
        BlockingIOError: another process holds it, and there is no `wait`.
    """
    handle = os.open(folder, os.O_RDONLY)
    _LOCKS.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise
            wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        if handle in _LOCKS:
            _LOCKS.discard(handle)
            os.close(handle)


def _leave_locks() -> None:
    """In a forked child, which would hold them as long as it lives."""
    while _LOCKS:
        os.close(_LOCKS.pop())


os.register_at_fork(after_in_child=_leave_locks)


def are_inside(names: Any) -> bool:
    """Whether these are names of files below the directory that names them."""
    if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in names):
        return False
    paths = [Path(name) for name in names]
    return not any(path.is_absolute() or ".." in path.parts for path in paths)


def flush(folder: Path) -> None:
    """Bring every file of a directory to the disk."""
    for name in names_below(folder):
        sync(folder / name)


def sync(path: Path) -> None:
    """Bring a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
