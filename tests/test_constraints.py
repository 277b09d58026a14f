"""What the two commands install is pinned, and the pins are releases that setup.py admits."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from fastdpo.tried import TRIED

if sys.version_info >= (3, 11):
    import tomllib
else:  # what pytest needs there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.lstrip().startswith("#")
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAD = ROOT / "kernels" / "fastdpo_kernels"
UNPINNED = {"flash"}
"""Extras that no command of the Makefile installs: building flash-attn takes CUDA and an hour."""


def setup_arguments(file: Path) -> dict[str, Any]:
    """What a setup.py passes to setuptools."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        runpy.run_path(str(file))
    return given


SETUP = setup_arguments(ROOT / "setup.py")
KERNELS = setup_arguments(ROOT / "kernels" / "setup.py")
REQUIRED = [Requirement(text) for text in PROJECT["build-system"]["requires"]]
REQUIRED += [
    Requirement(text)
    for text in SETUP["install_requires"]
    if not text.startswith(KERNELS["name"])  # which lies beside it
]
REQUIRED += [
    Requirement(text)
    for extra, texts in SETUP["extras_require"].items()
    if extra not in UNPINNED
    for text in texts
]
PYTHONS = [f"3.{minor}" for minor in range(*(int(v.split(".")[1]) for v in TRIED["python"]))]
PYTHONS.append(TRIED["python"][1])
RANGE = f"{PYTHONS[0]} to {PYTHONS[-1]}"


def environment(python: str) -> dict[str, str]:
    """Marker variables of a Linux machine with a release of `python`."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "sys_platform": "linux",
    }


def pinned(python: str) -> dict[str, str]:
    """Package → version that constraints.txt names for `python`."""
    pins: dict[str, str] = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(environment(python)):
            name = canonicalize_name(pin.name)
            assert name not in pins, f"{name} has two pins for Python {python}"
            pins[name] = str(pin.specifier).removeprefix("==")
    return pins


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("required", REQUIRED, ids=str)
def test_every_requirement_has_a_pin_within_its_range(required: Requirement, python: str) -> None:
    version = pinned(python).get(canonicalize_name(required.name))
    if required.marker is not None and not required.marker.evaluate(environment(python)):
        return
    assert version, f"no pin for {required.name}: make constraints"
    assert version in required.specifier, f"{required.name} {version}: make constraints"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_run_on_every_python_that_setup_py_admits(python: str) -> None:
    pins = pinned(python)
    for found in metadata.distributions():
        name = canonicalize_name(found.metadata["Name"])
        needs = found.metadata["Requires-Python"]
        if needs and pins.get(name) == found.version.partition("+")[0]:
            assert f"{python}.99" in SpecifierSet(needs), f"{name} {found.version} needs {needs}"


def test_the_head_is_a_distribution_of_its_own_of_the_same_version() -> None:
    assert f"{KERNELS['name']}=={KERNELS['version']}" in SETUP["install_requires"]
    assert KERNELS["version"] == SETUP["version"]
    (needed,) = KERNELS["install_requires"]
    assert needed.startswith("torch>=") and needed in SETUP["install_requires"]
    assert not {name.split(".")[0] for name in SETUP["packages"]} - {"fastdpo"}
    found = {str(file.parent.relative_to(ROOT / "kernels")) for file in HEAD.rglob("*.py")}
    assert {name.replace(".", "/") for name in KERNELS["packages"]} == found


def test_pins_are_exact_releases_from_anywhere() -> None:
    for pin in PINS:
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)) and not pin.url and not pin.extras


def test_one_range_of_pythons_is_told_everywhere() -> None:
    lowest = PYTHONS[0]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"--python-version {lowest}" in makefile
    assert f"sys.version_info < ({lowest.replace('.', ', ')})" in makefile
    assert f"expected Python {RANGE};" in makefile
    assert f"on Python {RANGE}" in contributing
    assert SETUP["python_requires"] == KERNELS["python_requires"] == f">={lowest}"
    tools = PROJECT["tool"]
    assert tools["mypy"]["python_version"] == lowest
    assert tools["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A virtual environment that Make takes for an installed one."""
    (tmp_path / "bin").mkdir()
    for name in ("bin/python", ".installed-demo", ".installed-test", ".installed-dev"):
        (tmp_path / name).touch()
    return tmp_path


def plan(venv: Path, *arguments: str) -> str:
    """The commands that Make would run, whatever a Make around these tests was told."""
    make = shutil.which("make")
    assert make, "make is not installed"
    run = [make, "--no-print-directory", "-n", "-C", str(ROOT), f"VENV={venv}", *arguments]
    told = {"MAKEFLAGS", "MAKEOVERRIDES", "RELEASES", "ARGS", "PYTHON"}
    env = {name: value for name, value in os.environ.items() if name not in told}
    return subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_a_change_of_what_is_installed_installs_it(installed: Path, target: str) -> None:
    assert "pip install" not in plan(installed, target)
    for file in ("setup.py", "kernels/setup.py", "pyproject.toml", "constraints.txt"):
        installs = re.findall(r"pip install .*", plan(installed, target, "-W", file))
        assert len(installs) == 2
        assert all("--constraint constraints.txt" in install for install in installs)
        assert "--no-build-isolation" in installs[-1]


def test_the_newest_releases_are_looked_for_each_time_and_apart(installed: Path) -> None:
    newest = Path(f"{installed}-newest")
    shutil.copytree(installed, newest)
    (newest / ".installed-test").unlink()  # -n does not run what removes it
    commands = plan(installed, "test-newest")
    assert f"rm -f {newest}/.installed-test" in commands
    installs = re.findall(r"pip install .*", commands)
    assert len(installs) == 2 and "constraints.txt" not in commands
    assert all("--upgrade --upgrade-strategy eager" in install for install in installs)
    assert f"{newest}/bin/python -m pytest" in commands and f"{installed}/bin" not in commands
