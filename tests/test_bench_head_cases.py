"""Numbers of the head benchmark: fp64 is right, providers agree with it, wrong ones are refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.heads import providers
from bench.heads.cases import REGIMES, Inputs, Problem, response_tokens
from bench.heads.measure import call, examine, own_graphs
from bench.heads.peers import PROVIDERS, naive
from bench.heads.providers import Output, Passes, Provider
from bench.heads.run import run_case

LCE = ["torch-lce"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else []
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs.make("tiny", 64, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "dpo_long"])
def test_exact_gradients_are_autograds(inputs: Inputs, regime: str) -> None:
    problem = Problem.make(inputs, REGIMES[regime], 512)
    x, w = inputs.hidden.double().requires_grad_(), inputs.weight.double().requires_grad_()
    logps = (x @ w.T).log_softmax(-1).gather(1, inputs.targets[:, None]).squeeze(1)
    torch.testing.assert_close(inputs.exact.logps, logps.detach(), rtol=1e-12, atol=1e-12)
    if problem.regime.dpo:
        value = problem.loss(problem.sums(logps))
    else:
        value = (logps * inputs.token_grads).sum()
    dx, dw = torch.autograd.grad(value, (x, w))
    exact_dx, exact_dw = problem.exact_gradients
    torch.testing.assert_close(exact_dx, dx, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(exact_dw, dw[inputs.exact.vocabulary], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["fastdpo", "fastdpo-torch", "trl", "naive", "liger-flce", *LCE])
@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "dpo_long"])
def test_providers_compute_the_same(inputs: Inputs, name: str, regime: str) -> None:
    problem = Problem.make(inputs, REGIMES[regime], 512)
    found = examine(problem, PROVIDERS[name])
    assert found["deterministic"] and "refused" not in found
    # A response is 8 tokens of some 3 nats, each the difference of logits of some 12.
    assert found["logp_error"] < 8 * 12 * 4 * EPS
    wanted = {"dx_error": problem.regime.hidden, "dw_error": problem.regime.weight}
    for error, present in wanted.items():
        assert (error in found) == present and found.get(error, 0.0) < 32 * EPS
    if problem.regime.dpo:
        assert found["loss"] == pytest.approx(problem.exact_loss, abs=1e-4)
        assert found["loss_error"] < 1e-4


@pytest.mark.parametrize("regime", ["dpo", "dpo_frozen"])
def test_liger_computes_the_same(
    inputs: Inputs, regime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hidden states are in another order, and their gradient comes back in ours."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    problem = Problem.make(inputs, REGIMES[regime], 512)
    for name in ("liger", "liger-8"):
        found = examine(problem, PROVIDERS[name])
        assert found["logp_error"] < 8 * 12 * 4 * EPS
        assert found["dx_error"] < 32 * EPS and found.get("dw_error", 0.0) < 32 * EPS


def test_a_comparison_longer_than_the_workspace() -> None:
    inputs = Inputs.make("tiny", 2048, torch.float32, torch.device("cpu"))
    problem = Problem.make(inputs, REGIMES["dpo_long"], 512)
    assert problem.responses == 2
    assert problem.workspace_mib << 20 < 331 * 2048 * 4 // 2
    found = examine(problem, PROVIDERS["fastdpo"])
    assert found["dx_error"] < 64 * EPS and found["dw_error"] < 64 * EPS


def test_what_is_planned_of_our_head() -> None:
    """6 of a trained head, 4 of a frozen one; more where a comparison takes several tiles."""
    inputs = Inputs.make("tiny", 2048, torch.float32, torch.device("cpu"))
    found = {}
    for name, regime in REGIMES.items():
        problem = Problem.make(inputs, regime, 1)
        found[name] = providers.planned_passes(problem, "fastdpo-torch")
        assert providers.planned_passes(problem, "naive") is None
    assert found["no_grad"] is None and found["dpo"] == 6
    assert found["frozen"] == found["dpo_frozen"] == 4
    assert found["trainable"] == 8 and 6 < found["dpo_long"] < 8


def test_responses_fill_the_tokens_and_share_a_tile() -> None:
    for tokens, name in ((16384, "dpo"), (2048, "dpo"), (16384, "no_grad"), (512, "dpo_long")):
        assert tokens % (2 * response_tokens(REGIMES[name], tokens)) == 0
    assert response_tokens(REGIMES["dpo"], 16384) == 256
    with pytest.raises(ValueError, match="multiple of 8"):
        response_tokens(REGIMES["dpo"], 3000)


def test_compiled_is_naive_and_says_where_there_is_no_compiler(inputs: Inputs) -> None:
    problem = Problem.make(inputs, REGIMES["dpo"], 512)
    only, rows = {"naive-compiled": PROVIDERS["naive-compiled"]}, []
    with own_graphs():
        run_case(problem, only, 1, lambda **row: rows.append(row))
    assert rows[0]["logp_error"] < 8 * 12 * 4 * EPS
    assert rows[0]["dx_error"] < 32 * EPS and rows[0]["dw_error"] < 32 * EPS
    none = {"cpp.cxx": (None, "/nonexistent/c++"), "force_disable_caches": True}
    with torch._inductor.config.patch(none), own_graphs():
        run_case(problem, only, 1, lambda **row: rows.append(row))
    assert len(rows) == 2 and "No working C++ compiler found" in rows[1]["error"]


def test_wrong_numbers_are_refused(inputs: Inputs) -> None:
    """Each by itself: a log-probability of one token, the loss, either gradient, NaN."""
    problem = Problem.make(inputs, REGIMES["dpo"], 512)

    def spoilt(what: str) -> Provider:
        def build(problem: Problem) -> Passes:
            passes = naive(problem)

            def forward() -> Output:
                value, logps = passes.forward()
                if what == "nan":
                    logps = logps * math.nan
                change = torch.tensor([1e-2] + [0.0] * (logps.numel() - 1))
                logps = logps + change if what == "logp" else logps
                return Output(value + 1e-2 * (what == "loss"), logps)

            def backward(output: Output) -> tuple[torch.Tensor, ...]:
                factors = (1.5 if what == name else 1.0 for name in ("dx", "dw"))
                return tuple(g * f for g, f in zip(passes.backward(output), factors, strict=True))

            return passes._replace(forward=forward, backward=backward)

        return build

    for what in ("logp", "loss", "dx", "dw"):
        found = examine(problem, spoilt(what))
        assert found["refused"].startswith(f"its {what} is off by")
    assert "nan" in examine(problem, spoilt("nan"))["refused"]
    assert "refused" not in examine(problem, spoilt("nothing"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_not_refused(dtype: torch.dtype) -> None:
    """Logits rounded to the dtype, as most peers have them, and a weak product are in order; a
    product of bf16 in the name of fp32 is not.
    """
    inputs = Inputs.make("tiny", 2048, dtype, torch.device("cpu"))
    for regime in ("dpo", "trainable"):
        problem = Problem.make(inputs, REGIMES[regime], 512)
        for name in ("naive", "trl", "fastdpo", *LCE):
            assert "refused" not in examine(problem, PROVIDERS[name])
    if dtype == torch.float32:
        coarse = replace(inputs, hidden=inputs.hidden.bfloat16(), weight=inputs.weight.bfloat16())
        logps = naive(Problem.make(coarse, REGIMES["no_grad"], 512)).forward().logps
        assert problem.refusal(problem.errors(logps, ())) is not None


def test_many_tokens() -> None:
    """Of 65536 tokens, dX of the first 16384 is compared, everything else of all."""
    inputs = Inputs.make("tiny", 65536, torch.float32, torch.device("cpu"))
    problem = Problem.make(inputs, REGIMES["trainable"], 512)
    for name in ("fastdpo", "products", *LCE):
        found = examine(problem, PROVIDERS[name])
        assert found.get("dw_error", 0.0) < 64 * EPS and "refused" not in found
    assert inputs.exact.slope.shape == (16384, 48)
    logps, gradients = inputs.exact.logps, naive(problem)
    output = gradients.forward()
    dx, dw = gradients.backward(output)
    right = problem.errors(logps, (dx, dw))
    assert right["dx_error"] < 64 * EPS and right["dw_error"] < 64 * EPS
    dx[16384:] = 0
    assert problem.errors(logps, (dx, dw)) == right
    dx[16383] = 0
    assert problem.errors(logps, (dx, dw))["dx_error"] > 100 * EPS
    last = logps.clone()
    last[-1] -= 1
    assert problem.errors(last, (dx, dw))["logp_error"] == pytest.approx(1)
    # The last token's share of dW.
    wrong = inputs.token_grads.clone()
    wrong[-1] = 0
    other = Problem.make(replace(inputs, token_grads=wrong), REGIMES["trainable"], 512)
    passes = naive(other)
    dx, dw = passes.backward(passes.forward())
    assert problem.errors(logps, (dx, dw))["dw_error"] > 100 * EPS
    assert response_tokens(REGIMES["trainable"], 65536) == 8192


@pytest.mark.parametrize("tile", [64, 24])
def test_products_are_those_of_the_regime(
    inputs: Inputs, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more and no less, in one tile of tokens and in several."""
    monkeypatch.setattr(providers, "PRODUCT_TOKENS", tile)
    for name in ("no_grad", "frozen", "dpo"):
        problem = Problem.make(inputs, REGIMES[name], 512)
        with FlopCounterMode(display=False) as counter:
            call(PROVIDERS["products"](problem))
        assert counter.get_total_flops() == problem.regime.products * 2 * 64 * 331 * 48
