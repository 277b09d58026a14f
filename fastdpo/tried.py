"""Releases that were tried; docs/versions.md says which of them together, and how far.

A release out of the range of `setup.py` is refused by pip. One that is admitted and newer than
these costs a line.
"""

import platform
from importlib import metadata

TRIED = {
    "python": ("3.10", "3.14"),
    "torch": ("2.11", "2.15"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.17", "5.24"),
}
"""The oldest and the newest release, of which the first two numbers count."""


def untried() -> list[str]:
    """A line for each installed release that is older or newer than those in `TRIED`."""
    lines = []
    for package, (oldest, newest) in TRIED.items():
        found = installed(package)
        if found is not None and not release(oldest) <= release(found) <= release(newest):
            lines.append(f"{package} {found} is untried, {oldest} to {newest} are not")
    return lines


def installed(package: str) -> str | None:
    """The version of a package, or of Python; None where it is not installed."""
    if package == "python":
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)
