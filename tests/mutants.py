"""Which small faults of `kernels/` no test would notice.

    make mutants ARGS="--sample 300 --seed 1"
    make mutants ARGS="--only products --tests products tiles"

One place of the sources is changed at a time (a comparison, a sign, a constant, a condition, a
statement that is left out), and the tests that run its line are run, fastest first, in a forked
process that has everything imported but the kernels. A fault is killed if one of them fails or
hangs. Prints every survivor and the share killed of each file.
"""

import argparse
import bisect
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from faults import ROOT, Mutant, mutants

PACKAGE = Path("kernels/fastdpo_kernels")
IMPORT = "import"
WITH_A_TRAINER = {
    "against_trl", "bench_heads", "cards", "config_losses", "hub_layout", "loop", "memory_parallel",
    "optimizer_in_backward", "output", "ranks", "readme", "train",
}  # fmt: skip
"""Tests that import the kernels for something else: half an hour, and no fault is theirs alone."""
APART = {
    "sharded": "tests/test_vocab_parallel.py",
    "vocab_parallel": "tests/test_vocab_parallel.py",
    "triton/compile": "tests/test_compile_kernels.py",
    "triton/configs": "tests/test_cards.py",
}
"""Tests whose own processes run these files, or that take too long to be measured."""
SECONDS = 120
"""Of the tests of one fault, fastest first; of those that take longer together, the others wait."""


class Lines:
    """A pytest plugin that writes which lines of the kernels each test runs, and its seconds."""

    def __init__(self, out: Path) -> None:
        self.out, self.found, self.seconds = out, defaultdict(set), {}
        self.failed: set[str] = set()

    def pytest_collection(self) -> None:
        self.test = IMPORT
        sys.settrace(self._call)

    def pytest_runtest_protocol(self, item: Any) -> None:
        self.test, self.began = item.nodeid, sum(os.times()[:4])
        sys.settrace(self._call)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        self.seconds[nodeid] = sum(os.times()[:4]) - self.began

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        for test in self.failed:
            del self.seconds[test]
        lines = {f"{f}:{n}": sorted(names - self.failed) for (f, n), names in self.found.items()}
        found = {"lines": lines, "seconds": self.seconds, "failed": sorted(self.failed)}
        self.out.write_text(json.dumps(found))

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if "/fastdpo_kernels/" in frame.f_code.co_filename else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        place = frame.f_code.co_filename.partition("/fastdpo_kernels/")[2]
        self.found[place, frame.f_lineno].add(self.test)
        return self._line


def run_tests(
    arguments: list[str], kernels: Path, seconds: float, plugins: list[Any], out: Path | None = None
) -> int | None:
    """The exit status of pytest in a forked process with these kernels; None if it hangs.

    `seconds` are those of the processor; a process that waits for another has ten times as many.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDONLY)
        log = os.open(out or os.devnull, os.O_WRONLY | os.O_CREAT)
        for stream, to in enumerate((null, log, log)):
            os.dup2(to, stream)
        os.environ["PYTHONPATH"] = f"{kernels}:{ROOT}"
        import pytest

        options = ["-q", "-p", "no:cacheprovider", "-o", f"pythonpath=. {kernels}"]
        try:
            status = int(pytest.main([*options, *([] if plugins else ["-x"]), *arguments], plugins))
        except BaseException:
            status = 99
        os._exit(status)
    end = time.monotonic() + 10 * seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def import_all_but_the_kernels() -> None:
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import triton  # noqa: F401
    import trl  # noqa: F401

    torch.set_num_threads(1)
    assert not any(name.startswith("fastdpo_kernels") for name in sys.modules)


def tests_of(mutant: Mutant, known: dict[str, Any]) -> list[str]:
    """The tests that run a line of a mutant, fastest first; those of the file for what is run when
    it is imported.
    """
    file = mutant.file.partition("/fastdpo_kernels/")[2]
    apart = [tests for part, tests in APART.items() if part in file]
    if apart:
        return apart[:1]
    lines = range(mutant.line, mutant.last + 1)
    names = {name for n in lines for name in known["lines"].get(f"{file}:{n}", ())}
    if mutant.imported:
        of_file = [found for line, found in known["lines"].items() if line.startswith(f"{file}:")]
        names = {name for found in of_file for name in found} - {IMPORT} or set(known["seconds"])
    return sorted(names, key=lambda name: known["seconds"][name])


def try_one(mutant: Mutant, tests: list[str], folder: Path, seconds: dict[str, float]) -> str:
    """ "killed", or how it survived."""
    if not tests:
        return "no test runs it"
    target = folder / Path(mutant.file).relative_to("kernels")
    source = (ROOT / mutant.file).read_bytes()
    target.write_bytes(source[: mutant.start] + mutant.text.encode() + source[mutant.stop :])
    took = list(itertools.accumulate(seconds.get(test, 0) for test in tests))
    enough = max(1, bisect.bisect(took, SECONDS))
    try:
        for some in (tests[: min(10, enough)], tests[10:enough]):
            if some and run_tests(some, folder, 60 + 3 * took[enough - 1], []) != 0:
                return "killed"
        rest = len(tests) - enough
        return f"survived all but the {rest} slowest tests" if rest else "survived"
    finally:
        target.write_bytes(source)


def tests_of_the_kernels() -> list[str]:
    """Names of the files that import the kernels and are about them."""
    imports = re.compile(r"^\s*(from|import) fastdpo_kernels\b", re.MULTILINE)
    files = {f.stem.removeprefix("test_"): f for f in (ROOT / "tests").glob("test_*.py")}
    assert files.keys() >= WITH_A_TRAINER, f"no such tests: {WITH_A_TRAINER - files.keys()}"
    found = [n for n, f in files.items() if imports.search(f.read_text(encoding="utf-8"))]
    return sorted(set(found) - WITH_A_TRAINER)


def chosen(sample: int | None, seed: int, only: list[str]) -> list[Mutant]:
    """All mutants, or as many of every file as is its share."""
    by_file = [mutants(f.relative_to(ROOT)) for f in sorted((ROOT / PACKAGE).rglob("*.py"))
               if any(part in str(f) for part in only)]  # fmt: skip
    total = sum(map(len, by_file))
    if sample is None or sample >= total:
        return [m for found in by_file for m in found]
    draw = random.Random(seed)
    return [
        m
        for found in by_file
        for m in draw.sample(found, min(len(found), -(-len(found) * sample // total)))
    ]


def measured(files: list[str], folder: Path, kept: Path) -> dict[str, Any]:
    """What `Lines` finds of the sources without a fault, as `kept` has it where it exists."""
    if not kept.exists():
        log = kept.with_suffix(".log")
        status = run_tests(files, folder, 7200, [Lines(kept)], log)
        if status not in (0, 1):  # those that fail are left out
            kept.unlink(missing_ok=True)
            sys.exit(
                f"without a fault the tests do not pass ({status}):\n{log.read_text()[-4000:]}"
            )
    return json.loads(kept.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="how many faults to try; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the files' names")
    parser.add_argument("--tests", nargs="+", help="test files; all of the kernels by default")
    parser.add_argument("--lines", type=Path, help="where to keep which test runs which line")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    files = [f"tests/test_{name}.py" for name in options.tests or tests_of_the_kernels()]
    for file in files:
        if not Path(file).exists():
            parser.error(f"--tests: there is no {file}")
    import_all_but_the_kernels()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "kernels"
        shutil.copytree(ROOT / PACKAGE, folder / "fastdpo_kernels")
        known = measured(files, folder, options.lines or Path(scratch) / "lines.json")
        todo = chosen(options.sample, options.seed, options.only)
        for test in known["failed"]:
            print(f"left out, it fails without a fault: {test}")
        print(f"{len(known['seconds'])} tests, {len(todo)} faults", flush=True)
        total = 0
        for file, faults in itertools.groupby(todo, lambda mutant: mutant.file):
            killed, count = 0, 0
            for mutant in faults:
                tests = tests_of(mutant, known)
                result = try_one(mutant, tests, folder, known["seconds"])
                killed, count = killed + (result == "killed"), count + 1
                if result != "killed":
                    print(f"{mutant.file}:{mutant.line}: {result}: {mutant.what}", flush=True)
            total += killed
            print(f"{killed:4d} of {count:4d} killed  {file}", flush=True)
    print(f"{total} of {len(todo)} killed, {total / max(1, len(todo)):.1%}")


if __name__ == "__main__":
    main()
