"""That `make mutants` finds places to change, and tests to run."""

from pathlib import Path

import mutants
import pytest
from faults import ROOT, Mutant
from mutants import IMPORT, PACKAGE

SOURCES = sorted(
    f.relative_to(ROOT) for f in (ROOT / PACKAGE).rglob("*.py") if f.name != "__init__.py"
)


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: f.stem)
def test_every_fault_is_another_program_of_python(file: Path) -> None:
    source = (ROOT / file).read_bytes()
    for mutant in mutants.mutants(file)[:40]:
        changed = source[: mutant.start] + mutant.text.encode() + source[mutant.stop :]
        assert changed != source
        compile(changed, str(file), "exec")


def test_faults_are_those_of_the_operations_and_not_of_words(tmp_path: Path) -> None:
    file = tmp_path / "source.py"
    file.write_text(
        'def f(a: "x" = 2):\n    """1 < 2"""\n    if a < 1:\n        raise OSError(f"{a + 1}")\n'
        "    g(a, b=-a)\n    return min(a, a.min(3))\n"
    )
    assert sorted(mutant.what for mutant in mutants.mutants(file)) == sorted(
        [
            "2 -> (3)",
            "a < 1 -> (not a < 1)",
            "a < 1 -> (a <= 1)",
            "1 -> (0)",
            'raise OSError(f"{a + 1}") -> pass',
            "g(a, b=-a) -> pass",
            "g(a, b=-a) -> (g(a))",
            "-a -> (a)",
            "a.min(3) -> (a.max(3))",
            "3 -> (4)",
        ]
    )


def test_tests_of_a_fault_are_those_that_run_its_line_or_its_import() -> None:
    lines = {"a.py:1": [IMPORT], "a.py:2": ["slow", "fast"], "b.py:2": ["other"]}
    known = {"lines": lines, "seconds": {"slow": 2, "fast": 1, "other": 0}}
    folder = f"{PACKAGE}/a.py"
    assert mutants.tests_of(Mutant(folder, 1, 1, 0, 0, "", ""), known) == ["fast", "slow"]
    assert mutants.tests_of(Mutant(folder, 2, 2, 0, 0, "", ""), known) == ["fast", "slow"]
    assert mutants.tests_of(Mutant(folder, 3, 3, 0, 0, "", ""), known) == []


def test_the_tests_of_the_kernels_are_found_by_their_imports() -> None:
    found = mutants.tests_of_the_kernels()
    assert {"kernels", "triton", "two_programs", "nan", "kept"} <= set(found)
    assert not {"train", "plan"} & set(found)
