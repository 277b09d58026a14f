"""Releases beyond those that were tried cost a line, and nothing else."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import broken_interpreter
from training import run

from fastdpo import doctor, tried
from fastdpo.config import TrainConfig

PAGE = (Path(__file__).parents[1] / "docs" / "versions.md").read_text(encoding="utf-8")


@pytest.fixture
def torch_of_tomorrow(monkeypatch):
    version, (oldest, newest) = metadata.version, tried.TRIED["torch"]
    monkeypatch.setattr(metadata, "version", lambda n: "2.99.1" if n == "torch" else version(n))
    return f"torch 2.99.1 is untried, {oldest} to {newest} are not"


def test_a_run_and_the_doctor_say_what_is_untried(
    torch_of_tomorrow, tiny_model, pairs_file, tmp_path
):
    _, said = run(tiny_model, pairs_file, tmp_path / "out", max_steps=1)
    assert said.count(f"versions: {torch_of_tomorrow}") == 1
    assert torch_of_tomorrow in doctor.report(TrainConfig(use_cpu=True))


@pytest.mark.parametrize(
    ("version", "lines"),
    [("2.10.9", 1), ("2.11.0", 0), ("2.13.0+cpu", 0), ("2.15.7", 0), ("2.16.0a0", 1), ("3.0", 1)],
)
def test_the_first_two_numbers_count(monkeypatch, version, lines):
    monkeypatch.setattr(tried, "TRIED", {"torch": ("2.11", "2.15")})
    monkeypatch.setattr(tried, "installed", lambda _: version)
    assert len(tried.untried()) == lines


@pytest.mark.parametrize(
    ("triton", "numpy", "broken"),
    [
        ("3.6.0", "2.4.6", True),
        ("3.6.0", "2.10.0", True),
        ("3.6.0", "2.3.5", False),
        ("3.7.1", "2.5.5", False),
        (None, "2.5.5", False),
    ],
)
def test_an_interpreter_that_numpy_has_left_behind(triton, numpy, broken):
    line = broken_interpreter(triton, numpy)
    assert (line is not None) == broken
    assert line is None or line.endswith("pip install 'numpy<2.4'")


def test_what_is_installed_here_has_been_tried():
    assert tried.untried() == [], "try it, and say so in tried.py and docs/versions.md"
    assert tried.installed("torch").partition("+")[0] == torch.__version__.partition("+")[0]


def test_the_page_names_the_oldest_and_the_newest():
    rows = [re.split(r" *\| *", line)[1:-1] for line in PAGE.splitlines() if line.startswith("| ")]
    heads, *rows = rows
    for package, ends in tried.TRIED.items():
        column = heads.index(package if package != "python" else "Python")
        minors = {".".join(row[column].split(".")[:2]) for row in rows if row[column][0].isdigit()}
        assert set(ends) <= minors, package
