"""What the benchmark of several processes counts, and what the page says of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bench_rows import row
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.jsonl import write_rows
from bench.report.scaling import scaling_block
from bench.scaling.memory import storage_bytes
from bench.scaling.run import beside_one, parse, time_cases
from bench.scaling.schemes import SCHEMES, Model, ideal
from bench.scaling.wire import Sent

FACTS = {name: row("trl")[name] for name in ("device", "commit", "date", "command", "versions")}
MODEL = Model(layers=1000, head=300, root=700, hidden=10, attention=40, itemsize=2)


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_a_rank_sends_no_byte_twice(four_ranks: None) -> None:
    """Of four ranks and a tensor of 400 bytes, each kind."""
    one, four = torch.zeros(100), torch.zeros(400)
    with Sent() as sent:
        dist.all_reduce(one)
        assert sent.take() == {"all_reduce": 2 * 300}
        dist.all_gather_into_tensor(four, one)
        dist.all_gather(list(four.split(100)), one)
        assert sent.take() == {"all_gather": 2 * 1200}
        dist.reduce_scatter_tensor(one, four)
        assert sent.take() == {"reduce_scatter": 1200}
        dist.broadcast(one, 0)
        assert sent.take() == {"broadcast": 300}
        dist.all_to_all_single(four, four)
        dist.all_to_all_single(four, four, [100] * 4, [250, 50, 50, 50])
        assert sent.take() == {"all_to_all": 1200 + 600}
        mesh = DeviceMesh("cpu", torch.arange(4))
        sharded = distribute_tensor(four, mesh, [Shard(0)])
        sent.take()
        sharded.full_tensor()
        assert sent.take() == {"all_gather": 1200}
        sharded.sum().full_tensor()
        assert sent.take() == {"all_reduce": 2 * 3}
        assert storage_bytes([sharded, sharded, one[:3], one, None]) == 400 + 400
        assert sent.take() == {}


@pytest.mark.parametrize(
    ("scheme", "processes", "parts"),
    [
        ("replicate", 4, {"sums": 1.5 * 6800}),
        ("fsdp", 4, {"weights": 3 / 4 * 2 * 2 * 2700, "gradients": 3 / 4 * 2 * 6800}),
        (
            "hsdp",
            4,
            {"weights": 1 / 2 * 2 * 2 * 2700, "gradients": 1 / 2 * 2 * 6800, "sums": 6800 / 2},
        ),
        (
            "vocabulary",
            4,
            {
                "weights": 3 / 4 * 2 * 2 * 2400,
                "gradients": 3 / 4 * 2 * 5600,
                "head": 3 / 4 * 2 * 50 * 10 * 2,
            },
        ),
        ("context", 4, {"sums": 1.5 * 6800, "context": 1 / 2 * 2 * 30 * 40 * 2}),
    ],
)
def test_what_a_scheme_cannot_do_without(
    scheme: str, processes: int, parts: dict[str, float]
) -> None:
    """Two rows and thirty tokens a rank, fifty scored in all: 1700 weights in bf16, gradients in
    fp32.
    """
    found = ideal(scheme, processes, MODEL, rows=2, tokens=30, scored=50)
    assert found == pytest.approx(parts, rel=1e-12)
    assert set(SCHEMES) == {"replicate", "fsdp", "hsdp", "vocabulary", "context"}


def test_every_speed_has_what_it_is_compared_with() -> None:
    """Before it, in the same repetition."""
    speeds: dict[Any, float] = {}
    cases = list(time_cases(parse(["--processes", "1,2,4", "--pairs", "4"])))
    assert ("weak", "trl", "replicate", 4, 4) in cases
    assert ("strong", "fastdpo", "replicate", 2, 8) in cases
    for scaling, provider, scheme, processes, _ in cases:
        # Two cores: four processes are as fast as two, together nine tenths of that.
        cores = min(processes, 2)
        speed = cores if scheme in ("one", "apart") else 0.9 * cores
        speeds[scaling, provider, scheme, processes] = speed
        found = beside_one(speeds, scaling, provider, scheme, processes)
        if scheme not in ("one", "apart"):
            expected = {"speedup": speed, "efficiency": speed / processes, "of_cores": 0.9}
            assert found == pytest.approx(expected)


def made(kind: str, scheme: str, processes: int, **more: Any) -> dict[str, Any]:
    case = {"provider": more.pop("provider", "fastdpo"), "scheme": scheme, "dtype": "fp32"}
    case |= {"processes": processes, "pairs_a_process": 4}
    return {"kind": kind, "case": case, "load": 2.0, **FACTS, **more}


def test_the_page(tmp_path: Path) -> None:
    assert scaling_block(tmp_path) == "Not measured yet."
    fast = {"tokens_per_s": 900.0, "pairs_per_s": 3.0, "efficiency": 0.45, "of_cores": 0.9}
    fast |= {"scaling": "weak", "loss": [0.69, 0.7]}
    held = {"weights": 4e6, "gradients": 4e6, "states": 8e6, "all": 17e6}
    rows = [
        made("time", "replicate", 2, **fast),
        made("time", "replicate", 2, **fast | {"of_cores": 0.92}),
        made("time", "replicate", 2, provider="trl", **fast),
        made("time", "fsdp", 2, provider="trl", scaling="weak", error="Unsupported: no FSDP"),
        made("time", "fsdp", 2, **fast | {"loss": [0.69, 0.8]}),
        made("bytes", "fsdp", 4, sent={"a": 3e6}, ideal={"b": 2.9e6}, rows=[2, 2], over_ideal=1.03),
        made("memory", "one", 1, held=held, beyond=5e6),
        made("memory", "fsdp", 4, held={k: v / 4 for k, v in held.items()}, beyond=7e6),
    ]
    write_rows(tmp_path / "scaling-cpu.jsonl", rows)
    text = scaling_block(tmp_path)
    line = "| weak | fastdpo | 2 | 4 | replicate | 900 (900–900) | 3.00 (3.00–3.00) |"
    assert f"{line} 0.45 (0.45–0.45) | 0.91 (0.90–0.92) | 2.0 |" in text
    assert "| weak | TRL, accelerate | 2 | 4 | fsdp | unsupported |" in text
    assert (
        "| weak | fastdpo | 2 | 4 | fsdp | refused: losses of fastdpo and trl are 1.0e-01" in text
    )
    assert "| fsdp | 4 | 2.0 | 3.00 | 2.90 | 1.0300 |" in text
    assert "| fsdp | 4 | 1.0 | 1.0 | 2.0 | 0.2500 | 0.2 | 11.2 | 2.0 |" in text
