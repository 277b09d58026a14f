"""The head benchmark measures what it says: references, memory, failures as rows, a dry run."""

from pathlib import Path

import pytest
import torch

from bench import gpu_check, head_providers, heads, record, tables
from bench.head_cases import REGIMES, Inputs, Problem, response_tokens
from bench.rows import Row, read

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


@pytest.mark.parametrize("name", ["fastdpo", "fastdpo-torch", "trl", "naive"])
@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "dpo_long"])
def test_providers_compute_the_same(inputs: Inputs, name: str, regime: str) -> None:
    problem = Problem.make(inputs, REGIMES[regime], 512)
    found = heads.examine(problem, head_providers.PROVIDERS[name])
    assert found["deterministic"]
    # A response is 8 tokens of some 3 nats, each the difference of logits of some 12.
    assert found["logp_error"] < 8 * 12 * 4 * EPS
    wanted = {"dx_error": problem.regime.hidden, "dw_error": problem.regime.weight}
    for error, present in wanted.items():
        assert (error in found) == present and found.get(error, 0.0) < 32 * EPS
    if problem.regime.dpo:
        exact = problem.loss(problem.sums(inputs.exact.logps)).item()
        assert found["loss"] == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("regime", ["dpo", "dpo_frozen"])
def test_liger_computes_the_same(
    inputs: Inputs, regime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hidden states are in another order, and their gradient comes back in ours."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    problem = Problem.make(inputs, REGIMES[regime], 512)
    for name in ("liger", "liger-8"):
        found = heads.examine(problem, head_providers.PROVIDERS[name])
        assert found["logp_error"] < 8 * 12 * 4 * EPS
        assert found["dx_error"] < 32 * EPS and found.get("dw_error", 0.0) < 32 * EPS


def test_a_comparison_longer_than_the_workspace() -> None:
    inputs = Inputs.make("tiny", 2048, torch.float32, torch.device("cpu"))
    problem = Problem.make(inputs, REGIMES["dpo_long"], 512)
    assert problem.responses == 2
    assert problem.workspace_mib << 20 < 331 * 2048 * 4 // 2
    found = heads.examine(problem, head_providers.PROVIDERS["fastdpo"])
    assert found["dx_error"] < 64 * EPS and found["dw_error"] < 64 * EPS


def test_responses_fill_the_tokens_and_share_a_tile() -> None:
    for tokens, name in ((16384, "dpo"), (2048, "dpo"), (16384, "no_grad"), (512, "dpo_long")):
        assert tokens % (2 * response_tokens(REGIMES[name], tokens)) == 0
    assert response_tokens(REGIMES["dpo"], 16384) == 256
    with pytest.raises(ValueError, match="multiple of 8"):
        response_tokens(REGIMES["dpo"], 3000)


def test_peak_counts_what_is_held_together() -> None:
    def function() -> torch.Tensor:
        first = torch.zeros(1 << 20)
        second = first.double()
        del first
        return second[: 1 << 19].clone()

    peak, result = heads.peak_bytes(function, torch.device("cpu"))
    assert result.numel() == 1 << 19
    assert peak == pytest.approx((4 + 8) << 20, rel=0.01)


def test_failures_are_rows_and_providers_take_turns(inputs: Inputs) -> None:
    order, rows = [], []

    def counted(name: str, fails_at: int | None = None) -> head_providers.Provider:
        def build(problem: Problem) -> head_providers.Step:
            step = head_providers.naive(problem)

            def forward() -> head_providers.Output:
                order.append(name)
                if fails_at is not None and order.count(name) > fails_at:
                    raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
                return step.forward()

            return step._replace(forward=forward)

        return build

    providers = {
        "a": counted("a"),
        "b": counted("b"),
        "late": counted("late", fails_at=4),
        "liger": head_providers.PROVIDERS["liger"],
    }
    problem = Problem.make(inputs, REGIMES["frozen"], 512)
    heads.run_case(problem, providers, 3, lambda **row: rows.append(row))
    timed = [row["provider"] for row in rows if "total_s" in row]
    assert timed == ["a", "b", "late", "a", "b", "a", "b"]
    assert order[-8:] == ["a", "b", "late", "a", "b", "late", "a", "b"]
    failed = {row["provider"]: row["error"] for row in rows if "error" in row}
    assert failed["late"] == "OutOfMemoryError: CUDA out of memory."
    assert set(failed) == {"late", "liger"}
    assert all(0 < row["forward_s"] < row["total_s"] for row in rows if "total_s" in row)


def example_rows() -> list[Row]:
    case = {"regime": "dpo", "head": "tiny", "vocab": 331, "hidden": 48, "tokens": 16}
    case |= {"dtype": "fp32", "workspace_limit_mib": 512}
    common = {"case": case, "device": "a CPU", "commit": "1", "command": "c"}
    facts = {"workspace_mib": 400.0, "gradient_mib": 2.0, "deterministic": True}
    times = {"fastdpo": (3.0, 2.0, 4.0), "products": (2.0, 2.0, 2.5), "trl": (6.0, 7.0, 5.0)}
    rows = [
        {"provider": name, "forward_s": 1.0, "total_s": total, **facts, **common}
        for name, totals in times.items()
        for total in totals
    ]
    return [*rows, {"provider": "cce", "error": "ImportError: no", **common}]


def test_tables() -> None:
    text = tables.head_tables(example_rows())
    assert "| fastdpo | 1000 | 2000 | 3000 (2000–4000) | 1.50 | 1.00 | 400 |" in text
    assert "| trl | 1000 | 5000 | 6000 (5000–7000) | 3.00 | 2.00 |" in text
    assert "| cce | ImportError: no |" in text
    line = tables.head_summary(example_rows()).splitlines()[2]
    figures = "3000 | 1.50 | 2.00 | not installed | 400 of 512"
    assert line == f"| dpo | tiny | 16 | fp32 | {figures} |  |  |"
    # Another process is another table: its ratios are its own.
    moved = [{**row, "command": "d"} for row in example_rows()]
    assert len(tables.head_summary([*example_rows(), *moved]).splitlines()) == 4


def test_our_own_failures_count() -> None:
    rows = example_rows()
    assert gpu_check.failures(rows) == []
    rows[0] = {**rows[0], "deterministic": False}
    rows.append({**rows[-1], "provider": "fastdpo-triton"})
    assert gpu_check.failures(rows) == [
        "fastdpo, dpo, tiny: two calls differ",
        "fastdpo-triton, dpo, tiny: ImportError: no",
    ]


def test_a_stage_ends_at_its_limit(tmp_path: Path) -> None:
    sleep = gpu_check.Stage("sleep", "", 1)
    arguments = ["timeit", "-n", "1", "import time; time.sleep(60)"]
    log = tmp_path / "log"
    assert gpu_check.run(sleep, arguments, 1.0, log, {}) == gpu_check.TIMED_OUT
    assert "=== sleep" in log.read_text()


@pytest.mark.slow
def test_dry_run_of_the_gpu_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = sorted(record.RESULTS.glob("*"))
    sizes = [path.stat().st_size for path in kept]
    stages = ["regimes", "long", "configurations"]
    arguments = ["--dry-run", "--results", str(tmp_path), "--stages", *stages]
    assert gpu_check.main(arguments) == 0
    assert [path.stat().st_size for path in kept] == sizes
    rows = read(tmp_path)
    regimes = {row["case"]["regime"] for row in rows}
    assert regimes == set(REGIMES)
    timed = {row["provider"] for row in rows if "total_s" in row}
    assert {"fastdpo", "fastdpo-triton", "products", "trl"} < timed
    assert any(name.startswith("Config(") for name in timed)
    assert "all of our own passed" in capsys.readouterr().out
    assert (tmp_path / "heads.md").exists() and (tmp_path / "gpu-check.log").exists()
