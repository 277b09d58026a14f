"""`fastdpo report`."""

import json
from collections.abc import Sequence
from pathlib import Path

from .. import files
from ..errors import ConfigError
from .page import comparison_page, page
from .rounds import is_rounds, rounds_page
from .runs import REPORT, STATE, Run, read_runs

USAGE = """\
fastdpo report: a run, or several beside each other, as one HTML file that needs no network

  fastdpo report RUN
  fastdpo report RUN RUN ... -o comparison.html

RUN is the output_dir of a run, or of rounds. One's page is report.html there, which the run itself
keeps up to date (report: true); that of several runs is comparison.html in the current directory:
curves on the same axes, the keys that differ, the final figures.

  -o, --output FILE   where the page goes
"""
COMPARISON = "comparison.html"


def run(arguments: Sequence[str]) -> None:
    """Write the page that a command line asks for, and print where it is.

    Raises:
        FastDPOError: no run is named, or a directory that holds none; the file cannot be written.
    """
    names, output = _parsed(arguments)
    paths = [Path(name).expanduser() for name in names]
    if any(map(is_rounds, paths)):
        if len(paths) > 1:
            raise ConfigError("rounds have a page of their own; expected one directory of rounds")
        path = Path(output).expanduser() if output else paths[0] / REPORT
        files.write_text(path, rounds_page(paths[0]))
        print(path)
        return
    runs = read_runs(paths)
    if len(runs) > 1:
        path = Path(output or COMPARISON).expanduser()
        files.write_text(path, comparison_page(runs))
    else:
        path = Path(output).expanduser() if output else runs[0].path / REPORT
        files.write_text(path, page(runs[0]))
        if output is None:
            _note_file(runs[0])
    print(path)


def _parsed(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The directories, and the file."""
    names: list[str] = []
    output: str | None = None
    rest = iter(arguments)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in ("-o", "--output"):
            output = value if equals else next(rest, "")
            if not output:
                raise ConfigError(f"{flag}: expected a file (fastdpo report --help)")
            if Path(output).expanduser().is_dir():
                raise ConfigError(f"{flag}: {output} is a directory; expected a file")
        elif word.startswith("-"):
            raise ConfigError(f"{word}: unknown option (fastdpo report --help)")
        else:
            names.append(word)
    if not names:
        raise ConfigError("expected a run's output_dir: fastdpo report RUN")
    return list(dict.fromkeys(names)), output


def _note_file(run: Run) -> None:
    """Let the run know of its page, or else overwrite_output_dir would take it for a stranger's."""
    file = run.path / STATE
    state = files.read_json(file)
    names = state.get("files") if isinstance(state, dict) else None
    if isinstance(names, list) and REPORT not in names:
        files.write_text(file, json.dumps({**state, "files": sorted([*names, REPORT])}, indent=1))
