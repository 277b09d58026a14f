"""Files that are copied to the cache before they are read: those of a URL, and zstd's unpacked.

A copy is made once, under a key of what was copied, and whatever is said of it names the original.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import xxhash

from ..errors import DataError

_FOLDER = "fastdpo-files"


def is_url(name: str) -> bool:
    """Whether a data set is named by a URL, such as `hf://datasets/owner/name/train.jsonl`."""
    return "://" in name


def whole_repository(url: str) -> tuple[str, str | None] | None:
    """The name and the revision of a hub's data set whose URL names it whole; None for others."""
    prefix = "hf://datasets/"
    parts = url.removeprefix(prefix).rstrip("/").split("/")
    if not url.startswith(prefix) or len(parts) > 2:
        return None
    name, _, revision = "/".join(parts).partition("@")
    return name, revision or None


class Copies:
    """Copies of files in the cache, and what the originals are called."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def fetch(self, url: str) -> Path:
        """A file or a folder of a URL, by fsspec.

        Raises:
            DataError: nothing there, or no way to read it.
        """
        try:
            system, root = fsspec.url_to_fs(url)
            files = system.find(root)
        except (ImportError, ValueError, OSError) as error:
            raise DataError(f"{url}: cannot be read: {error}") from error
        if not files:
            raise DataError(f"{url}: not found")
        try:
            target = _place(url, [system.ukey(file) for file in files])
            single = [root.rstrip("/")] == [file.rstrip("/") for file in files]
            names = [Path(root).name if single else os.path.relpath(file, root) for file in files]
            for file, name in zip(files, names, strict=True):
                self._shown[str(target / name)] = url if single else f"{url.rstrip('/')}/{name}"
                _write(target / name, lambda part, file=file: system.get_file(file, str(part)))
        except (ValueError, OSError) as error:
            raise DataError(f"{url}: cannot be copied: {error}") from error
        if single:
            return target / names[0]
        self._shown[str(target)] = url
        return target

    def unpack(self, path: Path) -> Path:
        """A file, without its zstd compression where its name ends in `.zst`.

        Raises:
            DataError: a damaged file.
        """
        if path.suffix != ".zst":
            return path
        status = path.stat()
        stamp = [str(path.resolve()), status.st_size, status.st_mtime_ns]
        target = _place("zst", stamp) / path.stem
        shown = self._shown.get(str(path), str(path))
        self._shown[str(target)] = shown

        def write(part: Path) -> None:
            try:
                packed = pa.input_stream(str(path), compression="zstd")
                with packed, part.open("wb") as file:
                    shutil.copyfileobj(packed, file)
            except OSError as error:
                if error.errno is not None:
                    raise
                raise DataError(f"{shown}: damaged zstd file: {error}") from error

        _write(target, write)
        return target

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Name the originals in errors about copies."""
        try:
            yield
        except DataError as error:
            said = str(error)
            for copy in sorted(self._shown, key=len, reverse=True):
                said = said.replace(copy, self._shown[copy])
            if said == str(error):
                raise
            raise DataError(said) from error


def _place(name: str, key: list[Any]) -> Path:
    digest = xxhash.xxh3_128_hexdigest(repr([name, key]).encode())
    return Path(datasets.config.HF_DATASETS_CACHE) / _FOLDER / digest


def _write(target: Path, write: Any) -> None:
    """Write a file under another name first, for other processes to see all of it or nothing."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    os.close(handle)
    try:
        write(Path(name))
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
