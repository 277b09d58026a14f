"""Every kernel that can be launched, with every specialisation that a run can meet, by card.

The first candidate of a family is compiled with each of the family's options: each output alone,
none, all, those that TRL always asks for, a bias, a soft cap, hidden sizes that are no multiple of
a block; what serves where the first does not fit, and cards that share the table of an older one,
with the fewest and with the most of them. `compile` says what each needs of the hardware.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import again, anchor, coefficients, exponential, finish, score
from .configs import TABLE, Config


class Card(NamedTuple):
    """What machine code is made for, and what it must not exceed."""

    table: str
    """The entry of `TABLE` that serves it."""
    shared: int
    """KiB of shared memory that a program may have."""
    instruction: str
    """What multiplies 16-bit operands, as PTX or AMD's assembler names it; fp32 may take others."""


CARDS = {
    "sm_80": Card("sm_80", 163, "mma.sync"),
    "sm_86": Card("sm_80", 99, "mma.sync"),
    "sm_89": Card("sm_80", 99, "mma.sync"),
    "sm_90": Card("sm_90", 227, "wgmma"),
    "sm_100": Card("sm_100", 227, "tcgen05.mma"),
    "sm_103": Card("sm_100", 227, "tcgen05.mma"),
    "sm_120": Card("sm_120", 99, "mma.sync"),
    "gfx942": Card("gfx942", 64, "v_mfma"),
    "gfx950": Card("gfx950", 160, "v_mfma"),
    "gfx1100": Card("gfx1100", 64, "v_wmma"),
    "gfx1201": Card("gfx1201", 64, "v_wmma"),
}
"""A100; RTX 30; RTX 40 and L40S; H100; B200; B300; RTX 50; MI300; MI350; RX 7900; RX 9070."""

KERNELS = {
    "score": score.score_kernel,
    "exponential": exponential.exponential_kernel,
    "again": again.again_kernel,
    "merge": score.merge_kernel,
    "finish": finish.finish_kernel,
    "anchor": anchor.anchor_kernel,
    "response_sums": coefficients.response_sums_kernel,
    "coefficients": coefficients.coefficients_kernel,
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_E, _M, _T, _S = _ALL = ("HAS_ENTROPY", "HAS_MEAN", "HAS_TOP1", "HAS_SQUARES")
_BIAS, _CAP = "HAS_BIAS", "HAS_SOFTCAP"
# H is no multiple of the block, or not even of 16, and pitches neither.
_TAIL, _ODD = "TAIL", "ODD"
Flags = tuple[str, ...]
_SUMS: tuple[Flags, ...] = ((_E,), (_M,), (_T,), (_S,), (_E, _M, _T), _ALL)
_ONE: tuple[Flags, ...] = (*_SUMS, (_BIAS,))
_MANY: tuple[Flags, ...] = (
    (_CAP,),
    (_CAP, _S),
    (_BIAS, _S),
    (_BIAS, _CAP),
    (_BIAS, _E, _M, _T),
    (_CAP, _E, _M, _T),
    (_BIAS, _CAP, *_ALL),
)
_FLAGS: dict[str, tuple[Flags, ...]] = {"narrow": ((),), "wide": ((),), "rich": _ONE, "full": _MANY}


@dataclass(frozen=True)
class Case:
    """One kernel for one card, with one configuration and one set of compile-time options."""

    card: str
    kernel: str
    dtype: str
    """Of the head: bf16, fp16 or fp32."""
    config: Config | None
    """None for the small kernels, which multiply no blocks."""
    options: tuple[tuple[str, Any], ...]
    """Values of the kernel's compile-time parameters."""
    aligned: bool = True
    """Whether hidden size and pitches are multiples of 16."""

    @property
    def block(self) -> str:
        """The configuration in one word."""
        return "" if self.config is None else self.config.name

    @property
    def flags(self) -> tuple[str, ...]:
        """What is on, in lower case, and what else is chosen."""
        chosen = [
            name.lower() if value is True else f"{name.lower()}={value}"
            for name, value in self.options
            if value is True or (name in ("PRECISION", "LOSS") and value != "ieee")
        ]
        return tuple(sorted(chosen if self.aligned else [*chosen, "odd pitches"]))


def cases(card: str) -> Iterator[Case]:
    """Every case of a card, each once, the heaviest of a kernel first."""
    seen = set()
    for case in (*_products(card), *_small(card)):
        if case not in seen:
            seen.add(case)
            yield case


def few(card: str) -> Iterator[Case]:
    """Some seconds' worth: each kernel, with the first candidate and the most options."""
    table = TABLE[CARDS[card].table]
    most = frozenset((_BIAS, _CAP, *_ALL))
    yield _case(card, "exponential", "bf16", table["wide"][0], frozenset({"SUMS"}))
    yield _case(card, "exponential", "bf16", table["rich"][0], frozenset({_E, _M, _T, "SUMS"}))
    yield _case(card, "exponential", "bf16", table["full"][0], most | {"SUMS"})
    yield _case(card, "score", "fp32", table["float32"][0], most)
    yield _case(card, "again", "fp16", table["pointers"][0], most | {_TAIL, _ODD})
    yield from {case.kernel: case for case in _small(card)}.values()


def _products(card: str) -> Iterator[Case]:
    """The kernels that multiply blocks."""
    table = CARDS[card].table
    oldest = next(name for name in CARDS if CARDS[name].table == table) == card
    for kind, family in TABLE[table].items():
        sets = _FLAGS.get(kind, ((), *_ONE, *_MANY))
        for place, config in enumerate(family):
            for dtype in _dtypes(kind):
                whole = (
                    oldest and place == 0 and dtype in ("bf16", "fp32") and (kind, dtype) != _COPIED
                )
                yield from _family(card, kind, dtype, config, sets if whole else _ends(sets))


_COPIED = ("columns", "fp32")
"""Fewer options, as the family has been compiled with all of them in bf16."""


def _dtypes(kind: str) -> tuple[str, ...]:
    return {"float32": ("fp32",), "columns": ("bf16", "fp16", "fp32")}.get(kind, ("bf16", "fp16"))


def _ends(sets: tuple[Flags, ...]) -> tuple[Flags, ...]:
    """The fewest and the most options."""
    return tuple(dict.fromkeys((sets[0], max(sets, key=lambda flags: len(flags)))))


def _family(
    card: str, kind: str, dtype: str, config: Config, sets: tuple[Flags, ...]
) -> Iterator[Case]:
    """What one candidate of a family is launched with."""
    layout = frozenset({"TRANSPOSED"} if kind == "columns" else ())
    heads = {tuple(f for f in flags if f in (_BIAS, _CAP)) for flags in sets}
    heads -= {()} if kind == "rich" else set()  # nothing is asked for: "narrow" or "wide"
    for flags in map(frozenset, sets):
        if dtype != "fp16":  # which ends at exp(11): a softmax is written instead
            yield _case(card, "exponential", dtype, config, layout | flags | {"SUMS"})
        if kind != "rich" or flags != {_T}:  # the highest logit is known under a running maximum
            yield _case(card, "score", dtype, config, layout | flags)
    for flags in map(frozenset, sorted(heads)):
        yield _case(card, "exponential", dtype, config, layout | flags)
        if kind in ("pointers", "float32", "columns"):
            yield _case(card, "again", dtype, config, layout | flags)
    if not config.descriptors:
        most = layout | frozenset(_ends(sets)[-1]) | {_TAIL}
        if kind in ("pointers", "float32", "columns"):
            most |= {_ODD}
            yield _case(card, "again", dtype, config, most)
        if dtype != "fp16":
            yield _case(card, "exponential", dtype, config, most | {"SUMS"})
        yield _case(card, "exponential", dtype, config, most)
        yield _case(card, "score", dtype, config, most)
    if dtype == "fp32" and card.startswith("sm_"):
        tf32 = layout | frozenset(_ends(sets)[-1]) | {"TF32"}
        yield _case(card, "exponential", dtype, config, tf32 | {"SUMS"})
        yield _case(card, "score", dtype, config, tf32)


def _case(
    card: str, kernel: str, dtype: str, config: Config | None, flags: frozenset[str], **fixed: Any
) -> Case:
    precision = "ieee"
    if dtype == "fp32" and card.startswith("sm_"):
        precision = "tf32" if "TF32" in flags else "tf32x3"
    values: dict[str, Any] = {"PRECISION": precision, "WHOLE_H": _TAIL not in flags, **fixed}
    if config is not None:
        values |= {
            "BLOCK_T": config.block_t,
            "BLOCK_V": config.block_v,
            "BLOCK_H": config.block_h,
            "DESCRIPTORS": config.descriptors,
            "PERSISTENT": config.persistent,
            "GROUP": exponential.GROUP,
        }
    if kernel == "exponential" and "SUMS" not in flags:
        flags = flags - set(_ALL)
    names = [name for name in KERNELS[kernel].arg_names if name.isupper()]
    options = tuple((name, values.get(name, name in flags)) for name in names)
    return Case(card, kernel, dtype, config, options, _ODD not in flags)


def _small(card: str) -> Iterator[Case]:
    """What comes before and after a product, and the coefficients; the heaviest last."""
    flags: Flags
    block: dict[str, Any] = {"BLOCK_T": anchor._BLOCK_T, "BLOCK_H": 256}
    for dtype in DTYPES:
        for layout in ((), ("TRANSPOSED",)):
            for flags in ((), (_BIAS,), (_CAP,), (_BIAS, _CAP)):
                yield _case(card, "anchor", dtype, None, frozenset(layout + flags), **block)
    block = {"BLOCK_T": score._MERGED, "BLOCK_S": 32}
    for flags in ((), (_E,), (_M,), (_S,), (_E, _M), _ALL):
        yield _case(card, "merge", "fp32", None, frozenset(flags), **block)
    block = {"BLOCK_T": finish._MERGED, "BLOCK_S": 32}
    for dtype in ("bf16", "fp32"):
        for flags in ((), *_SUMS, (_CAP,), (_CAP, *_ALL)):
            yield _case(card, "finish", dtype, None, frozenset(flags), **block)
    block = {"BLOCK": coefficients._BLOCK}
    yield _case(card, "response_sums", "fp32", None, frozenset(), **block)
    for number in coefficients.DERIVATIVES.values():
        settings = {**block, "BETA": 0.1, "SMOOTHING": 0.125, "LOSS": number}
        yield _case(card, "coefficients", "fp32", None, frozenset(), **settings)
