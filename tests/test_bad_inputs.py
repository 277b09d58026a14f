"""What is wrong with a run's inputs is one line and exit code 2, and changes nothing on disk."""

import logging
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

import bad_checkpoints
import bad_files
import bad_inputs
import bad_losses
import bad_models
import bad_places
import pytest
import xxhash
from bad_inputs import CONFIG, Case

from fastdpo.cli import main

TABLES = (bad_inputs, bad_files, bad_losses, bad_models, bad_checkpoints, bad_places)
CASES = [case for table in TABLES for case in table.CASES]
SHOWN = (UserWarning, FutureWarning, RuntimeWarning, ResourceWarning)


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a directory, with its kind, its mode and what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = oct(path.lstat().st_mode)
        if path.is_symlink():
            mode += f" to {os.readlink(path)}"
        elif path.is_file():
            mode += f" {xxhash.xxh3_128_hexdigest(path.read_bytes())}"
        found[str(path.relative_to(folder))] = mode
    return found


@pytest.fixture(scope="module")
def prepared(tiny_model, pairs_file, tmp_path_factory):
    """The scratch directory as every case finds it, and the caches that all of them share."""
    root = tmp_path_factory.mktemp("bad")
    path = root / "work"
    path.mkdir()
    shutil.copytree(tiny_model, path / "model")
    shutil.copy(pairs_file, path / "pairs.jsonl")
    (path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        _isolate(patch, root, path)
        assert main(["train", "config.yaml"]) == 0
    return root, path


def _isolate(patch: pytest.MonkeyPatch, root: Path, path: Path) -> None:
    patch.chdir(path)
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "datasets")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_one_line(case: Case, prepared, tmp_path, monkeypatch, capsys):
    root, original = prepared
    path = tmp_path / "work"
    shutil.copytree(original, path, symlinks=True)
    _isolate(monkeypatch, root, path)
    for handler in _handlers():  # libraries hold on to the stream of their import
        monkeypatch.setattr(handler, "stream", sys.stderr)
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        case.prepare(path, patch)
        capsys.readouterr()
        before = snapshot(path)
        start = time.perf_counter()
        code = main(list(case.arguments))
        seconds = time.perf_counter() - start
    captured = capsys.readouterr()
    assert code == 2, captured.err
    pattern = ".*".join(map(re.escape, f"error: {case.expected}".split("…")))
    assert re.match(pattern, captured.err), captured.err
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n"), captured.err
    assert len(captured.err) < 1000
    assert [str(w.message) for w in warned if issubclass(w.category, SHOWN)] == []
    assert snapshot(path) == before
    assert seconds < 20


def _handlers() -> list[logging.StreamHandler]:
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    found = [handler for logger in loggers for handler in logger.handlers]
    return [h for h in found if type(h) is logging.StreamHandler and h.stream is not sys.stderr]


def test_names_are_unique_and_many():
    assert len({case.name for case in CASES}) == len(CASES) > 200
