"""FlexAttention over packed rows: its blocks and its arithmetic against the definition.

FlexAttention has no backward on a CPU; there a dense function that reads the same block mask stands
in for its kernel. The kernel itself is tested on a GPU.
"""

from typing import Any

import pytest
import torch
from families import GROUPS, PackedRow, pack, random_groups
from test_attention import FEATURES, MODULE, assert_same, by_definition, qkv
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, create_mask, flex_attention

from fastdpo.data.segments import Segments
from fastdpo.model import flex as module
from fastdpo.model.attention import attention
from fastdpo.model.backends import Call
from fastdpo.model.flex import BLOCK, block_mask, flex

LONG = random_groups([(150, [40, 300]), (129, [1, 127, 128]), (1, [260])])
"""Prompts and responses that end before, on and after the edges of blocks."""


def dense_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: Any,
    block_mask: Any,
    scale: float,
    enable_gqa: bool,
    return_aux: Any,
) -> Any:
    """What FlexAttention computes, from the blocks that it would visit and no others."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if score_mod is not None:
        scores = score_mod(scores, None, None, None, None)
    seen = visited(block_mask, q.shape[2], k.shape[2])
    scores = scores.masked_fill(~seen, float("-inf"))
    out = scores.softmax(-1) @ v
    return (out, AuxOutput(lse=scores.logsumexp(-1))) if return_aux else out


def visited(mask: Any, queries: int, keys: int) -> Tensor:
    """(Q, K): whole blocks where they are full, the mask's own answer where they are partial."""
    exact = create_mask(mask.mask_mod, 1, 1, queries, keys, device="cpu")[0, 0]
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    lists = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for whole, (counts, indices) in zip((False, True), lists, strict=True):
        for q, count in enumerate(counts[0, 0].tolist()):
            rows = slice(q * BLOCK, (q + 1) * BLOCK)
            for k in indices[0, 0, q, :count].tolist():
                columns = slice(k * BLOCK, (k + 1) * BLOCK)
                seen[rows, columns] |= exact[rows, columns] | whole
    return seen


@pytest.mark.parametrize("share", [True, False], ids=["shared", "packed"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_flex_is_attention(
    features: dict[str, Any], share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "compiled", lambda: dense_flex)
    row = pack(GROUPS, share=share)
    sizes = {"value_size": features.get("value_size", 8)}
    q, k, v = qkv(len(row.ids), 4, features.get("kv_heads", 2), **sizes)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    sinks_or_none = sinks if features.get("sinks") else None
    window, softcap = features.get("window"), features.get("softcap")
    call = Call(q, k, v, Segments.build(row.bounds), 0.4, window, softcap, sinks_or_none)
    expected = by_definition(q, k, v, row.seen(window), 0.4, softcap, sinks_or_none)
    assert_same(flex(call), expected, [q, k, v] + ([sinks] if features.get("sinks") else []))


@pytest.mark.parametrize("window", [None, 1, 100, 128, 200, 5000])
@pytest.mark.parametrize("groups", [LONG, GROUPS, LONG[:1]], ids=["long", "short", "one group"])
def test_blocks_cover_what_is_seen_and_little_else(groups: Any, window: int | None) -> None:
    row = pack(groups, share=True)
    mask = block_mask(Segments.build(row.bounds), window, torch.device("cpu"))
    seen = row.seen(window)
    assert torch.equal(visited(mask, len(row.ids), len(row.ids)), seen)
    blocks = [rows.split(BLOCK, dim=1) for rows in seen.split(BLOCK)]
    some = [sum(bool(block.any()) for block in line) for line in blocks]
    full = [sum(bool(b.all()) and b.shape[1] == BLOCK for b in line) for line in blocks]
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0].tolist() == some
    assert mask.full_kv_num_blocks[0, 0].tolist() == full


def test_torchs_own_function_reads_the_mask() -> None:
    row = pack(LONG, share=True)
    q, k, v = (x.detach().float() for x in qkv(len(row.ids), size=16, value_size=16))
    mask = block_mask(Segments.build(row.bounds), 200, torch.device("cpu"))
    out = flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
    expected = by_definition(q, k, v, row.seen(200), 0.3)
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_is_made_once_a_row_and_window() -> None:
    segments, cpu = Segments.build(pack(GROUPS, share=True).bounds), torch.device("cpu")
    assert block_mask(segments, 3, cpu) is block_mask(segments, 3, cpu)
    assert block_mask(segments, None, cpu) is not block_mask(segments, 3, cpu)


GPU_ROWS = {"long": LONG, "one response": random_groups([(700, [900])]), "short": GROUPS}
GPU_CASES = [
    ("varlen", {}),
    ("varlen", {"window": 100}),
    ("varlen", {"kv_heads": 4}),
    ("varlen", {"value_size": 48}),
    ("flex", {}),
    ("flex", {"window": 100}),
    ("flex", {"softcap": 5.0, "window": 100}),
    ("flex", {"softcap": 5.0, "kv_heads": 1}),
    ("flex", {"sinks": True}),
    ("flash_attn", {"softcap": 5.0}),
    ("sdpa", {"softcap": 5.0, "window": 100}),
    ("sdpa", {}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("row", GPU_ROWS.values(), ids=GPU_ROWS.keys())
@pytest.mark.parametrize(
    ("backend", "features"), GPU_CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x)
)
def test_kernels_on_a_gpu(backend: str, features: dict[str, Any], row: Any) -> None:
    """bf16 kernels against fp64 by a dense mask: no further off than dense bf16 attention is."""
    packed: PackedRow = pack(row, share=True)
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    exact = qkv(len(packed.ids), 4, features.get("kv_heads", 2), 64, features.get("value_size", 64))
    exact = [x.detach().cuda().bfloat16().double().requires_grad_() for x in exact]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, device="cuda")
    sinks.requires_grad_()
    leaves = [*exact, *([sinks] if features.get("sinks") else [])]
    window, softcap = features.get("window"), features.get("softcap")
    seen = packed.seen(window).cuda()
    weight = torch.randn(1, len(packed.ids), 4, exact[2].shape[-1], device="cuda").double()

    def results(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad((out.double() * weight).sum(), inputs)
        return [out.detach().double(), *(g.double() for g in grads)]

    torch._dynamo.reset()  # each case compiles anew, none is refused for being one too many

    def halves() -> list[Tensor]:
        return [x.detach().bfloat16().requires_grad_() for x in leaves]

    def call(inputs: list[Tensor]) -> Tensor:
        return attention(
            MODULE,
            *inputs[:3],
            None,
            scaling=0.125,
            sliding_window=window,
            softcap=softcap,
            s_aux=inputs[3] if len(inputs) > 3 else None,
            fastdpo_segments=Segments.build(packed.bounds),
            backend=backend,
        )[0]

    def dense(inputs: list[Tensor]) -> Tensor:
        return by_definition(*inputs[:3], seen, 0.125, softcap, *inputs[3:])

    expected = results(dense(leaves), leaves)
    inputs = halves()
    ours = results(call(inputs), inputs)
    again = halves()
    repeated = results(call(again), again)
    plain = halves()
    rounded = results(dense(plain), plain)
    for mine, same, other, true in zip(ours, repeated, rounded, expected, strict=True):
        error = (mine - true).norm() / true.norm()
        assert error <= 1.5 * (other - true).norm() / true.norm() + 1e-3
        assert backend != "flex" or torch.equal(mine, same)  # flash kernels add with atomics
