"""The registry of other trainers, a job's way to one and back, and their shared tokenization."""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.jsonl import write_rows
from bench.trainers import peers, process
from bench.trainers.clock import Clock, Unsupported
from bench.trainers.peers import common
from bench.trainers.process import Failed, run_job

JOB = {
    "provider": "fake",
    "model": "m",
    "rows": "r.jsonl",
    "steps": 2,
    "pairs_per_step": 4,
    "batch": 2,
    "learning_rate": 1e-6,
    "reference": "online",
}


def _fake(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """A peer `fake` whose interpreter is a script that gets `-m MODULE JOB.json`."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\nimport json, os, signal, sys\n{body}", encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    fake = peers.Peer("bench.trainers.peers.fake", {"no-such-thing": "1"}, "pip install x")
    monkeypatch.setitem(peers.PEERS, "fake", fake)
    monkeypatch.setenv(peers.variable("fake"), str(script))


@pytest.mark.parametrize("name", sorted(peers.PEERS))
def test_registry(name: str) -> None:
    peer = peers.PEERS[name]
    assert Path(*peer.module.split(".")).with_suffix(".py").is_file()
    assert peer.recipe.startswith(f"pip install {next(iter(peer.needs))}==")
    assert "/" not in peer.recipe


def test_variable_is_one_that_a_shell_takes() -> None:
    assert peers.variable("trl-1.9-liger") == "FASTDPO_BENCH_TRL_1_9_LIGER_PYTHON"


def test_interpreter_is_the_named_one_or_this_one_with_the_tried_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, version in (("here", ""), ("old", "0.0.")):
        peer = peers.Peer(f"bench.{name}", {"pytest": version}, "pip install pytest")
        monkeypatch.setitem(peers.PEERS, name, peer)
        monkeypatch.delenv(peers.variable(name), raising=False)
    assert peers.interpreter("here") == sys.executable
    assert peers.interpreter("old") is None
    monkeypatch.setenv(peers.variable("old"), sys.executable)
    assert peers.interpreter("old") == sys.executable
    monkeypatch.setenv(peers.variable("old"), "/no/such/python")
    assert peers.interpreter("old") is None
    with pytest.raises(KeyError):
        peers.interpreter("never heard of")


def test_not_installed_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peers.variable("llamafactory"), "/no/such/python")
    with pytest.raises(Failed, match=r"^NotInstalled: .*pip install llamafactory==.*_PYTHON"):
        run_job({**JOB, "provider": "llamafactory"})


def test_job_reaches_the_peer_and_its_report_comes_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    _fake(
        monkeypatch,
        tmp_path,
        "job = json.load(open(sys.argv[3]))\n"
        "print('a line of the trainer')\n"
        "print(json.dumps({'step_s': [1, 2], 'loss': [0.6, 0.5], 'tokens': [3, 4], 'job': job,"
        " 'call': sys.argv[1:3], 'cwd': os.getcwd(), 'path': os.environ.get('PYTHONPATH')}))\n",
    )
    report = run_job(JOB)
    assert report["loss"] == [0.6, 0.5]
    assert {key: report["job"][key] for key in JOB} == JOB
    assert report["call"] == ["-m", "bench.trainers.peers.fake"]
    assert os.path.samefile(report["cwd"], process.ROOT)
    assert report["path"] is None
    assert not Path(report["job"]["output"]).parent.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "sys.exit('Traceback\\nbench.Unsupported: it cannot\\n a hint')",
            "^Unsupported: it c",
        ),
        ("sys.exit('[rank0]: ValueError: of one process\\n[W] the end')", "^ValueError: of one"),
        ("sys.exit('UserWarning: old\\nlast words')", "^last words"),
        ("sys.exit('torch.OutOfMemoryError: CUDA out of memory.')", "^OutOfMemory: CUDA"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "^OutOfMemory: killed"),
        ("print('no report')", "^NoReport: the last line"),
        ("print(json.dumps({'step_s': [1], 'loss': [1], 'tokens': [1]}))", "2 were asked for"),
    ],
)
def test_failures_are_errors_with_their_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, message: str
) -> None:
    _fake(monkeypatch, tmp_path, body)
    with pytest.raises(Failed, match=message):
        run_job(JOB)


class _Words:
    """A tokenizer of one token a word that ends texts with `<eos>`."""

    eos_token = "<eos>"

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str) -> dict[str, list[int]]:
        words = text.replace("<eos>", " <eos>").split()
        return {"input_ids": [self.known.setdefault(word, len(self.known)) for word in words]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False, **more: Any
    ) -> dict[str, list[int]]:
        text = " ".join(f"[{m['role']}] {m['content']}" for m in messages)
        return self(text + (" [assistant]" if add_generation_prompt else ""))


def _job(folder: Path, rows: list[dict[str, Any]], **more: Any) -> common.Job:
    path = folder / "rows.jsonl"
    write_rows(path, rows)
    values = {**JOB, "rows": str(path), "output": str(folder), "batch": 1, **more}
    return common.Job(**{name: value for name, value in values.items() if name != "provider"})


def test_strings_end_once_are_cut_and_dropped_as_trl_does(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a b c d", "chosen": " e", "rejected": " f"},
        {"prompt": "a b", "chosen": " c", "rejected": " c d<eos>"},
        {"prompt": "a b", "chosen": " c d e f", "rejected": " g"},
    ]
    job = _job(tmp_path, rows, steps=2, pairs_per_step=1, max_length=4)
    tokenizer = _Words()
    first, second = common.token_rows(job, tokenizer)
    words = {number: word for word, number in tokenizer.known.items()}
    text = {key: [words.get(i, "-") for i in ids] for key, ids in first.items()}
    assert text["chosen_input_ids"] == ["a", "b", "c", "<eos>"]
    assert text["chosen_labels"] == ["-", "-", "c", "<eos>"]
    assert text["rejected_input_ids"] == ["a", "b", "c", "d"]
    assert [words[i] for i in second["rejected_input_ids"]] == ["a", "b", "g", "<eos>"]


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    messages = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    row = {"prompt": [{"role": "user", "content": "hi"}], **messages}
    tokenizer = _Words()
    (found,) = common.token_rows(_job(tmp_path, [row], steps=1, pairs_per_step=1), tokenizer)
    words = list(tokenizer.known)
    assert [words[i] for i in found["chosen_input_ids"]] == [
        "[user]",
        "hi",
        "[assistant]",
        "chosen",
    ]
    assert found["rejected_labels"][:3] == [-100] * 3
    assert words[found["rejected_labels"][3]] == "rejected"


def test_too_few_rows_and_uneven_batches_are_refused(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match="8 rows, 1 are there"):
        common.token_rows(_job(tmp_path, [row]), _Words())
    with pytest.raises(ValueError, match="no multiple"):
        _ = _job(tmp_path, [row], batch=3).accumulation
    with pytest.raises(Unsupported, match="every step"):
        _job(tmp_path, [row], reference="precomputed").only_online("It")


def test_job_is_read_without_what_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    job = {**JOB, "output": "o", "repetition": 3}
    path.write_text(json.dumps(job), encoding="utf-8")
    read = common.read_job([str(path)])
    assert all(getattr(read, name) == JOB[name] for name in JOB if name != "provider")
    path.write_text(json.dumps({**job, "lora": True}), encoding="utf-8")
    with pytest.raises(Unsupported, match="adapter"):
        common.read_job([str(path)])


def test_clock_counts_tokens_that_are_trained() -> None:
    clock, embedding, other = Clock(), torch.nn.Embedding(10, 2), torch.nn.Embedding(10, 2)
    with torch.no_grad():
        other(torch.zeros(9, 9, dtype=torch.long))
    embedding(torch.zeros(2, 3, dtype=torch.long))
    with torch.no_grad():
        embedding(torch.zeros(9, 9, dtype=torch.long))
    clock.stop()
    embedding(torch.zeros(1, 4, dtype=torch.long))
    clock.stop({"loss": 0.5})
    assert clock.tokens == [6, 4]
    assert all(seconds > 0 for seconds in clock.seconds)
    assert clock.report("fp32")["loss"] == [0.5]
