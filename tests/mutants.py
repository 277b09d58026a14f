"""Which small faults of `kernels/` no test would notice.

    make mutants ARGS="--sample 300 --seed 1"
    make mutants ARGS="--only products --tests products tiles"

One place of the sources is changed at a time (a comparison, a sign, a constant, a condition, a
statement that is left out), and the tests that run its line are run, fastest first, in a forked
process that has everything imported but the kernels. A fault is killed if one of them fails or
hangs. Prints every survivor and the share killed of each file.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("kernels/fastdpo_kernels")
TESTS = [
    "kernels",
    "triton",
    "library",
    "linear_loss",
    "linear_loss_arguments",
    "losses",
    "losses_far",
    "losses_gone_wrong",
    "loss_kinds",
    "tiles",
    "strides",
    "workspace",
    "integrations_trl",
    "integrations_liger",
    "vocab_parallel",
    "cuda",
    "cross_entropy",
    "cards",
    "compile_ahead",
    "specialisation",
    "head_passes",
    "products",
]
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"minimum": "maximum", "min": "max", "amin": "amax", "any": "all", "exp": "abs"}
NAMES |= {other: name for name, other in NAMES.items()}
APART = {
    "sharded": "tests/test_vocab_parallel.py",
    "vocab_parallel": "tests/test_vocab_parallel.py",
    "triton/compile": "tests/test_compile_kernels.py",
}
"""Tests whose own processes run these files."""
SECONDS = 90
"""For the tests of one fault; of those that survive so long, not all tests have run."""


class Mutant(NamedTuple):
    """One changed place: from `start` to `stop` of a file's source comes `text`."""

    file: str
    line: int
    last: int
    start: int
    stop: int
    text: str
    what: str


def mutants(file: Path) -> list[Mutant]:
    """Every fault of a source file, but for words and annotations."""
    source = (ROOT / file).read_text(encoding="utf-8")
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, new in _changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        old = source.encode()[start:stop].decode()
        text = f"({ast.unparse(new)})" if isinstance(new, ast.expr) else ast.unparse(new)
        what = f"{' '.join(old.split())[:60]} -> {' '.join(text.split())[:60]}"
        found.append(Mutant(str(file), node.lineno, node.end_lineno, start, stop, text, what))
    return found


def _changes(tree: ast.AST) -> Iterator[tuple[Any, ast.AST]]:
    """Nodes, each with one that takes its place."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)):
            if isinstance(node, ast.Raise):
                yield node, ast.Pass()
            continue
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "type_comment"):
                todo += [v for v in (value if isinstance(value, list) else [value])
                         if isinstance(v, ast.AST)]  # fmt: skip
        yield from _of(node)


def _of(node: ast.AST) -> Iterator[tuple[Any, ast.AST]]:
    copy = ast.parse(ast.unparse(node), mode="eval").body if isinstance(node, ast.expr) else None
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        copy.ops = [SWAPS[type(node.ops[0])]()]
        yield node, copy
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        words = any(isinstance(n, (ast.JoinedStr, ast.List, ast.Tuple)) or
                    isinstance(getattr(n, "value", None), str) for n in ast.walk(node))  # fmt: skip
        if not words:
            copy.op = SWAPS[type(node.op)]()
            yield node, copy
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node, node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        new = not value if isinstance(value, bool) else value + 1 if value != 1 else 0 * value
        yield node, ast.Constant(new)
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in NAMES:
            copy.func.attr = NAMES[node.func.attr]
            yield node, copy
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                fewer = ast.parse(ast.unparse(node), mode="eval").body
                del fewer.keywords[index]
                yield node, fewer
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, ast.Name):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield node, ast.Pass()


class Lines:
    """A pytest plugin that writes which lines of the kernels each test runs, and its seconds."""

    def __init__(self, out: Path) -> None:
        self.out, self.found, self.seconds = out, defaultdict(set), {}

    def pytest_runtest_protocol(self, item: Any) -> None:
        self.test, self.began = item.nodeid, time.perf_counter()
        sys.settrace(self._call)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        self.seconds[nodeid] = time.perf_counter() - self.began

    def pytest_sessionfinish(self) -> None:
        tests = {f"{f}:{n}": sorted(names) for (f, n), names in self.found.items()}
        self.out.write_text(json.dumps({"lines": tests, "seconds": self.seconds}))

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if "/fastdpo_kernels/" in frame.f_code.co_filename else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        place = frame.f_code.co_filename.partition("/fastdpo_kernels/")[2]
        self.found[place, frame.f_lineno].add(self.test)
        return self._line


def run_tests(
    arguments: list[str], kernels: Path, seconds: float, plugins: list[Any]
) -> int | None:
    """The exit status of pytest in a forked process with these kernels; None if it hangs."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.environ["PYTHONPATH"] = f"{kernels}:{ROOT}"
        import pytest

        options = ["-q", "-x", "-p", "no:cacheprovider", "-o", f"pythonpath=. {kernels}"]
        if plugins:
            options.remove("-x")
        try:
            status = int(pytest.main([*options, *arguments], plugins))
        except BaseException:
            status = 99
        os._exit(status)
    end = time.monotonic() + seconds
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
    """The tests that run a line of a mutant, fastest first."""
    file = mutant.file.partition("/fastdpo_kernels/")[2]
    apart = [tests for part, tests in APART.items() if part in file]
    if apart:
        return apart[:1]
    lines = range(mutant.line, mutant.last + 1)
    names = {name for n in lines for name in known["lines"].get(f"{file}:{n}", ())}
    return sorted(names, key=lambda name: known["seconds"][name])


def try_one(mutant: Mutant, tests: list[str], folder: Path) -> str:
    """ "killed", or how it survived."""
    if not tests:
        return "no test runs it"
    target = folder / Path(mutant.file).relative_to("kernels")
    source = (ROOT / mutant.file).read_bytes()
    target.write_bytes(source[: mutant.start] + mutant.text.encode() + source[mutant.stop :])
    try:
        began = time.monotonic()
        for some in (tests[:10], tests[10:]):
            status = run_tests(some, folder, SECONDS, []) if some else 0
            if status is None and time.monotonic() - began > SECONDS and len(some) > 10:
                return "survived as many tests as there was time for"
            if status != 0:
                return "killed"
        return "survived"
    finally:
        target.write_bytes(source)


def chosen(sample: int | None, seed: int, only: str) -> list[Mutant]:
    """All mutants, or as many of every file as is its share."""
    by_file = [mutants(f.relative_to(ROOT)) for f in sorted((ROOT / PACKAGE).rglob("*.py"))
               if only in str(f)]  # fmt: skip
    total = sum(map(len, by_file))
    if sample is None or sample >= total:
        return [m for found in by_file for m in found]
    draw = random.Random(seed)
    return [
        m
        for found in by_file
        for m in draw.sample(found, min(len(found), -(-len(found) * sample // total)))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="how many faults to try; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the files' names")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="test files; all of the kernels")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import_all_but_the_kernels()
    files = [
        f for name in options.tests for f in sorted(map(str, Path("tests").glob(f"test_{name}.py")))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder, found = Path(scratch) / "kernels", Path(scratch) / "lines.json"
        shutil.copytree(ROOT / PACKAGE, folder / "fastdpo_kernels")
        began = time.monotonic()
        status = run_tests(files, folder, 3600, [Lines(found)])
        assert status == 0, f"the tests do not pass without a fault: pytest ended with {status}"
        known = json.loads(found.read_text())
        todo = chosen(options.sample, options.seed, options.only)
        print(
            f"{len(known['seconds'])} tests in {time.monotonic() - began:.0f} s; {len(todo)} faults"
        )
        results: dict[str, list[bool]] = defaultdict(list)
        for mutant in todo:
            result = try_one(mutant, tests_of(mutant, known), folder)
            results[mutant.file].append(result == "killed")
            if result != "killed":
                print(f"{mutant.file}:{mutant.line}: {result}: {mutant.what}", flush=True)
    for file, killed in results.items():
        print(f"{sum(killed):4d} of {len(killed):4d} killed  {file}")
    every = [one for killed in results.values() for one in killed]
    print(f"{sum(every)} of {len(every)} killed, {sum(every) / len(every):.1%}")


if __name__ == "__main__":
    main()
