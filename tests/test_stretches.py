"""A stretch of a row's queries, with the keys of all of it, is those rows of attention."""

from typing import Any

import pytest
import torch
from families import GROUPS, pack
from test_attention import FEATURES, assert_same, by_definition, new_varlen, qkv
from test_flex import LONG, dense_flex, visited

from fastdpo.data.segments import Segments
from fastdpo.model import flex as flex_module
from fastdpo.model.backends import Call, by_segments, varlen
from fastdpo.model.flex import BLOCK, block_mask, flex

CUTS = (0, 3, 9, 12, 13, 20, 21, 26)
"""In a prompt, in responses, between groups, and around one token."""
KERNELS = {"sdpa": by_segments, "varlen": varlen, "flex": flex}
SPECIAL = {"softcap", "sinks"}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "packed"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_stretches_make_the_row(
    features: dict[str, Any],
    kernel: str,
    share: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernel == "varlen":
        features = {name: value for name, value in features.items() if name not in SPECIAL}
    monkeypatch.setattr(flex_module, "compiled", lambda: dense_flex)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new_varlen)
    row = pack(GROUPS, share=share)
    length, window, softcap = len(row.ids), features.get("window"), features.get("softcap")
    sizes = {"value_size": features.get("value_size", 8)}
    q, k, v = qkv(length, 4, features.get("kv_heads", 2), **sizes)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    sinks_or_none = sinks if features.get("sinks") else None
    segments = Segments.build(row.bounds)
    outputs = []
    for start, end in zip(CUTS, [*CUTS[1:], length], strict=True):
        part = segments.stretch(start, end)
        call = Call(q[:, :, start:end], k, v, part, 0.4, window, softcap, sinks_or_none)
        outputs.append(KERNELS[kernel](call))
    expected = by_definition(q, k, v, row.seen(window), 0.4, softcap, sinks_or_none)
    leaves = [q, k, v] + ([sinks] if features.get("sinks") else [])
    assert_same(torch.cat(outputs, dim=1), expected, leaves)


@pytest.mark.parametrize("window", [None, 1, 200])
def test_blocks_of_a_stretch(window: int | None) -> None:
    row = pack(LONG, share=True)
    segments, seen = Segments.build(row.bounds), row.seen(window)
    length, cpu = len(row.ids), torch.device("cpu")
    for start, end in ((0, 300), (300, 301), (301, 900), (900, length)):
        mask = block_mask(segments.stretch(start, end), window, cpu, length)
        assert torch.equal(visited(mask, end - start, length), seen[start:end])
        blocks = [rows.split(BLOCK, dim=1) for rows in seen[start:end].split(BLOCK)]
        some = [sum(bool(block.any()) for block in line) for line in blocks]
        assert (mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0].tolist() == some


def test_rows_are_filled_up_and_cut_once() -> None:
    segments = Segments.build(pack(GROUPS, share=True).bounds)
    filled = segments.filled(41)
    assert filled.bounds == (*segments.bounds, (38, 41, 38, 38))
    assert segments.filled(38) is segments
    assert segments.filled(41) is filled
    assert segments.stretch(3, 9) is segments.stretch(3, 9)
