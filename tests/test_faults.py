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
    for line, imported, expected in (
        (1, True, ["fast", "slow"]),
        (2, False, ["fast", "slow"]),
        (3, False, []),
        (3, True, ["fast", "slow"]),
    ):
        mutant = Mutant(folder, line, line, 0, 0, "", "", imported)
        assert mutants.tests_of(mutant, known) == expected


def test_what_is_run_at_an_import_stands_in_no_function(tmp_path: Path) -> None:
    file = tmp_path / "source.py"
    file.write_text("A = (\n    2,\n)\n\n\ndef f(\n    a=3,\n):\n    warn(a, 4, stacklevel=5)\n")
    found = {m.what.split()[0]: m.imported for m in mutants.mutants(file)}
    assert found == {"2": True, "3": True, "warn(a,": False, "4": False}


def test_the_tests_of_the_kernels_are_found_by_their_imports() -> None:
    found = mutants.tests_of_the_kernels()
    assert {"kernels", "triton", "two_programs", "nan", "kept"} <= set(found)
    assert not {"train", "plan"} & set(found)
