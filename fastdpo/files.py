"""Writing that is either whole or not there: temporary names, then one rename."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import FastDPOError


def cache_root() -> Path:
    """The user's cache directory for this program: `$XDG_CACHE_HOME/fastdpo`, else
    `~/.cache/fastdpo`.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdpo"


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turns "no space left" while writing `path` into an error a user understands."""
    try:
        yield
    except Exception as error:
        text = str(error).lower()
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "no space left" in text or "disk quota exceeded" in text:
            raise FastDPOError(
                f"{path}: the disk is full; nothing that was there before has been touched"
            ) from error
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that appears as `path` when the block ends well, and not at all
    otherwise.
    """
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            temporary.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file name to write to that becomes `path` when the block ends well."""
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            _flush(Path(name))
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
