"""Imports point down: no circle anywhere, and within fastdpo no package that imports a higher one.

Every import counts, those inside functions and those for types too.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"fastdpo": ROOT, "fastdpo_kernels": ROOT / "kernels", "bench": ROOT}
LAYERS = (
    ("errors", "quiet", "version"),
    ("arguments", "extras", "files", "terminal", "tried", "config"),
    ("devices", "losses", "parallel", "data", "report"),
    ("model",),
    ("checks", "logs"),
    ("reference", "hub", "memory"),
    ("training",),
    ("scoring", "generation"),
    ("rounds",),
    ("doctor", "demo"),
    ("cli", "__main__"),
)
"""The files and folders of fastdpo, from the bottom up; those of one line do not need each other,
unless they stand to the right of what they import.
"""
FOREIGN = {"fastdpo": ("bench",), "fastdpo_kernels": ("fastdpo", "bench"), "bench": ()}


def modules(package: str) -> dict[str, Path]:
    root = PACKAGES[package]
    found = {}
    for file in sorted((root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the same package that a module imports."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                found.add(f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & known.keys()) - {name}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_imports_go_round_in_a_circle(package: str) -> None:
    known = modules(package)
    graph = {name: imports(name, file, known) for name, file in known.items()}
    assert sum(map(len, graph.values())) > len(graph) / 2, "the imports are not seen"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_within_fastdpo_imports_point_down() -> None:
    known = modules("fastdpo")
    order = [name for layer in LAYERS for name in layer]
    assert {name.split(".")[1] for name in known if "." in name} == set(order)
    upward = [
        f"{name} imports {other}"
        for name, file in known.items()
        if "." in name
        for other in imports(name, file, known)
        if "." not in other or order.index(name.split(".")[1]) < order.index(other.split(".")[1])
    ]
    assert not upward


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_within_a_package_are_relative(package: str) -> None:
    for file in modules(package).values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {package, *FOREIGN[package]}, f"{file}, line {node.lineno}"
