"""What ends one rank ends all of them, is said once, and names the rank."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ends import ODD, STEP, Ending, ended
from ranks import Ranks, free_port, ranks
from safetensors.torch import load_file
from training import run, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.parallel.pace import Pace
from fastdpo.parallel.world import World

SIZE = 2
HERE = f"rank {ODD} ({socket.gethostname()})"
ENDED_WITHIN_S = 30


@pytest.fixture(scope="module")
def started() -> Iterator[Ranks]:
    with ranks(SIZE) as made:
        yield made


@pytest.fixture
def keys(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> dict[str, Any]:
    return settings(tiny_model, pairs_file, tmp_path / "out", ddp_timeout=60)


def endings(
    started: Ranks,
    keys: dict[str, Any],
    what: str,
    other: dict[str, Any] | None = None,
    everywhere: bool = False,
) -> list[Ending]:
    return started(SIZE, ended, keys, other or {}, what, everywhere)


def speakers(found: list[Ending]) -> list[int]:
    return [rank for rank, one in enumerate(found) if one["error"] and not one["said"]]


def test_only_the_first_rank_writes_and_talks(
    started: Ranks, keys: dict[str, Any], tmp_path: Path
) -> None:
    nowhere = tmp_path / "another host's"
    found = endings(started, keys, "", {"output_dir": str(nowhere)})
    assert [one["step"] for one in found] == [4, 4]
    assert found[ODD]["written"] == ""
    assert not nowhere.exists()
    assert (tmp_path / "out/model.safetensors").exists()


def test_an_error_of_the_program_is_raised_where_it_happened_and_known_everywhere(
    started: Ranks, keys: dict[str, Any]
) -> None:
    found = endings(started, keys, "bug")
    assert [one["error"] for one in found] == ["OtherRankError", "ZeroDivisionError"]
    assert f"{HERE} failed: ZeroDivisionError: a bug" in found[0]["text"]
    assert speakers(found) == [ODD]


def test_an_error_of_the_users_on_one_rank_names_it(started: Ranks, keys: dict[str, Any]) -> None:
    found = endings(started, keys, "error")
    assert [one["error"] for one in found] == ["OtherRankError", "DataError"]
    assert {one["text"] for one in found} == {f"{HERE}: rows.jsonl: gone"}
    assert speakers(found) == [ODD]


def test_an_error_of_the_users_on_every_rank_is_said_once_without_one(
    started: Ranks, keys: dict[str, Any]
) -> None:
    found = endings(started, keys, "error", everywhere=True)
    assert {(one["error"], one["text"]) for one in found} == {("DataError", "rows.jsonl: gone")}
    assert speakers(found) == [0]


def test_an_interruption_interrupts_all(started: Ranks, keys: dict[str, Any]) -> None:
    found = endings(started, keys, "interruption")
    assert [one["error"] for one in found] == ["KeyboardInterrupt"] * SIZE


def test_a_rank_that_stays_away_is_named(started: Ranks, keys: dict[str, Any]) -> None:
    found = endings(started, keys | {"ddp_timeout": 6}, "late")
    for one in found:
        assert one["text"].startswith(f"{HERE} has not come in 6 s to where the others wait")
    assert speakers(found) == [0]


@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
def test_what_is_not_finite_on_one_rank_leaves_all_weights_as_they_were(
    started: Ranks, keys: dict[str, Any], mode: str
) -> None:
    found = endings(started, keys | {"data_parallel": mode}, "nan")
    for one in found:
        assert one["error"] == "FastDPOError"
        assert one["text"].startswith(f"step {STEP + 1}: ")
        assert f" is nan; stopped with the weights of step {STEP}" in one["text"]
        assert one["unchanged"]
    assert speakers(found) == [0]


@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
def test_a_slow_rank_is_named(started: Ranks, keys: dict[str, Any], mode: str) -> None:
    """Though all ranks take as long for a step, since they wait for it."""
    keys |= {"data_parallel": mode, "logging_steps": 2, "max_steps": 8}
    found = endings(started, keys, "slow")
    assert [len(one["logged"]) for one in found] == [1, 0]
    assert found[0]["logged"][0].startswith(f"{HERE} is slow")


def test_a_rank_is_named_once_in_a_hundred_steps_where_it_is_slow_enough() -> None:
    class Found(World):
        def gather_all(self, value: Any) -> list[Any]:
            return [(seconds, "host") for seconds in times]

    pace = Pace(Found(size=4), torch.device("cpu"), [])
    times = [1.0, 1.2, 1.0, 0.9]
    assert pace.slowest(10) is None
    times = [1.0, 1.2, 2.0, 0.9]
    assert str(pace.slowest(20)).startswith("rank 2 (host) is slow")
    assert pace.slowest(30) is None
    assert pace.slowest(120) is not None
    times = [1e-3, 1e-3, 9e-3, 1e-3]
    assert pace.slowest(900) is None


def test_other_keys_data_or_weights_on_a_rank_end_the_run_before_its_first_step(
    started: Ranks, keys: dict[str, Any], pairs_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    rows = pairs_file.read_text(encoding="utf-8").splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[1:], rows[0]]))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    for key, value, says in (
        ("beta", 0.7, f"{HERE}: beta: expected 0.1, as on rank 0, got 0.7"),
        ("dataset_name", str(tmp_path / "rows.jsonl"), "other rows, or a tokenizer"),
        ("model_name_or_path", str(tmp_path / "model"), f"other weights on {HERE} than"),
    ):
        found = endings(started, keys, "", {key: value})
        assert all(says in one["text"] and HERE in one["text"] for one in found), found
        assert speakers(found) == [0]
    assert not (tmp_path / "out").exists()


def command(keys: dict[str, Any], folder: Path) -> list[str]:
    (folder / "run.yaml").write_text(json.dumps(keys))  # which is YAML too
    return ["-m", "fastdpo", "train", str(folder / "run.yaml")]


def begin(arguments: list[str], log: Path) -> subprocess.Popen:
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "kernels"), str(root / "tests")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-u", *arguments], env=environment, stdout=file, stderr=file
        )


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """The processes of the ranks that a launcher has started."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _parent(folder) == process.pid:
            variables = (folder / "environ").read_bytes().split(b"\0")
            for name, _, value in (variable.partition(b"=") for variable in variables):
                if name == b"RANK":
                    found[int(value)] = int(folder.name)
    return found


def _parent(folder: Path) -> int | None:
    try:
        state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)


def test_a_killed_rank_and_an_interruption_end_every_process(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    """Of two runs at once, since each takes seconds to start."""
    keys |= {"devices": 2, "max_steps": 10**6}
    begun = []
    for name in ("killed", "interrupted"):
        (tmp_path / name).mkdir()
        arguments = command(keys | {"output_dir": str(tmp_path / name / "out")}, tmp_path / name)
        begun.append((begin(arguments, tmp_path / name / "log"), tmp_path / name / "log"))
    for process, log in begun:
        wait_for("step 3/", log, process)
    members = [ranks_of(process) for process, _ in begun]
    assert [sorted(one) for one in members] == [[0, 1]] * 2
    os.kill(members[0][ODD], signal.SIGKILL)
    os.kill(begun[1][0].pid, signal.SIGINT)
    assert [process.wait(ENDED_WITHIN_S) for process, _ in begun] == [128 + signal.SIGKILL, 130]
    pid = members[0][ODD]
    said = f"error: rank {ODD} ({socket.gethostname()}, process {pid}) was ended by SIGKILL"
    for (_, log), expected in zip(begun, (said, "interrupted"), strict=True):
        last = log.read_text().splitlines()[-1]
        assert last.startswith(expected)
        assert log.read_text().count("\nerror: ") == (expected is said)
        assert "Traceback" not in log.read_text()
    assert not any(Path(f"/proc/{pid}").exists() for one in members for pid in one.values())


def test_a_rank_does_not_outlive_its_launcher(tmp_path: Path) -> None:
    child = "from fastdpo.parallel.orphan import end_with_parent as e; e(); print(1); input()"
    parent = (
        "import os, subprocess, sys, time\n"
        "os.environ['FASTDPO_LAUNCHER'] = str(os.getpid())\n"
        f"p = subprocess.Popen([sys.executable, '-u', '-c', {child!r}], stdin=subprocess.PIPE)\n"
        "print('child', p.pid, flush=True); time.sleep(60)"
    )
    process = begin(["-c", parent], tmp_path / "log")
    wait_for("\n1", tmp_path / "log", process)
    pid = int((tmp_path / "log").read_text().split()[1])
    process.kill()
    process.wait()
    end = time.monotonic() + ENDED_WITHIN_S
    while _parent(Path(f"/proc/{pid}")) is not None:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_hosts_that_torchrun_restarts_go_on_from_the_last_checkpoint(
    keys: dict[str, Any], tmp_path: Path, tiny_model: Path, pairs_file: Path
) -> None:
    """Two agents of one rank each, as on two hosts; one kills itself at step 3 of the first
    attempt, and the second goes on from the checkpoint of step 2.
    """
    keys |= {"global_batch_size": 6, "save_strategy": "steps", "save_steps": 2}
    run(tiny_model, pairs_file, tmp_path / "one", **{**keys, "output_dir": str(tmp_path / "one")})
    agents = []
    endpoint = f"localhost:{free_port()}"
    for name in ("first", "second"):
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        torchrun += ["--max-restarts", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
        torchrun += [str(Path(__file__).parent / "dies.py"), *command(keys, tmp_path)[2:]]
        agents.append(begin(torchrun, tmp_path / name))
    assert [agent.wait(120) for agent in agents] == [0, 0]
    said = (tmp_path / "first").read_text() + (tmp_path / "second").read_text()
    assert said.count("resumed at step 2") == 1
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "out"))
    for name, weight in ours.items():
        assert (theirs[name] - weight).norm() / weight.norm() < 1e-6, name
