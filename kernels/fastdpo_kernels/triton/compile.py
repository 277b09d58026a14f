"""Compile every kernel ahead of time, without a GPU, and say what the machine code needs.

    python -m fastdpo_kernels.triton.compile [--card sm_90 gfx942] [--few] [--json FILE]

prints registers, spilled bytes, shared memory and the matrix instruction of each case of `cases`;
with --json FILE it writes a row a case instead. To add a card: add its entry to `configs.TABLE` and
its limits to `cases.CARDS`, run this, and keep what spills nothing and fits.
"""

import argparse
import ast
import datetime
import hashlib
import inspect
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import again, anchor, coefficients, exponential, finish, logits, score
from .cases import CARDS, KERNELS, Case, cases, few

_DOUBLES = ("logps", "ref_logps", "lengths", "weights", "loss", "coefficients")
_SINGLES = ("partial", "anchor", "entry", "peak", "log_share", "logprob", "results", "row_scale")
_INDICES = ("targets", "flagged", "response_ids", "comparisons")
_POINTERS = dict.fromkeys(_DOUBLES, "fp64") | dict.fromkeys(_SINGLES, "fp32")
_POINTERS |= dict.fromkeys(_INDICES, "i64")
_FLOATS = ("scale", "softcap", "inv_temperature", "clamp", "limit")
_PITCHES = ("width", "stride_x", "stride_w")
_PRODUCTS = re.compile(
    r"\b(mma\.sync|wgmma(?=\.mma)|tcgen05\.mma|v_s?(?:w?mfma|wmma)(?=_))", re.MULTILINE
)


@dataclass(frozen=True)
class Resources:
    """What the machine code of a case needs."""

    registers: int
    """A thread's; on AMD vector registers."""
    spilled: int
    """Bytes of a thread's that went to memory."""
    shared: int
    """Bytes of a program's shared memory."""
    instruction: str
    """What most products are made with; none where it is fused multiply-adds."""


def compile_case(case: Case) -> Resources:
    """Compile to machine code and read off what it needs."""
    kernel, options = KERNELS[case.kernel], dict(case.options)
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        signature[name] = _type(name, case, options)
        aligned = signature[name].startswith("*") or (name in _PITCHES and case.aligned)
        fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if (aligned or name == "stride_tile") and not fixed:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=options, attrs=attributes)
    launch = {} if case.config is None else case.config.launch
    compiled = triton.compile(source, target=_target(case.card), options=launch)
    if case.card.startswith("gfx"):
        return _amd(compiled)
    return _nvidia(compiled)


def _target(card: str) -> GPUTarget:
    if card.startswith("sm_"):
        return GPUTarget("cuda", int(card[3:]), 32)
    return GPUTarget("hip", card, 64 if card.startswith("gfx9") else 32)


def _nvidia(compiled: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
    return Resources(
        registers=numbers["REG"],
        spilled=numbers["STACK"] + numbers["LOCAL"],
        shared=compiled.metadata.shared,
        instruction=_instruction(compiled.asm["ptx"]),
    )


def _amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.M)}
    return Resources(
        registers=numbers["vgpr_count"],
        spilled=numbers["private_segment_fixed_size"] + 4 * numbers["vgpr_spill_count"],
        shared=compiled.metadata.shared,
        instruction=_instruction(text),
    )


def _instruction(text: str) -> str:
    found = Counter(_PRODUCTS.findall(text))
    return found.most_common(1)[0][0] if found else ""


def _type(name: str, case: Case, options: dict[str, Any]) -> str:
    if name in options:
        return "constexpr"
    config = case.config
    if config is not None and config.descriptors:
        blocks = {
            "x": (config.block_t, config.block_h),
            "w": (config.block_v, config.block_h),
            "tile": (config.block_t, config.block_v),
        }
        if name in blocks and case.kernel != "again":
            rows, columns = blocks[name]
            return f"tensordesc<{case.dtype}[{rows},{columns}]>"
    if name in ("x", "w", "bias", "tile"):
        return f"*{case.dtype}"
    if name in _POINTERS:
        return f"*{_POINTERS[name]}"
    return "fp32" if name in _FLOATS else "i32"


def sources(kernel: str) -> str:
    """12 hex digits of what is compiled for a kernel, whatever its comments and docstrings say: its
    function and those that it calls.
    """
    functions: dict[str, ast.FunctionDef] = {}
    for module in (again, anchor, coefficients, exponential, finish, logits, score):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                node.body = node.body[ast.get_docstring(node) is not None :]
                functions[node.name] = node
    reached: set[str] = set()
    todo = [KERNELS[kernel].fn.__name__]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            used = {n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)}
            todo += used & functions.keys()
    texts = [ast.unparse(functions[name]) for name in sorted(reached)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def identity(case: Case) -> dict[str, Any]:
    """What a row says of a case before anything is compiled."""
    return {
        "card": case.card,
        "kernel": case.kernel,
        "dtype": case.dtype,
        "block": case.block,
        "flags": " ".join(case.flags),
    }


def row(case: Case) -> dict[str, Any]:
    """`identity` and `Resources` of a case."""
    return {**identity(case), **asdict(compile_case(case))}


def rows(chosen: Sequence[Case], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows of cases in their order, compiled by so many processes."""
    if jobs == 1:
        yield from map(row, chosen)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        yield from pool.map(row, chosen, chunksize=4)


def main() -> None:
    """Print one line a case, or write the rows and print what spills or does not fit. Rows that the
    file has of the same sources and versions stay.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", nargs="+", default=list(CARDS), choices=list(CARDS))
    parser.add_argument("--few", action="store_true", help="some seconds' worth a card")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a line")
    options = parser.parse_args()
    select = few if options.few else cases
    chosen = [case for card in options.card for case in select(card)]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    known = {} if options.json is None else _known(options.json, versions)
    new = [case for case in chosen if _key(identity(case)) not in known]
    made = rows(new, options.jobs)
    file = None if options.json is None else options.json.open("w", encoding="utf-8")
    for case in chosen:
        found = known.get(_key(identity(case)))
        if found is None:
            about = {"date": datetime.date.today().isoformat(), "sources": sources(case.kernel)}
            found = {**next(made), **versions, **about}
        if file is not None:
            print(json.dumps(found, ensure_ascii=False), file=file, flush=True)
        if file is None or found["spilled"] or found["shared"] > CARDS[found["card"]].shared << 10:
            print(_line(found), flush=True)


def _key(found: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(found[name]) for name in ("card", "kernel", "dtype", "block", "flags"))


def _known(path: Path, versions: dict[str, str]) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of a file that would come out again."""
    if not path.exists():
        return {}
    current = {kernel: sources(kernel) for kernel in KERNELS}
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        _key(row): row
        for row in found
        if row["sources"] == current.get(row["kernel"]) and versions.items() <= row.items()
    }


def _line(found: dict[str, Any]) -> str:
    return (
        f"{found['registers']:4d} registers {found['spilled']:5d} spilled"
        f" {found['shared'] / 1024:6.1f} KiB {found['instruction']:11s} {found['card']}"
        f" {found['kernel']} {found['dtype']} {found['block']} {found['flags']}"
    )


if __name__ == "__main__":
    main()
