"""The time between two steps, from a trace whose answer is known."""

from pathlib import Path
from typing import Any

import pytest
from bench_rows import row

from bench.report.trainers import gap_table
from bench.trainers.gaps import gaps, main


def step(number: int, start: float, length: float) -> dict[str, Any]:
    name = f"ProfilerStep#{number}"
    return {"name": name, "cat": "user_annotation", "ts": start, "dur": length, "args": {}}


def kernel(number: int, launch: float, start: float, length: float) -> list[dict[str, Any]]:
    args = {"correlation": number}
    return [
        {"name": "cudaLaunchKernel", "cat": "cuda_runtime", "ts": launch, "dur": 5, "args": args},
        {"name": "gemm", "cat": "kernel", "ts": start, "dur": length, "args": args},
    ]


def test_a_kernel_belongs_to_the_step_that_launched_it() -> None:
    events = [
        step(0, 0, 100),
        *kernel(1, 10, 50, 100),
        *kernel(2, 20, 60, 40),  # inside the first, on another stream
        *kernel(3, 30, 170, 100),  # runs on while the host is in the next step; 20 idle before
        step(1, 100, 100),
        *kernel(4, 110, 300, 50),  # 30 after the last one of step 0
        *kernel(5, 190, 350, 100),
        *kernel(7, 195, 310, 20),  # launched last, not the last to end
        step(2, 200, 100),
        *kernel(6, 210, 450, 10),
        {"name": "gemm", "cat": "kernel", "ts": 0, "dur": 900, "args": {"correlation": 99}},
    ]
    first, second = gaps(events)
    assert first == pytest.approx({"step_s": 250e-6, "gap_s": 30e-6, "idle_s": 50e-6})
    assert second == pytest.approx({"step_s": 150e-6, "gap_s": 0.0, "idle_s": 0.0})
    assert "| a GPU | 1 | 12.00% | 20.00% |" in gap_table([row("fastdpo", device="a GPU") | first])


def test_no_kernels_no_gaps() -> None:
    assert gaps([step(0, 0, 100), step(1, 100, 100)]) == []


def test_without_a_gpu_there_is_no_kernel_to_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTDPO_RESULTS", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    main(["--model_config", "nano", "--pairs_per_step", "2", "--batches", "1", "--dtype", "fp32"])
    assert "no kernels in the trace" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
