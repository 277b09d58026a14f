"""`linear_loss` against autograd through full fp64 logits: every loss, kind, option and backend."""

import pytest
import torch
from fastdpo_kernels import LOSSES
from head_problems import assert_same, small_tiles
from loss_problems import by_full_logits, by_linear_loss, make_task, options_of

TRAIN = [(True, True), (True, False), (False, True)]
BACKENDS = ["torch", "naive"]
OWN = [{"ld_alpha": 0.3}, {"use_weighting": True}, {"ld_alpha": 0.0, "use_weighting": True}]
EXACT = 1e-10


@pytest.fixture(autouse=True)
def poisoned_workspace():
    """Tiles of four tokens, with NaN before they are written."""
    with small_tiles(4):
        yield


def registered(name):
    options = options_of(name)
    return lambda scored: LOSSES[name](scored, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_registered_loss(name, backend):
    task = make_task(LOSSES[name].kind, prompt=LOSSES[name].prompt)
    for train in TRAIN:
        found = by_linear_loss(task, train, loss=name, backend=backend, **options_of(name))
        assert_same(found, by_full_logits(task, registered(name), train), EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", OWN, ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot", "cpo"])
def test_discounted_tails_and_weights_by_probability(name, own, backend):
    task = make_task(LOSSES[name].kind)
    for train in TRAIN:
        found = by_linear_loss(task, train, loss=name, backend=backend, **own, **options_of(name))
        assert_same(found, by_full_logits(task, registered(name), train, **own), EXACT)


FUNCTIONS = {
    "comparison": lambda pairs: (pairs.chosen_logps.square() - pairs.rejected_averages) / 7,
    "step": lambda pairs: pairs.margins.softmax(0) * pairs.margins.mean(),
    "response": lambda one: (one.logratios / one.lengths.clamp(min=1) - one.given["kl"]).square(),
    "tokens": lambda one: one.tokens.sums(
        (one.tokens.logps - one.tokens.ref_logps).exp(), len(one.logps)
    ),
    "group": lambda groups: groups.logratios.masked_fill(~groups.members, 0).std(1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_of_any_kind(kind, backend):
    task = make_task(kind, seed=1)
    for train in [*TRAIN, (False, False)]:
        found = by_linear_loss(task, train, loss=FUNCTIONS[kind], kind=kind, backend=backend)
        assert_same(found, by_full_logits(task, FUNCTIONS[kind], train), EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_options_of_the_head_and_one_tile_for_all(kind, backend):
    task = make_task(kind, seed=2, softcap=3.0, logit_scale=0.6)
    with small_tiles(1000):
        found = by_linear_loss(task, loss=FUNCTIONS[kind], kind=kind, backend=backend)
    assert_same(found, by_full_logits(task, FUNCTIONS[kind]), EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sigmoid", "kto", "listwise", "grpo", "aot", "orpo"])
def test_bf16_keeps_log_probabilities_and_rounds_gradients_once(name, backend):
    task = make_task(LOSSES[name].kind, prompt=LOSSES[name].prompt)
    options = options_of(name) | {"loss": name, "backend": backend}
    found = by_linear_loss(task, dtype=torch.bfloat16, **options)
    exact = by_full_logits(task, registered(name))
    coarse = {key for key in exact if key.startswith("gradient")}
    for keys, tolerance in ((coarse, 1e-2), (exact.keys() - coarse, 5e-5)):
        part = {key: found[key].double() for key in keys}
        assert_same(part, {key: exact[key] for key in keys}, tolerance)


@pytest.mark.parametrize("name", ["sigmoid", "kto", "listwise", "grpo", "aot", "orpo"])
def test_the_fused_kernels(name):
    """In Triton's interpreter, or on the GPU where there is one."""
    pytest.importorskip("triton")
    task = make_task(LOSSES[name].kind, prompt=LOSSES[name].prompt)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = options_of(name) | {"loss": name, "backend": "triton"}
    with small_tiles(16):
        found = by_linear_loss(task, dtype=torch.float32, device=device, **options)
    exact = by_full_logits(task, registered(name))
    assert_same({key: value.double().cpu() for key, value in found.items()}, exact, 5e-5)
