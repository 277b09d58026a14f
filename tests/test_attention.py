"""Attention over packed rows: every backend against attention written out from its definition."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import GROUPS, pack, random_groups
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdpo.data.segments import Segments, gather_keys
from fastdpo.errors import ModelError
from fastdpo.model import backends
from fastdpo.model.attention import NAME, attention, register
from fastdpo.model.backends import choose_backend

MODULE = torch.nn.Identity()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def qkv(
    length: int, heads: int = 4, kv_heads: int = 2, size: int = 8, value_size: int = 8
) -> list[Tensor]:
    """Random fp64 query, key, value of one row, as layers hand them over (views of (S, H, D))."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((heads, size), (kv_heads, size), (kv_heads, value_size))
    tensors = [torch.randn(1, length, *s, generator=generator, dtype=torch.float64) for s in shapes]
    return [t.transpose(1, 2).requires_grad_() for t in tensors]


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """(1, S, Hq, Dv): softmax over the seen keys, head by head, in the inputs' dtype."""
    heads = []
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        scores = q[0, head] @ k[0, kv_head].T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp() * seen
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks[head].exp()
        heads.append(weights / total @ v[0, kv_head])
    return torch.stack(heads, dim=1)[None]


def assert_same(out: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Equal outputs, and equal gradients of a random projection, to fp64 rounding."""
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    weight = torch.randn(
        expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(0)
    )
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


FEATURES = {
    "plain": {},
    "one head each": {"kv_heads": 4},
    "one kv head": {"kv_heads": 1},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window wider than all": {"window": 500},
    "softcap": {"softcap": 0.7},
    "softcap and window": {"softcap": 0.7, "window": 4},
    "sinks and window": {"sinks": True, "window": 4},
    "small values": {"value_size": 6},
}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "packed"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_sdpa_by_segments_is_attention(features: dict[str, Any], share: bool) -> None:
    row = pack(GROUPS, share=share)
    q, k, v = qkv(
        len(row.ids), 4, features.get("kv_heads", 2), value_size=features.get("value_size", 8)
    )
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    sinks_or_none = sinks if features.get("sinks") else None
    window, softcap = features.get("window"), features.get("softcap")
    out, weights = attention(
        MODULE,
        q,
        k,
        v,
        None,
        scaling=0.4,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks_or_none,
        fastdpo_segments=Segments.build(row.bounds),
    )
    assert weights is None
    expected = by_definition(q, k, v, row.seen(window), 0.4, softcap, sinks_or_none)
    assert_same(out, expected, [q, k, v] + ([sinks] if features.get("sinks") else []))


def test_heads_are_repeated_where_no_kernel_reads_them_grouped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "reads_grouped_heads", lambda _: False)
    row = pack(GROUPS, share=True)
    q, k, v = qkv(len(row.ids))
    out, _ = attention(MODULE, q, k, v, None, fastdpo_segments=Segments.build(row.bounds))
    assert_same(out, by_definition(q, k, v, row.seen(), 8**-0.5), [q, k, v])


def test_default_scaling_is_the_head_size() -> None:
    row = pack(GROUPS, share=True)
    q, k, v = qkv(len(row.ids))
    out, _ = attention(MODULE, q, k, v, None, fastdpo_segments=Segments.build(row.bounds))
    assert_same(out, by_definition(q, k, v, row.seen(), 8**-0.5), [q, k, v])


def naive_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: tuple[int, int],
    softcap: float | None = None,
) -> Tensor:
    """What the flash kernels promise: q (S, Hq, D), gathered k and v (T, Hkv, D), bottom-right."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max() and window[1] == 0
    outputs = []
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1), cu_k.unfold(0, 2, 1), strict=True):
        queries = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        distance = queries - torch.arange(d - c)
        seen = distance >= 0
        if window[0] >= 0:
            seen &= distance <= window[0]
        pieces = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        outputs.append(by_definition(*pieces, seen, scale, softcap)[0])
    return torch.cat(outputs)


def new_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn as of torch 2.13."""
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    return naive_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size)


def old_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """The same as of torch 2.11, which takes grouped heads as they are."""
    return naive_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "packed"])
@pytest.mark.parametrize("window", [None, 3, 500])
@pytest.mark.parametrize("sizes", [(8, 8), (10, 6)], ids=["same sizes", "padded sizes"])
@pytest.mark.parametrize("signature", [new_varlen, old_varlen])
def test_varlen_equals_segments(
    monkeypatch: pytest.MonkeyPatch,
    signature: Any,
    sizes: tuple[int, int],
    window: int | None,
    share: bool,
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", signature)
    monkeypatch.setattr(
        "fastdpo.model.attention.choose_backend", lambda *_, **__: backends.Backend("varlen", "")
    )
    row = pack(GROUPS, share=share)
    q, k, v = qkv(len(row.ids), size=sizes[0], value_size=sizes[1])
    segments = Segments.build(row.bounds)
    out, _ = attention(
        MODULE, q, k, v, None, scaling=0.3, sliding_window=window, fastdpo_segments=segments
    )
    expected = backends.by_segments(backends.Call(q, k, v, segments, 0.3, window, None, None))
    assert_same(out, expected, [q, k, v])


def test_flash_attn_package_gets_the_soft_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_q,
        cu_k,
        max_q,
        max_k,
        *,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
    ):
        assert causal and not deterministic
        return naive_varlen(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, window_size, softcap)

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(
        "fastdpo.model.attention.choose_backend",
        lambda *_, **__: backends.Backend("flash_attn", ""),
    )
    row = pack(GROUPS, share=True)
    q, k, v = qkv(len(row.ids))
    segments = Segments.build(row.bounds)
    out, _ = attention(
        MODULE, q, k, v, None, sliding_window=4, softcap=0.7, fastdpo_segments=segments
    )
    assert_same(out, by_definition(q, k, v, row.seen(4), 8**-0.5, 0.7), [q, k, v])


def test_gather_backward_adds_every_copy() -> None:
    segments = Segments.build(pack(GROUPS, share=True).bounds)
    x = torch.randn(segments.length, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_keys(x, segments), x)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        gathered = gather_keys(x, segments)
    assert saved == [] and len(gathered) == sum(segments.key_lengths)
    for stream, keys in segments.copies:
        assert len(stream.unique()) == len(stream) == len(keys)


def test_nothing_is_gathered_without_prefixes() -> None:
    segments = Segments.build(pack(GROUPS, share=False).bounds)
    x = torch.randn(segments.length, 2, 3)
    assert gather_keys(x, segments) is x and segments.kv_index is None and segments.copies == ()


def test_index_tensors_say_what_the_bounds_say() -> None:
    row = pack(random_groups([(3, [2, 1, 4]), (2, [1]), (4, [2, 2])]), share=True)
    segments = Segments.build(row.bounds)
    expected = [i for a, b, c, d in row.bounds for i in (*range(c, d), *range(a, b))]
    assert segments.kv_index is not None and segments.own_index is not None
    assert segments.kv_index.tolist() == expected
    assert segments.kv_index[segments.own_index].tolist() == list(range(segments.length))
    assert segments.cu_seqlens_q.tolist() == [0, 5, 6, 10, 13, 19, 21]
    assert segments.cu_seqlens_k.tolist() == [0, 5, 9, 16, 19, 25, 31]
    assert (segments.max_seqlen_q, segments.max_seqlen_k) == (6, 7)
    assert len(segments.copies) == 2


@pytest.mark.parametrize(
    "bounds",
    [
        [],
        [(1, 3, 0, 0)],
        [(0, 3, 0, 0), (4, 5, 0, 2)],
        [(0, 3, 0, 0), (3, 3, 0, 2)],
        [(0, 3, 0, 0), (3, 5, 2, 1)],
        [(0, 3, 0, 0), (3, 5, 2, 4)],
        [(0, 3, 0, 0), (3, 5, -1, 2)],
    ],
)
def test_bounds_that_do_not_tile_the_row(bounds: list[tuple[int, int, int, int]]) -> None:
    with pytest.raises(ValueError, match="segments"):
        Segments.build(bounds)


def test_segments_move_once() -> None:
    segments = Segments.build([(0, 4, 0, 0), (4, 6, 0, 2)])
    assert segments.to("cpu") is segments
    moved = segments.to("meta")
    assert moved is segments.to("meta") and moved.kv_index is not None
    assert moved.kv_index.device.type == moved.copies[0][0].device.type == "meta"
    assert moved.bounds == segments.bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("window", [None, 3])
def test_the_cpu_flash_kernel_runs(dtype: torch.dtype, window: int | None) -> None:
    """Grouped heads, prefixes, windows and small values must not fall to the math path."""
    row = pack(GROUPS, share=True)
    q, k, v = (x.detach().to(dtype) for x in qkv(len(row.ids), value_size=6))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        out, _ = attention(
            MODULE,
            q,
            k,
            v,
            None,
            sliding_window=window,
            fastdpo_segments=Segments.build(row.bounds),
        )
    assert out.shape == (1, len(row.ids), 4, 6) and out.dtype == dtype


def test_masks_exist_only_where_needed_and_once() -> None:
    row = pack(GROUPS, share=False)
    segments = Segments.build(row.bounds)
    q, k, v = qkv(len(row.ids))
    attention(MODULE, q, k, v, None, fastdpo_segments=segments)
    assert segments.cache == {}
    attention(MODULE, q, k, v, None, sliding_window=3, fastdpo_segments=segments)
    before = dict(segments.cache)
    assert before
    attention(MODULE, q, k, v, None, sliding_window=3, fastdpo_segments=segments)
    assert all(segments.cache[name] is mask for name, mask in before.items())
    assert len(segments.cache) == len(before)


def test_autocast_gives_one_dtype_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    row = pack(GROUPS, share=True)
    q, k, v = (x.detach().float() for x in qkv(len(row.ids)))
    segments = Segments.build(row.bounds)
    asked: list[torch.dtype] = []

    def note(device: torch.device, dtype: torch.dtype, **features: Any) -> backends.Backend:
        asked.append(dtype)
        return choose_backend(device, dtype, **features)

    monkeypatch.setattr("fastdpo.model.attention.choose_backend", note)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention(MODULE, q, k, v.bfloat16(), None, fastdpo_segments=segments)
    plain, _ = attention(
        MODULE, *(x.bfloat16() for x in (q, k, v)), None, fastdpo_segments=segments
    )
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain)
    assert asked == [torch.bfloat16, torch.bfloat16]


BACKENDS = [
    (CPU, torch.bfloat16, {}, "sdpa", "cpu"),
    (CUDA, torch.float32, {}, "sdpa", "float32"),
    (CUDA, torch.bfloat16, {}, "varlen", "varlen"),
    (CUDA, torch.float16, {"head_dim": 256}, "varlen", "varlen"),
    (CUDA, torch.bfloat16, {"head_dim": 512}, "sdpa", "512"),
    (CUDA, torch.bfloat16, {"sinks": True}, "flex", "sinks"),
    (CUDA, torch.bfloat16, {"softcap": True}, "flex", "flash-attn is not installed"),
    (CUDA, torch.bfloat16, {"softcap": True, "head_dim": 512}, "sdpa", "512"),
    (CUDA, torch.bfloat16, {"wanted": "sdpa"}, "sdpa", "asks"),
    (CUDA, torch.bfloat16, {"wanted": "flex"}, "flex", "asks"),
    (CPU, torch.float32, {"wanted": "sdpa", "softcap": True}, "sdpa", "asks"),
]


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if there were a Hopper GPU, and no flash-attn."""
    choose_backend.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    yield monkeypatch
    choose_backend.cache_clear()


@pytest.mark.parametrize(("device", "dtype", "features", "name", "reason"), BACKENDS)
def test_choose_backend(
    on_hopper: pytest.MonkeyPatch,
    device: torch.device,
    dtype: torch.dtype,
    features: dict[str, Any],
    name: str,
    reason: str,
) -> None:
    backend = choose_backend(device, dtype, **features)
    assert backend.name == name and reason in backend.reason


def test_choose_backend_on_an_older_gpu(on_hopper: pytest.MonkeyPatch) -> None:
    on_hopper.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    backend = choose_backend(CUDA, torch.bfloat16)
    assert backend.name == "sdpa" and "capability" in backend.reason


def test_choose_backend_with_flash_attn(on_hopper: pytest.MonkeyPatch) -> None:
    on_hopper.setattr("importlib.util.find_spec", lambda _: object())
    assert choose_backend(CUDA, torch.bfloat16, softcap=True).name == "flash_attn"


@pytest.mark.parametrize(
    ("wanted", "features", "why"),
    [
        ("varlen", {"softcap": True}, "no soft cap"),
        ("flash_attn_3", {"sinks": True}, "no attention sinks"),
        ("flash_attn", {}, "not installed"),
        ("flex", {"head_dim": 512}, "512"),
    ],
)
def test_a_backend_that_cannot_be_had_is_an_error(
    on_hopper: pytest.MonkeyPatch, wanted: str, features: dict[str, Any], why: str
) -> None:
    with pytest.raises(ModelError, match=f"attention_backend: {wanted} cannot be used: .*{why}"):
        choose_backend(CUDA, torch.float16, wanted=wanted, **features)
    with pytest.raises(ModelError, match="cpu has no varlen kernel"):
        choose_backend(CPU, torch.float32, wanted=wanted)


def test_the_wanted_backend_reaches_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    activated: list[str] = []
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", activated.append)
    monkeypatch.setattr("torch.nn.attention.restore_flash_attention_impl", activated.clear)
    row = pack(GROUPS, share=True)
    inputs = (*qkv(len(row.ids)), None)
    try:
        register("flash_attn_3")
        register("flash_attn_3")
        assert activated == ["FA3"]
        with pytest.raises(ModelError, match="flash_attn_3 cannot be used: cpu"):
            ALL_ATTENTION_FUNCTIONS[NAME](
                MODULE, *inputs, fastdpo_segments=Segments.build(row.bounds)
            )
    finally:
        register()
    assert activated == []
    ALL_ATTENTION_FUNCTIONS[NAME](MODULE, *inputs, fastdpo_segments=Segments.build(row.bounds))


def test_flash_attention_3_that_is_not_installed() -> None:
    with pytest.raises(ModelError, match="attention_backend: flash_attn_3 is not installed"):
        register("flash_attn_3")


def bidirectional() -> torch.nn.Module:
    module = torch.nn.Identity()
    module.is_causal = False  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    ("module", "mask", "extra", "message"),
    [
        (MODULE, None, {"fastdpo_segments": None}, "without fastdpo_segments"),
        (MODULE, torch.ones(1, 1, 5, 5), {}, "without an attention mask"),
        (MODULE, None, {"position_bias": torch.ones(1)}, "without a position bias"),
        (MODULE, None, {"is_causal": False}, "causal"),
        (bidirectional(), None, {}, "causal"),
        (MODULE, None, {"dropout": 0.1}, "dropout 0 in packed rows, got 0.1"),
        (MODULE, None, {"fastdpo_segments": Segments.build([(0, 4, 0, 0)])}, "one row of 4 tokens"),
    ],
)
def test_what_packed_rows_cannot_honour(
    module: torch.nn.Module, mask: Tensor | None, extra: dict[str, Any], message: str
) -> None:
    q, k, v = qkv(5)
    arguments: dict[str, Any] = {"fastdpo_segments": Segments.build([(0, 5, 0, 0)])} | extra
    with pytest.raises(ModelError, match=message):
        attention(module, q, k, v, mask, **arguments)


def test_a_batch_is_refused() -> None:
    q, k, v = (x.expand(2, -1, -1, -1) for x in qkv(5))
    with pytest.raises(ModelError, match="one row"):
        attention(MODULE, q, k, v, None, fastdpo_segments=Segments.build([(0, 5, 0, 0)]))


def test_registered_without_a_mask() -> None:
    register()
    register()
    assert ALL_ATTENTION_FUNCTIONS[NAME] is attention
    assert NAME not in ALL_MASK_ATTENTION_FUNCTIONS
