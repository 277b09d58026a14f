"""How many variants of each kernel Triton compiles, and when; counted by its own binder."""

import random

import pytest
import torch

pytest.importorskip("triton")
from fastdpo_kernels import compile_ahead, linear_logprob, linear_loss
from fastdpo_kernels.losses import Loss
from specialised import Variants, counted_variants
from torch import Tensor

BF16 = torch.bfloat16
OUTPUTS = ("entropy", "mean_logit", "is_top1")
OPTIONS = {"backend": "triton", "workspace_mib": 1}


def head(**kind: torch.dtype) -> Tensor:
    return torch.randn(301, 64, **kind)


def score(weight: Tensor, tokens: int, outputs: tuple[str, ...] = ()) -> None:
    """What a reference and an evaluation do."""
    hidden = torch.zeros(tokens, 64, dtype=weight.dtype)
    targets = torch.randint(301, (tokens,))
    linear_logprob(hidden, weight, targets, outputs=outputs, **OPTIONS)


def train(weight: Tensor, tokens: int, outputs: tuple[str, ...] = (), frozen: bool = False) -> None:
    """A step: some comparisons of any length, and some of them longer than a tile."""
    hidden = torch.zeros(tokens, 64, dtype=weight.dtype, requires_grad=True)
    weight = weight.clone().requires_grad_(not frozen)
    responses = 2 * random.randint(1, min(16, tokens // 4))
    found = linear_loss(
        hidden,
        weight,
        torch.randint(301, (tokens,)),
        torch.arange(tokens) * responses // tokens,
        torch.arange(responses).view(-1, 2),
        torch.zeros(responses),
        beta=0.1,
        outputs=outputs,
        **OPTIONS,
    )
    found[0].backward()


def counts(variants: Variants) -> dict[str, int]:
    return {name: len(keys) for name, keys in variants.items()}


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    torch.manual_seed(0)


def test_scoring_any_number_of_tokens_compiles_each_kernel_once():
    weight = head(dtype=BF16)
    with counted_variants() as variants:
        for tokens in (1, 16, *random.choices(range(1, 9000), k=500)):
            score(weight, tokens)
    assert counts(variants) == {"score_kernel": 1, "merge_kernel": 1}


def test_training_on_any_number_of_tokens_compiles_each_kernel_once_a_purpose():
    weight = head(dtype=BF16)
    with counted_variants() as variants:
        for tokens in random.choices(range(4, 2000), k=500):
            train(weight, tokens)
    once = ("anchor", "finish", "score", "merge", "again", "response_sums", "coefficients")
    expected = {f"{name}_kernel": 1 for name in once}
    # With sums, and without them where a unit is longer than a tile.
    assert counts(variants) == expected | {"exponential_kernel": 2}


def test_views_at_any_offset_are_no_variants():
    weight, many = head(dtype=BF16), torch.randint(301, (5000,))
    states = torch.zeros(5000, 64, dtype=BF16)
    with counted_variants() as variants:
        for start in range(40):
            part = slice(start, start + 400)
            linear_logprob(states[part], weight, many[part], **OPTIONS)
    assert counts(variants) == {"score_kernel": 1, "merge_kernel": 1}


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("frozen", [False, True])
def test_after_compile_ahead_a_run_compiles_nothing(dtype, frozen):
    weight = head(dtype=dtype)
    loss = Loss.named("sigmoid", beta=0.1)
    with counted_variants() as variants:
        compile_ahead(weight, outputs=OUTPUTS, loss=loss, backend="triton")
        before = {name: set(keys) for name, keys in variants.items()}
        for tokens in random.choices(range(4, 2000), k=8):
            train(weight, tokens, OUTPUTS, frozen)
            train(weight, tokens, (), frozen)
            score(weight, tokens)
            score(weight, tokens, OUTPUTS)
    every = ("score", "merge", "exponential", "response_sums", "coefficients")
    assert set(before) >= {f"{name}_kernel" for name in every}
    assert variants == before


def test_compile_ahead_knows_the_weighting_of_a_loss():
    loss = Loss.named("sigmoid", beta=0.1, use_weighting=True)
    with counted_variants() as plain:
        compile_ahead(head(dtype=BF16), outputs=OUTPUTS, backend="triton")
    with counted_variants() as weighted:
        compile_ahead(head(dtype=BF16), outputs=OUTPUTS, loss=loss, backend="triton")
    assert len(weighted["exponential_kernel"]) == len(plain["exponential_kernel"]) + 1


def test_compile_ahead_launches_what_it_compiles_and_leaves_plain_pytorch_alone():
    with counted_variants(launch=True) as variants:
        compile_ahead(head(dtype=BF16), backend="torch")
        compile_ahead(head(dtype=BF16)[:0], backend="triton")
        assert not variants
        compile_ahead(head(dtype=BF16), loss=Loss.named("ipo", beta=0.1), backend="triton")
    assert "coefficients_kernel" in variants
