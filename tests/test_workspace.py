"""The bytes that kernels say their tiles take, beside those that are allocated."""

import pytest
import torch
from fastdpo_kernels import linear_logprob, workspace_bytes
from fastdpo_kernels.head import OUTPUTS
from fastdpo_kernels.tiles import release_workspace

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


@pytest.mark.parametrize("outputs", [(), ("entropy",), OUTPUTS], ids=len)
@pytest.mark.parametrize("tokens", [20, 100])
def test_the_fused_kernels_allocate_no_more_than_they_say(outputs, tokens):
    options = {"outputs": outputs, "softcap": False, "workspace_mib": 1, "backend": "triton"}
    tile, beside = workspace_bytes(tokens, 300, 64, FP32, CPU, **options)
    found = allocated(tokens, 300, 64, FP32, **options)
    assert tile <= found <= (1 + SLACK) * (tile + beside)


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
