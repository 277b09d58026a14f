"""Two hosts on one machine: network namespaces joined by a cable, with a name of its own each.

    fastdpo bench hosts

Two torchrun agents of two ranks each meet over TCP, as on two machines, and train a small model in
each mode; `error` is the largest relative error of a weight beside a run of one process. A rank of
the second host is killed in one more run; `seconds` is what passes until every process of the first
has ended, and `said` what its user reads. Needs Linux with `unshare` (user namespaces) and `ip`.

Rows go to bench/results/hosts.jsonl, one a run.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo import TrainConfig, train

from .cli import Parser
from .report import record

HOSTS = {"left": "10.77.0.1", "right": "10.77.0.2"}
INSIDE = "FASTDPO_BENCH_HOSTS"
MODES = {
    "replicate": {"data_parallel": "replicate"},
    "fsdp": {"data_parallel": "fsdp"},
    "hsdp": {"data_parallel": "hsdp"},
}
STEPS = 6
SECONDS = 300


def join_hosts() -> None:
    """Make the namespaces and the cable between them, and their names known to both."""
    names = Path("/run/hosts")
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in HOSTS.items())]
    names.write_text("\n".join(lines) + "\n")
    for line in (
        f"mount --bind {names} /etc/hosts",
        "ip netns add left",
        "ip netns add right",
        "ip link add cl type veth peer name cr",
        "ip link set cl netns left",
        "ip link set cr netns right",
        f"ip -n left addr add {HOSTS['left']}/24 dev cl",
        f"ip -n right addr add {HOSTS['right']}/24 dev cr",
        "ip -n left link set lo up",
        "ip -n right link set lo up",
        "ip -n left link set cl up",
        "ip -n right link set cr up",
    ):
        subprocess.run(shlex.split(line), check=True)


def begin(host: str, keys: Path, port: int, log: Path) -> subprocess.Popen:
    """A torchrun agent on a host, with two ranks."""
    inner = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    inner += ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_id", str(port)]
    inner += ["--rdzv_endpoint", f"{HOSTS['left']}:{port}", "--local_addr", HOSTS[host]]
    inner += ["-m", "fastdpo", "train", str(keys)]
    named = f"hostname {host}; exec {shlex.join(inner)}"
    command = ["ip", "netns", "exec", host, "unshare", "-u", "bash", "-c", named]
    interface = {"left": "cl", "right": "cr"}[host]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def run(keys: dict[str, Any], folder: Path, port: int, kill: bool = False) -> dict[str, Any]:
    """A run on both hosts; with `kill`, the last rank is killed after a few steps."""
    folder.mkdir()
    file, logs = folder / "keys.yaml", {host: folder / f"{host}.log" for host in HOSTS}
    file.write_text(json.dumps({**keys, "output_dir": str(folder / "out")}))
    agents = {host: begin(host, file, port, log) for host, log in logs.items()}
    end = time.monotonic() + SECONDS
    while kill and "step 3/" not in logs["left"].read_text():
        assert time.monotonic() < end, logs["left"].read_text()
        time.sleep(0.1)
    if kill:
        os.kill(_pid_of_rank(3, agents["right"].pid), signal.SIGKILL)
    start = time.monotonic()
    codes = [agent.wait(SECONDS) for agent in agents.values()]
    said = [line for line in logs["left"].read_text().splitlines() if line.startswith("error: ")]
    assert kill or codes == [0, 0], logs["left"].read_text() + logs["right"].read_text()
    return {"codes": codes, "seconds": time.monotonic() - start, "said": said}


def _pid_of_rank(rank: int, agent: int) -> int:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                group = os.getpgid(int(folder.name))
            except OSError:
                continue
            if f"RANK={rank}".encode() in variables and group != agent:
                return int(folder.name)
    raise AssertionError(f"rank {rank} is not running")


def error(one: Path, other: Path) -> float:
    """The largest relative error of a weight."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    errors = [(theirs[n].double() - w.double()).norm() / w.double().norm() for n, w in ours.items()]
    return float(max(errors))


def made(folder: Path) -> dict[str, Any]:
    """A small model and preference pairs; the keys of a run on them."""
    words = [f"w{number}" for number in range(200)]
    known = {word: number for number, word in enumerate(["<pad>", "<eos>", *words])}
    core = Tokenizer(WordLevel(known, unk_token="<pad>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(known),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    LlamaForCausalLM(shape).double().save_pretrained(folder / "model")
    draw = random.Random(0)
    texts = [
        [" ".join(draw.choices(words, k=draw.randint(3, 30))) for _ in "pcr"] for _ in "x" * 64
    ]
    rows = [dict(zip(("prompt", "chosen", "rejected"), text, strict=True)) for text in texts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "reference_cache_dir": str(folder / "reference"),
        "dtype": "auto",
        "global_batch_size": 16,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def measured(folder: Path) -> Iterator[dict[str, Any]]:
    """A row of each mode beside one process, and of a rank that is killed."""
    keys = made(folder)
    train(TrainConfig.from_dict({**keys, "output_dir": str(folder / "one")}))
    for port, (mode, more) in enumerate(MODES.items(), 29500):
        found = run(keys | more, folder / mode, port)
        found["error"] = error(folder / "one", folder / mode / "out")
        yield {"case": mode, "hosts": 2, "ranks": 4} | found
    found = run(keys | {"max_steps": 10**6}, folder / "killed", 29600, kill=True)
    yield {"case": "a rank killed", "hosts": 2, "ranks": 4} | found


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the hosts, run every case, write a row for each and print it."""
    parser = Parser("fastdpo bench hosts", __doc__)
    options = parser.parse_args(arguments)
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        inner = [sys.executable, "-m", "bench.hosts", *(arguments or sys.argv[1:])]
        script = f"mount -t tmpfs none /run && exec {shlex.join(inner)}"
        # Processes of a namespace end with it: a measurement that is broken off leaves none behind.
        flags = ["-Urnmpf", "--mount-proc", "--kill-child"]
        os.execvp("unshare", ["unshare", *flags, "bash", "-c", script])
    join_hosts()
    results = record.Results("hosts", options)
    with tempfile.TemporaryDirectory() as name:
        for row in measured(Path(name)):
            results.add(**row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
