"""The head benchmark measures what it says: memory, failures as rows, presets, a dry run."""

import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_rows import head_rows
from test_bench_head_cases import LCE

from bench import gpu_check
from bench.heads import run as heads
from bench.heads.cases import REGIMES, Inputs, Problem
from bench.heads.measure import failure, memory_as_errors, peak_bytes
from bench.heads.peers import PROVIDERS, naive
from bench.heads.providers import Output, Passes, Provider
from bench.report import record
from bench.report.rows import read
from bench.trainers import memory
from bench.trainers import run as trainers


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs.make("tiny", 64, torch.float32, torch.device("cpu"))


def test_peak_counts_what_is_held_together() -> None:
    def function() -> torch.Tensor:
        first = torch.zeros(1 << 20)
        second = first.double()
        del first
        return second[: 1 << 19].clone()

    peak, result = peak_bytes(function, torch.device("cpu"))
    assert result.numel() == 1 << 19
    assert peak == pytest.approx((4 + 8) << 20, rel=0.01)


def test_failures_are_rows_and_providers_take_turns(inputs: Inputs) -> None:
    order, rows = [], []

    def counted(name: str, fails_at: int | None = None) -> Provider:
        def build(problem: Problem) -> Passes:
            passes = naive(problem)

            def forward() -> Output:
                order.append(name)
                if fails_at is not None and order.count(name) > fails_at:
                    raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
                return passes.forward()

            return passes._replace(forward=forward)

        return build

    providers = {
        "a": counted("a"),
        "b": counted("b"),
        "late": counted("late", fails_at=4),
        "liger": PROVIDERS["liger"],
    }
    problem = Problem.make(inputs, REGIMES["frozen"], 512)
    heads.run_case(problem, providers, 3, lambda **row: rows.append(row))
    timed = [row["provider"] for row in rows if "total_s" in row]
    assert timed == ["a", "b", "late", "a", "b", "a", "b"]
    assert order[-8:] == ["a", "b", "late", "a", "b", "late", "a", "b"]
    failed = {row["provider"]: row["error"] for row in rows if "error" in row}
    assert failed["late"] == "OutOfMemory: CUDA out of memory."
    assert set(failed) == {"late", "liger"}
    for row in (row for row in rows if "total_s" in row):
        assert min(row["forward_s"], row["backward_s"]) > 0
        assert row["total_s"] == pytest.approx(row["forward_s"] + row["backward_s"])


def test_kinds_of_failure(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.make(inputs, REGIMES["frozen"], 512)

    def reason(function: Callable[[], object]) -> str:
        with pytest.raises(Exception) as caught:
            function()
        return failure(caught.value)

    def run(name: str) -> str:
        return reason(lambda: PROVIDERS[name](problem))

    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    assert run("cce").startswith("NotInstalled: ")
    monkeypatch.setitem(sys.modules, "fastdpo_kernels", None)
    assert run("fastdpo").startswith("ModuleNotFoundError: ")
    assert run("liger").startswith("Unsupported: Liger's fused DPO")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run("fastdpo-triton") == "Unsupported: Triton needs a GPU"
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert run("torch-lce").startswith("Unsupported: no chunked linear_cross_entropy in torch 2")
    assert reason(lambda: torch.empty(1 << 60)).startswith("OutOfMemory: ")
    assert reason(lambda: [][0]) == "IndexError: list index out of range"


def test_memory_that_is_not_free_is_an_error() -> None:
    size = int(1.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_as_errors(torch.device("cpu")):
        assert resource.getrlimit(resource.RLIMIT_DATA) != limit
        torch.zeros(1 << 20)
        with pytest.raises(RuntimeError) as caught:
            torch.empty(size, dtype=torch.uint8)
    assert failure(caught.value).startswith("OutOfMemory: ")
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit


def test_rows_say_what_is_planned_of_our_head(inputs: Inputs) -> None:
    rows: list[dict[str, object]] = []
    named = {name: PROVIDERS[name] for name in ("fastdpo", "naive")}
    heads.run_case(
        Problem.make(inputs, REGIMES["dpo"], 512), named, 1, lambda **row: rows.append(row)
    )
    assert [row.get("head_passes") for row in rows] == [6, None]


def test_the_workspace_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "workspace_of", lambda mib, device: mib or f"of {device}")
    assert heads.parse(["--device", "cuda"]).workspace_mib == "of cuda"
    assert heads.parse(["--device", "cuda", "--workspace-mib", "32"]).workspace_mib == 32


def test_quick_is_every_provider_at_one_small_head() -> None:
    options = heads.parse(["--quick", "--device", "cpu"])
    assert (options.heads, options.tokens, options.repeats) == (["smollm2"], [512], 2)
    assert set(PROVIDERS) - set(options.providers) == {"fastdpo-torch"}
    assert heads.parse(["--quick", "--tokens", "16", "--heads", "tiny"]).tokens == [16]
    assert heads.parse([]).repeats == 5
    assert heads.parse(["--tokens", "512,4096,16384,65536"]).tokens[-1] == 65536


def test_quick_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    """Small here; the table has a row for everybody."""
    arguments = ["--quick", "--device", "cpu", "--heads", "tiny", "--tokens", "64"]
    env = {**os.environ, "FASTDPO_RESULTS": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = run_python(["-m", "bench.heads", *arguments], env)
    rows = read(tmp_path)
    timed = {row["provider"] for row in rows if "total_s" in row}
    errors = {row["provider"]: row["error"].partition(":")[0] for row in rows if "error" in row}
    everywhere = {"fastdpo", "products", "trl", "naive", "naive-compiled", "liger"}
    assert timed >= everywhere | ({"torch-lce"} if LCE else set())
    assert errors["fastdpo-triton"] == errors["liger-flce"] == "Unsupported"
    assert set(errors.values()) <= {"Unsupported", "NotInstalled"}
    assert timed | set(errors) == set(PROVIDERS) - {"fastdpo-torch"}
    assert all(f"| {name} | " in done for name in timed | set(errors))


def test_micro_benchmarks(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """They time what they are asked for, and only when they are asked for."""
    out, file = tmp_path / "benchmark.json", "bench/heads/test_micro.py"
    # pytest-benchmark does not time inside a worker of pytest-xdist, as which this one may run.
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    env |= {"FASTDPO_BENCH": MICRO, "TRITON_INTERPRET": "0"}
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run_python([*arguments, file, "--benchmark-only", "--benchmark-json", str(out)], env)
    done = {
        (case["group"], case["extra_info"]["provider"])
        for case in json.loads(out.read_text())["benchmarks"]
    }
    parts = {"no_grad": ["forward"], "dpo": ["forward", "backward", "both"]}
    assert done == {
        (f"tiny-16-{regime}-{part}", name)
        for regime, directions in parts.items()
        for part in directions
        for name in ("naive", "fastdpo")
    }
    assert pytestconfig.getini("testpaths") == ["tests"]


MICRO = "--device cpu --heads tiny --tokens 16 --regimes no_grad,dpo --repeats 2"
MICRO += " --providers naive,liger-flce,fastdpo"


def run_python(arguments: list[str], env: dict[str, str]) -> str:
    path = [str(gpu_check.ROOT), str(gpu_check.ROOT / "kernels"), env.get("PYTHONPATH", "")]
    env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=gpu_check.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_our_own_failures_count() -> None:
    rows = head_rows()
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


@pytest.mark.parametrize("stage", gpu_check.FIGURES, ids=lambda stage: stage.name)
def test_every_stage_of_the_gpu_check_can_be_parsed(stage: gpu_check.Stage) -> None:
    for words in map(shlex.split, (stage.arguments, gpu_check.dry(stage).arguments)):
        if words[0] == "bench.heads":
            heads.parse(words[1:])
        else:
            rest = memory.OWN.parse_known_args(words[1:])[1]
            trainers.parse(rest if words[0] == "bench.trainers.memory" else words[1:])


def test_dry_run_of_the_gpu_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = sorted(record.RESULTS.glob("*"))
    sizes = [path.stat().st_size for path in kept]
    assert gpu_check.main(["--dry-run", "--results", str(tmp_path), "--stages", "regimes"]) == 0
    assert [path.stat().st_size for path in kept] == sizes
    timed = {row["provider"] for row in read(tmp_path) if "total_s" in row}
    assert timed == {"fastdpo", "fastdpo-triton", "products", "trl"}
    assert "all of our own passed" in capsys.readouterr().out
    assert (tmp_path / "heads.md").exists() and (tmp_path / "gpu-check.log").exists()


@pytest.mark.parametrize(
    ("name", "provider"), [("long", "products"), ("configurations", "Config(")]
)
def test_stages_that_are_unlike_the_others(
    name: str, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported everything."""
    (stage,) = (stage for stage in gpu_check.FIGURES if stage.name == name)
    monkeypatch.setenv("FASTDPO_RESULTS", str(tmp_path))
    heads.main(shlex.split(gpu_check.dry(stage).arguments)[1:])
    rows = read(tmp_path)
    assert any(row["provider"].startswith(provider) for row in rows if "total_s" in row)
    assert gpu_check.failures(rows) == []
