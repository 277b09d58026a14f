"""What the pages show of kernels compiled ahead of time: registers, spills, shared memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from .rows import Row, read
from .tables import NOTHING, markdown

_OF = {
    "sm_80": "A100",
    "sm_86": "RTX 30, A40",
    "sm_89": "RTX 40, L4, L40S",
    "sm_90": "H100, H200, GH200",
    "sm_100": "B200, GB200",
    "sm_103": "B300, GB300",
    "sm_120": "RTX 50, RTX PRO",
    "gfx942": "MI300",
    "gfx950": "MI350",
    "gfx1100": "RX 7900",
    "gfx1201": "RX 9070",
}
_SMALL = ("anchor", "merge", "finish", "response_sums", "coefficients")
"""Kernels that multiply no blocks."""


def cards_block(folder: Path) -> str:
    """A card a line, then the kernels and blocks of each."""
    rows = read(folder, "cards.jsonl")
    if not rows:
        return NOTHING
    cards = list(dict.fromkeys(row["card"] for row in rows))
    about = dict.fromkeys(
        f"torch {row['torch']}, triton {row['triton']}, {row['date']}: `make cards`" for row in rows
    )
    columns = (
        "card",
        "of",
        "16-bit products",
        "fp32 products",
        "variants",
        "registers, most",
        "bytes spilled",
        "shared memory, most KiB",
    )
    overview = markdown(columns, (_overview(card, rows) for card in cards), 4)
    details = [text for card in cards for text in (f"## {card}", _details(card, rows))]
    return "\n\n".join([overview, *about, *details])


def _overview(card: str, rows: Iterable[Row]) -> list[str]:
    own = [row for row in rows if row["card"] == card]
    return [
        f"`{card}`",
        _OF.get(card, ""),
        _instructions(row for row in own if row["dtype"] != "fp32"),
        _instructions(row for row in own if row["dtype"] == "fp32"),
        str(len(own)),
        str(max(row["registers"] for row in own)),
        str(max(row["spilled"] for row in own)),
        _kib(own),
    ]


def _details(card: str, rows: Iterable[Row]) -> str:
    """A line for each kernel, dtype and block."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["card"] == card:
            dtype = "" if row["kernel"] in _SMALL else row["dtype"]
            groups.setdefault((row["kernel"], row["block"], dtype), []).append(row)
    columns = (
        "kernel",
        "tokens × columns × hidden",
        "dtype",
        "variants",
        "registers",
        "bytes spilled",
        "shared KiB",
    )
    return markdown(columns, _lines(groups), 3)


def _lines(groups: dict[tuple[str, str, str], list[Row]]) -> Iterator[list[str]]:
    for (kernel, block, dtype), group in groups.items():
        registers = [row["registers"] for row in group]
        least, most = min(registers), max(registers)
        yield [
            f"`{kernel}`",
            block,
            dtype,
            str(len(group)),
            str(most) if least == most else f"{least}–{most}",
            str(max(row["spilled"] for row in group)),
            _kib(group),
        ]


def _kib(rows: Iterable[Row]) -> str:
    return f"{max(row['shared'] for row in rows) / 1024:.1f}"


def _instructions(rows: Iterable[Row]) -> str:
    """What products are made with; fused multiply-adds have no name of their own."""
    products = [row for row in rows if row["kernel"] not in _SMALL]
    names = sorted({row["instruction"] or "multiply-add" for row in products})
    return ", ".join(
        f"`{name}`" if "." in name or "_" in name or name == "wgmma" else name for name in names
    )
