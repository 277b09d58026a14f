"""Compile every kernel ahead of time, without a GPU, and say what the machine code needs.

    python -m fastdpo_kernels.triton.compile [--arch 80 90 100] [--json]

prints registers, spilled bytes, shared memory and the tensor-core instruction of each configuration
that can be selected. To add an architecture: add its entry to `configs.TABLE` and its limit to
`SHARED_LIMIT`, run this, and keep what spills nothing and fits.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import exponential, score
from .configs import TABLE, Config

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that a program may have, by architecture."""
TENSOR_CORE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
"""PTX that multiplies 16-bit operands (HMMA, HGMMA, UTCHMMA of the machine code); fp32 may take an
older one."""

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_POINTERS = {"targets": "i64", "partial": "fp32", "anchor": "fp32", "logprob": "fp32"}
_FLOATS = ("scale", "softcap", "inv_temperature", "clamp")


@dataclass(frozen=True)
class Case:
    """One kernel with one configuration and one set of compile-time options."""

    kernel: Any
    arch: int
    dtype: torch.dtype
    config: Config
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """What to call it in a table."""
        kind, cut = _TYPES[self.dtype], self.config
        shape = f"{cut.block_t}x{cut.block_v}x{cut.block_h} {cut.warps}w {cut.stages}s"
        marks = [name.lower() for name, value in self.options if value is True]
        return f"sm_{self.arch} {self.kernel.__name__} {kind} {shape} {' '.join(marks)}".strip()


@dataclass(frozen=True)
class Resources:
    """What the machine code of a case needs."""

    registers: int
    spilled: int
    shared: int
    tensor_core: str


def cases(arch: int) -> Iterator[Case]:
    """Every kernel that computes logits in every configuration of an architecture, with none and
    with all of the options that its family is meant for.
    """
    kernels = (score.score_kernel, exponential.exponential_kernel, exponential.again_kernel)
    seen = set()
    for (kind, configs), kernel in itertools.product(TABLE[arch].items(), kernels):
        if kernel is exponential.again_kernel and kind not in ("pointers", "float32", "columns"):
            continue
        dtypes = [] if kind == "float32" else [torch.bfloat16, torch.float16]
        dtypes += [torch.float32] if kind in ("float32", "columns") else []
        for config, dtype in itertools.product(configs, dtypes):
            possible = _POSSIBLE[kind]
            if kernel is score.score_kernel and possible is _PLAIN:
                possible = frozenset()
            for flags in dict.fromkeys((possible & {"TRANSPOSED"}, possible)):
                options = tuple(_options(kernel, config, dtype, flags))
                case = Case(kernel, arch, dtype, config, options)
                if case.name not in seen and (flags == possible or dtype != torch.float16):
                    seen.add(case.name)
                    yield case


_PLAIN = frozenset({"HAS_ENTROPY", "HAS_MEAN", "HAS_TOP1"})
_RICH = _PLAIN | {"HAS_BIAS", "HAS_SOFTCAP", "HAS_SQUARES"}
_POSSIBLE = {"narrow": _PLAIN, "wide": _PLAIN, "rich": _RICH, "pointers": _RICH, "float32": _RICH}
_POSSIBLE["columns"] = _RICH | {"TRANSPOSED"}


def _options(
    kernel: Any, config: Config, dtype: torch.dtype, flags: frozenset[str]
) -> Iterator[tuple[str, Any]]:
    """Values of a kernel's compile-time parameters."""
    fixed = {
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_H": config.block_h,
        "WHOLE_H": config.descriptors or not flags,
        "DESCRIPTORS": config.descriptors,
        "PERSISTENT": config.persistent,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        "GROUP": 16,
        "SUMS": dtype != torch.float16,
    }
    for name in kernel.arg_names:
        if name.isupper():
            yield name, fixed.get(name, name in flags)


def compile_case(case: Case) -> Resources:
    """Compile to machine code and read off what it needs."""
    options = dict(case.options)
    signature, attributes = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        signature[name] = _type(name, case, options)
        aligned = signature[name].startswith("*") or name in ("width", "stride_x", "stride_w")
        if aligned or name == "stride_tile":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constexprs=options, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": case.config.warps, "num_stages": case.config.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
    products = re.findall(r"\b(mma\.sync|wgmma(?=\.mma)|tcgen05\.mma)\b", compiled.asm["ptx"])
    return Resources(
        registers=numbers["REG"],
        spilled=numbers["STACK"] + numbers["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_core=max(set(products), key=products.count, default=""),
    )


def _type(name: str, case: Case, options: dict[str, Any]) -> str:
    if name in options:
        return "constexpr"
    operand, config = _TYPES[case.dtype], case.config
    if name in ("x", "w") and options["DESCRIPTORS"]:
        block = config.block_t if name == "x" else config.block_v
        return f"tensordesc<{operand}[{block},{config.block_h}]>"
    if name == "tile" and options["DESCRIPTORS"]:
        return f"tensordesc<{operand}[{config.block_t},{config.block_v}]>"
    if name in ("x", "w", "bias", "tile"):
        return f"*{operand}"
    if name in _POINTERS:
        return f"*{_POINTERS[name]}"
    return "fp32" if name in _FLOATS else "i32"


def _cuobjdump(*arguments: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for case in itertools.chain.from_iterable(cases(arch) for arch in options.arch):
        resources = compile_case(case)
        if options.json:
            row = {"case": case.name, "arch": case.arch, **asdict(resources)}
            print(json.dumps({**row, "dtype": _TYPES[case.dtype]}), flush=True)
            continue
        print(
            f"{resources.registers:4d} registers {resources.spilled:5d} spilled"
            f" {resources.shared / 1024:6.1f} KiB {resources.tensor_core:11s} {case.name}",
            flush=True,
        )


if __name__ == "__main__":
    main()
