"""Every small fault of a source file: a comparison, a sign, a constant, a statement left out."""

import ast
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"minimum": "maximum", "min": "max", "amin": "amax", "any": "all", "exp": "abs"}
NAMES |= {other: name for name, other in NAMES.items()}


class Mutant(NamedTuple):
    """One changed place: from `start` to `stop` of a file's source comes `text`.

    `imported` says that it is run when the file is imported: it stands in no function's body.
    """

    file: str
    line: int
    last: int
    start: int
    stop: int
    text: str
    what: str
    imported: bool


def mutants(file: Path) -> list[Mutant]:
    """Every fault of a source file, but for words and annotations."""
    source = (ROOT / file).read_text(encoding="utf-8")
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found, tree = [], ast.parse(source)
    bodies = [
        range(node.body[0].lineno, node.end_lineno + 1)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    for node, new in _changes(tree):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        old = source.encode()[start:stop].decode()
        text = f"({ast.unparse(new)})" if isinstance(new, ast.expr) else ast.unparse(new)
        what = f"{' '.join(old.split())[:60]} -> {' '.join(text.split())[:60]}"
        imported = not any(node.lineno in body for body in bodies)
        place = (str(file), node.lineno, node.end_lineno, start, stop)
        found.append(Mutant(*place, text, what, imported))
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
            if isinstance(node, ast.keyword) and node.arg == "stacklevel":
                continue  # of a warning: which line it names
            if name not in ("annotation", "returns", "decorator_list", "type_comment"):
                todo += [v for v in (value if isinstance(value, list) else [value])
                         if isinstance(v, ast.AST)]  # fmt: skip
        yield from _of(node)


def _of(node: Any) -> Iterator[tuple[Any, ast.AST]]:
    copy = deepcopy(node)
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
            if keyword.arg not in (None, "stacklevel"):
                fewer = deepcopy(node)
                del fewer.keywords[index]
                yield node, fewer
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, ast.Name):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield node, ast.Pass()
