"""Every layout gives the numbers and gradients of separate sequences, or is not taken."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import (
    ALONE,
    GROUPS,
    OTHERS,
    SHARED,
    PackedRow,
    Truth,
    build,
    pack,
    random_groups,
    row_logps,
    separate_logps,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fastdpo.config import TrainConfig
from fastdpo.data.batch import Batch, make_batch
from fastdpo.data.groups import Group
from fastdpo.data.packing import Part
from fastdpo.data.segments import Bound, Segments
from fastdpo.errors import ModelError
from fastdpo.model import exactness, load_scorer
from fastdpo.model.attention import NAME
from fastdpo.model.exactness import ExactnessCheck
from fastdpo.model.forward import batch_states
from fastdpo.model.head import find_head
from fastdpo.model.layout import MIXES_ONLY_BY_ATTENTION, choose_layout, expected_layout

EAGER = {"gemma2", "gpt_oss"}
"""Families whose soft cap or sinks transformers' sdpa leaves out, or has left out."""


def with_stock_attention(family: str) -> tuple[Any, Truth]:
    model = build(family)
    model.set_attn_implementation("eager" if family in EAGER else "sdpa")
    return model, Truth.of(model, GROUPS)


@pytest.mark.parametrize("family", SHARED)
def test_rows_equal_separate_sequences(family: str) -> None:
    model, truth = with_stock_attention(family)
    assert choose_layout(model).name == "shared"
    for share in (True, False):
        truth.check(model, row_logps(model, pack(GROUPS, share=share)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_rows_with_gradient_checkpointing(family: str) -> None:
    model, truth = with_stock_attention(family)
    model.gradient_checkpointing_enable()
    model.train()
    assert choose_layout(model).name == "shared"
    truth.check(model, row_logps(model, pack(GROUPS, share=True)))


def dense_mask(row: PackedRow, family: str, window: int) -> Any:
    """The row's 4-D mask for stock attention, one for each type of layer where there are two."""

    def mask(window: int | None) -> Tensor:
        seen = row.seen(window)[None, None]
        if family not in EAGER:
            return seen
        return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))

    if "layer_types" in SHARED[family]:
        return {"full_attention": mask(None), "sliding_attention": mask(window)}
    return mask(window if "sliding_window" in SHARED[family] else None)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt_oss"]
)
def test_rows_equal_a_dense_mask_through_stock_attention(family: str) -> None:
    """The row with a mask, which knows nothing of segments, is one more way to the same numbers."""
    row = pack(GROUPS, share=True)
    model, truth = with_stock_attention(family)
    inputs = {k: v for k, v in row.inputs().items() if k != "fastdpo_segments"}
    truth.check(model, row_logps(model, row, **inputs, attention_mask=dense_mask(row, family, 4)))


def padded_logps(model: Any, one_by_one: bool = False) -> Tensor:
    """Log-probabilities of one padded batch, the way a trainer computes them."""
    groups = [
        Group(np.array(prompt, np.int32), [np.array(r, np.int32) for r in responses])
        for prompt, responses in GROUPS
    ]
    row = [Part(number, tuple(range(len(g.responses)))) for number, g in enumerate(groups)]
    batch = make_batch(groups, row, "padded")
    states = batch_states(model, batch, one_by_one=one_by_one).flatten(0, 1)[batch.score_index]
    logps = find_head(model).logits(states).double().log_softmax(-1)
    return logps.gather(-1, batch.targets[:, None])[:, 0]


def could_share(model: Any, truth: Truth) -> bool:
    """Whether a shared row gives `truth` when the model is made to take one, whatever we chose."""
    stock = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
        truth.check(model, row_logps(model, pack(GROUPS, share=True)))
    except Exception:  # A model that cannot be asked may say so in any way.
        return False
    finally:
        model.set_attn_implementation(stock)
    return True


@pytest.mark.parametrize("family", OTHERS)
def test_what_cannot_be_shared_is_padded(family: str) -> None:
    """Exact in the layout that is taken, and padded only where sharing would be wrong."""
    model = build(family)
    stock = model.config._attn_implementation
    truth = Truth.of(model, GROUPS)
    layout = choose_layout(model)
    assert (layout.name == "shared") == could_share(model, truth)
    if layout.name == "shared":
        truth.check(model, row_logps(model, pack(GROUPS, share=True)))
        return
    assert (layout.name, layout.one_by_one) == ("padded", False)
    assert "not shared or packed: " in layout.reason and "\n" not in layout.reason
    assert model.config._attn_implementation == stock
    truth.check(model, padded_logps(model))


@pytest.mark.parametrize("family", ALONE)
def test_architectures_that_need_one_sequence_a_forward(family: str) -> None:
    model = build(family)
    layout = choose_layout(model)
    assert (layout.name, layout.one_by_one) == ("padded", True)
    assert model.config._attn_implementation != NAME
    truth = separate_logps(build(family), GROUPS)
    torch.testing.assert_close(padded_logps(model, one_by_one=True), truth, rtol=0, atol=1e-5)
    # And it is needed: beside a longer sequence a short one changes.
    difference = (padded_logps(model) - separate_logps(build(family), GROUPS)).abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("family", ["phi3+longrope", "llama+dynamic"])
def test_scaled_rope_is_no_obstacle_below_its_length(family: str) -> None:
    assert choose_layout(build(family), max_length=11).one_by_one
    model = build(family)
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, 10)
    short = random_groups([(3, [5, 2]), (4, [6, 1, 1])])
    truth = Truth.of(model, short)
    # The probe of the start-up check is longer than the ten tokens of this tiny model.
    exactness.LENGTHS, before = ((3, (3, 2, 1)), (4, (5, 2))), exactness.LENGTHS
    try:
        assert choose_layout(model, max_length=10).name == "shared"
    finally:
        exactness.LENGTHS = before
    truth.check(model, row_logps(model, pack(short, share=True)))


def test_sharing_can_be_switched_off() -> None:
    model = build("llama")
    layout = choose_layout(model, share_prefix=False)
    assert layout.name == "packed" and "share_prefix is off" in layout.reason
    assert model.config._attn_implementation == NAME


def test_the_choice_can_be_made_again() -> None:
    model = build("llama")
    assert choose_layout(model) == choose_layout(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_are_shared(dtype: torch.dtype) -> None:
    model = build("llama", dtype=dtype)
    assert choose_layout(model).name == "shared"


def test_autocast_is_shared() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_layout(build("qwen3", dtype=torch.float32)).name == "shared"


def test_soft_caps_are_compared_with_eager_attention() -> None:
    """Where sdpa leaves the cap out, it is neither the truth nor a fall-back."""
    model = build("gemma2")
    assert choose_layout(model).name == "shared"
    model = build("gemma2", attention_dropout=0.1)
    assert choose_layout(model).name == "padded"
    assert model.config._attn_implementation == "eager"


def test_scaled_rope_of_one_layer_type_is_seen() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    rope = {"sliding_attention": plain, "full_attention": scaled}
    assert choose_layout(build("gemma3_text", rope_parameters=rope)).one_by_one


def test_dropout_is_not_shared() -> None:
    assert choose_layout(build("gpt2", resid_pdrop=0.1)).name == "packed"
    assert choose_layout(build("opt", dropout=0.1)).name == "packed"
    layout = choose_layout(build("gpt2", attn_pdrop=0.1))
    assert layout.name == "padded" and "attention dropout 0" in layout.reason


def test_peft_models() -> None:
    base = build("llama")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    truth = Truth.of(model, GROUPS)
    assert choose_layout(model).name == "shared" and base.config._attn_implementation == NAME
    truth.check(model, row_logps(model, pack(GROUPS, share=True)))


def test_nothing_is_left_behind() -> None:
    model = build("gpt2", resid_pdrop=0.1).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = torch.get_rng_state()
    choose_layout(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.equal(p.grad, torch.ones_like(p))
        assert torch.equal(p, weights[name]) and p.requires_grad


def wrong_positions(batch: Batch) -> Batch:
    return replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


def with_bounds(batch: Batch, bounds: list[Bound]) -> Batch:
    return replace(batch, segments=Segments.build(bounds))


def leaked_neighbour(batch: Batch) -> Batch:
    first, second, *rest = batch.segments.bounds
    return with_bounds(batch, [(first[0], second[1], 0, 0), *rest])


def lost_prompt(batch: Batch) -> Batch:
    return with_bounds(batch, [(start, end, 0, 0) for start, end, _, _ in batch.segments.bounds])


def neighbours_prompt(batch: Batch) -> Batch:
    *bounds, last = batch.segments.bounds
    return with_bounds(batch, [*bounds, (*last[:2], 0, last[3] - last[2])])


def wrong_score(batch: Batch) -> Batch:
    return replace(batch, score_index=batch.score_index + 1)


def one_causal_row(batch: Batch) -> Batch:
    return wrong_positions(with_bounds(batch, [(0, batch.segments.length, 0, 0)]))


SUBTLE = [wrong_positions, neighbours_prompt, wrong_score]
LEAKS = [leaked_neighbour]
GROSS = [lost_prompt, one_causal_row]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize(
    ("mistake", "dtype"),
    [(mistake, torch.float32) for mistake in SUBTLE + LEAKS + GROSS]
    + [(mistake, torch.bfloat16) for mistake in LEAKS + GROSS],
)
def test_the_check_sees_mistakes(
    monkeypatch: pytest.MonkeyPatch, mistake: Any, dtype: torch.dtype, family: str
) -> None:
    """A mistake in the rows of training is found in the rows of the proof: they are the same."""

    def broken(groups: Any, row: Any, layout: str) -> Batch:
        batch = make_batch(groups, row, layout)
        return batch if layout == "padded" else mistake(batch)

    model = build(family, dtype=dtype)
    monkeypatch.setattr(exactness, "make_batch", broken)
    layout = choose_layout(model)
    assert layout.name != "shared"
    assert re.search(r"not shared( or packed)?: log-probabilities (are|move by)", layout.reason)


def test_a_window_kept_from_the_attention_function_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real window is wider than the probe, so that only the call itself can tell."""
    model = build("qwen3", sliding_window=100)
    assert choose_layout(model).name == "shared"
    monkeypatch.setattr(model.model.layers[0].self_attn, "sliding_window", None)
    assert "0 of 1 sliding windows" in choose_layout(model).reason


def test_a_layer_past_the_attention_function_is_seen() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    layout = choose_layout(model)
    assert layout.name == "padded" and "1 of 2 layers" in layout.reason


def test_failures_of_the_forward_fall_back_but_memory_errors_do_not() -> None:
    model = build("llama")
    check = ExactnessCheck(model, "sdpa")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    model.model.layers[0].mlp.forward = fail
    error: Exception = KeyError("no such cache")
    assert check.failure("shared") == "KeyError: 'no such cache'"
    error = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        check.failure("shared")


@pytest.mark.parametrize("family", [*SHARED, *OTHERS, *ALONE])
def test_the_configuration_alone_expects_no_less_than_there_is(family: str) -> None:
    """What `fastdpo plan` assumes; where layers mix tokens otherwise, the configuration says so."""
    model = build(family)
    order = ("shared", "packed", "padded")
    config = model.config.get_text_config()
    expected = expected_layout(TrainConfig(max_length=None), model.config)
    layout = choose_layout(model).name
    assert order.index(expected) <= order.index(layout)
    if set(getattr(config, "layer_types", None) or ()) - MIXES_ONLY_BY_ATTENTION:
        assert expected == layout == "padded"


def test_stock_models_have_no_segments_to_lose() -> None:
    """Calling a model with our attention and no segments is an error, not a causal row."""
    model = build("llama")
    choose_layout(model)
    with pytest.raises(ModelError, match="fastdpo_segments"):
        model(torch.tensor([[1, 2, 3]]))


def test_a_model_that_waits_on_the_host_is_checked_with_the_hosts_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that is going to be sharded over GPUs does, whose own kernel no CPU runs."""
    monkeypatch.setattr(load_scorer, "run_device", lambda config: torch.device("cuda"))
    registered: list[str | None] = []
    monkeypatch.setattr(load_scorer, "register", registered.append)
    layout = load_scorer._layout(build("llama"), TrainConfig(attention_backend="varlen"))
    assert layout.name == "shared" and registered == ["varlen"]
