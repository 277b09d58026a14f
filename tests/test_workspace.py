"""The bytes that kernels say their tiles take, beside those that are allocated."""

import gc
import weakref
from unittest import mock

import pytest
import torch
from fastdpo_kernels import call, linear_logprob, linear_loss, tiles, workspace_bytes
from fastdpo_kernels.backends import make_tiles
from fastdpo_kernels.head import OUTPUTS, Head, default_workspace_mib, workspace_of
from fastdpo_kernels.sharded import call as sharded
from fastdpo_kernels.tiles import TorchLayout, release_workspace
from fastdpo_kernels.triton.layout import TritonLayout

from bench.heads.measure import peak_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16
SLACK = 0.04
"""Vectors of one number a token are not counted."""


def allocated(tokens, vocab, width, dtype, *, workspace_mib, outputs, softcap, backend):
    """Peak bytes of a call under a frozen head, without the widened weight and the gradient."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=g).to(dtype).requires_grad_()
    w = torch.randn(vocab, width, generator=g).to(dtype)
    y = torch.randint(vocab, (tokens,), generator=g)

    def call():
        return linear_logprob(
            x,
            w,
            y,
            softcap=5.0 if softcap else None,
            outputs=outputs,
            backend=backend,
            workspace_mib=workspace_mib,
        )

    call()  # what is made once, such as a probe of the host
    release_workspace()
    peak, _ = peak_bytes(call, CPU)
    release_workspace()
    widened = 4 * w.numel() if dtype.itemsize < 4 else 0
    return peak - widened - x.numel() * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("outputs", [(), ("entropy",), OUTPUTS], ids=len)
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("tokens", [90, 700])
def test_plain_pytorch_allocates_what_it_says(dtype, outputs, softcap, tokens):
    options = {"outputs": outputs, "softcap": softcap, "workspace_mib": 8, "backend": "torch"}
    said = sum(workspace_bytes(tokens, 4003, 160, dtype, CPU, **options))
    found = allocated(tokens, 4003, 160, dtype, **options)
    assert (1 - SLACK) * said <= found <= (1 + SLACK) * said


@pytest.mark.parametrize("tokens", [90, 700])
def test_a_weight_that_is_widened_for_every_product_is_counted(tokens, monkeypatch):
    """As on a GPU that gives no fp32 product of bf16."""
    monkeypatch.setattr(TorchLayout, "native", True)
    monkeypatch.setattr(tiles, "widens", lambda device, dtype: dtype == BF16)
    options = {"outputs": (), "softcap": False, "workspace_mib": 8, "backend": "torch"}
    said = sum(workspace_bytes(tokens, 4003, 160, BF16, CPU, **options))
    found = allocated(tokens, 4003, 160, BF16, **options) + 4 * 4003 * 160  # and not once
    assert (1 - SLACK) * said <= found <= (1 + SLACK) * said


@pytest.mark.parametrize("outputs", [(), ("entropy",), OUTPUTS], ids=len)
@pytest.mark.parametrize("tokens", [20, None], ids=str)
def test_the_fused_kernels_allocate_no_more_than_they_say(outputs, tokens):
    """Also for a full tile, whose sums are most of what is beside it. They compute in fp32 here:
    the interpreter's products of other dtypes copy their factors.
    """
    pytest.importorskip("triton")
    vocab, width = 1500, 64
    options = {"outputs": outputs, "softcap": False, "workspace_mib": 1, "backend": "triton"}
    if tokens is None:
        tokens = make_tiles("triton", Head(torch.zeros(vocab, width)), 1, outputs).rows
    tile, beside = workspace_bytes(tokens, vocab, width, FP32, CPU, **options)
    found = allocated(tokens, vocab, width, FP32, **options)
    assert tile <= found <= tile + beside <= 1 << 20
    assert tokens == 20 or (tile + beside) * (tokens + 1) / tokens > 1 << 20


def test_the_sums_of_one_pass_are_gone_before_those_of_the_next(monkeypatch):
    """Only one of them is in what is said to be beside a tile."""
    pytest.importorskip("triton")
    from fastdpo_kernels.triton import exponential

    sums, gone = [], []

    def finish(head, targets, anchor, tile, partial, *rest):
        sums.append(weakref.ref(partial))
        return finished(head, targets, anchor, tile, partial, *rest)

    def score_into(*arguments):
        gc.collect()  # what the interpreter holds
        gone.append(sums[0]() is None)

    finished = exponential.finish
    monkeypatch.setattr(exponential, "finish", finish)
    monkeypatch.setattr(exponential, "score_into", score_into)
    x, w, y = torch.ones(3, 16), torch.ones(40, 16), torch.arange(3)
    exponential.exponentials(Head(w), x, y, torch.empty(3, 40), ())
    assert gone == [True]


HEADS = {
    "Qwen2.5-0.5B": (151936, 896),
    "Llama-3.1-8B": (128256, 4096),
    "Gemma-3-1B": (262144, 1152),
}
ROWS = {"Qwen2.5-0.5B": (1664, 6912), "Llama-3.1-8B": (1792, 7552), "Gemma-3-1B": (896, 3968)}


@pytest.mark.parametrize("name", HEADS)
def test_tokens_of_a_tile(name):
    """Of bf16 in 512 MiB and 2 GiB; each output that a call asks for takes a number a block."""
    for mib, expected in zip((512, 2048), ROWS[name], strict=True):
        layout = TritonLayout(*HEADS[name], BF16, "cuda", mib, (), 128)
        assert layout.rows == expected
        measured = TritonLayout(*HEADS[name], BF16, "cuda", mib, OUTPUTS, 128)
        narrow = TritonLayout(*HEADS[name], BF16, "cuda", mib, OUTPUTS, 64)
        assert layout.rows >= measured.rows >= narrow.rows > 0.8 * layout.rows
        for made in (layout, measured, narrow):
            total, rows = sum(made.bytes(10**6, softcap=False)), made.rows
            assert total <= mib << 20 < total / rows * (rows + 128)


def test_the_outputs_of_a_call_reach_its_tiles(monkeypatch):
    """Those that are asked for, and the one that a loss measures for itself."""
    seen = []

    def make(*arguments):
        seen.append(set(arguments[3]))
        return make_tiles(*arguments)

    monkeypatch.setattr(call, "make_tiles", make)
    x, w, y = torch.randn(6, 8), torch.randn(11, 8), torch.arange(6)
    linear_logprob(x, w, y, outputs=("entropy", "lse"))
    ids, pairs, ref = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([[0, 1]]), torch.zeros(2)
    linear_loss(x, w, y, ids, pairs, ref, use_weighting=True, outputs=("is_top1",))
    assert seen == [{"entropy", "lse"}, {"is_top1", "log_sum_sq_prob"}]


GIB = 2**30


def test_the_default_workspace_grows_with_the_memory_of_a_gpu(monkeypatch):
    """From 512 MiB to 2 GiB of a card of 80 GB, whose driver keeps some of it."""
    sizes = [default_workspace_mib(int(gib * GIB)) for gib in (8, 16, 22.2, 39.4, 79.1, 139)]
    assert sizes == [512, 512, 631, 1120, 2048, 2048]
    assert workspace_of(None, CPU) == 512 and workspace_of(32, CUDA) == 32
    assert workspace_of(None, CUDA) == 512 or torch.cuda.is_available()
    there = mock.Mock(total_memory=79 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: there)
    # Which asks the GPU itself.
    monkeypatch.setattr("fastdpo_kernels.tiles.widens", lambda device, operands: False)
    assert workspace_of(None, CUDA) == 2048 and workspace_of(None, CPU) == 512
    sizes = (10**6, 151936, 896, BF16, CUDA)
    assert workspace_bytes(*sizes, backend="torch") == workspace_bytes(
        *sizes, backend="torch", workspace_mib=2048
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_tile_is_one_buffer_of_as_many_tokens_as_fit(backend):
    """Of all tokens while they fit, then of whole blocks of them; the rest is cut."""
    few, more, many = (
        workspace_bytes(tokens, 50_000, 64, FP32, CPU, workspace_mib=100, backend=backend).tile
        for tokens in (16, 256, 10_000)
    )
    row = few // 16
    assert 50_000 * 4 <= row < 50_064 * 4
    assert more == 256 * row < many == many // row * row <= 100 << 20


def test_the_tile_is_kept_on_a_cpu_and_can_be_released():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 24, generator=g) for n in (3000, 4096))
    y = torch.randint(4096, (3000,), generator=g)
    tile = workspace_bytes(3000, 4096, 24, FP32, CPU, workspace_mib=2).tile
    assert tile <= 2 << 20
    linear_logprob(x, w, y, workspace_mib=2)
    peaks = []
    for release in (True, False, True):
        if release:
            release_workspace()
        peak, _ = peak_bytes(lambda: linear_logprob(x, w, y, workspace_mib=2), CPU)
        peaks.append(peak)
    fresh, kept, again = peaks
    assert fresh == again == kept + tile


def test_the_layout_for_a_gpu_is_known_without_one():
    """Rows begin at multiples of 64 elements and come in blocks of 128."""
    options = {"outputs": OUTPUTS, "backend": "triton"}
    tile, beside = workspace_bytes(9000, 151_937, 896, BF16, CUDA, **options)
    row = 2 * (151_936 + 64)
    assert tile % (128 * row) == 0 and tile + beside <= 512 << 20 < tile + beside + 256 * row
    plain = workspace_bytes(9000, 151_937, 896, BF16, CUDA, backend="torch")
    assert plain.tile % (4 * 151_937) == 0 and plain.beside >= plain.tile // 2


def test_the_whole_logits_are_no_tiles():
    with pytest.raises(ValueError, match="backend"):
        workspace_bytes(8, 100, 16, FP32, CPU, backend="naive")


def test_ranks_cut_alike_whatever_memory_each_has(monkeypatch):
    """The workspace that is left to devices is the least of all ranks'."""

    class Exchange:
        def integers(self, mine, device):
            other = list(mine)
            other[mine.index(1000)] = 700
            return [mine, other]

    monkeypatch.setattr(sharded, "workspace_of", lambda given, device: given or 1000)
    x, w, y = torch.randn(6, 8), torch.randn(11, 8), torch.arange(6)
    settings = {"softcap": None, "temperature": 1.0, "ignore_index": -100, "workspace_mib": None}
    ranks = sharded.check_shard(Exchange(), x, w, None, y, settings, None)
    assert ranks.workspace_mib == 700 and ranks.counts == [6, 6] and not any(ranks.needs)
