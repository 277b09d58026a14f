"""Bad disks, directories and environments: what `fastdpo train` has to say of each."""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import Case

from fastdpo import files


def place(
    what: str, prepare: Callable[[Path, pytest.MonkeyPatch], object], expected: str, *flags: str
) -> Case:
    """A disk, a directory or an environment."""
    return Case(what, expected, ("train", "config.yaml", *flags), prepare)


def refuse(name: str, code: int) -> Callable[[Path, pytest.MonkeyPatch], object]:
    """From now on a function of `os` fails so."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        def refused(*args: Any, **kwargs: Any) -> None:
            raise OSError(code, os.strerror(code))

        patch.setattr(os, name, refused)

    return prepare


def _unwritable(path: Path, patch: pytest.MonkeyPatch) -> None:
    real = os.access
    patch.setattr(os, "access", lambda p, mode, **k: "out" not in str(p) and real(p, mode, **k))


def _no_memory(path: Path, patch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")

    patch.setattr("fastdpo.training.references.add_adapter", fails)


def _earlier(state: bytes) -> Callable[[Path, pytest.MonkeyPatch], object]:
    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        (path / "out" / "trainer_state.json").write_bytes(state)

    return prepare


def _somebodys(path: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.copytree(path / "model", path / "mine")


def _strange_checkpoint(path: Path, patch: pytest.MonkeyPatch) -> None:
    (path / "out" / "checkpoint-9").mkdir()
    (path / "out" / "checkpoint-9" / "model.safetensors").write_bytes(b"mine")


def _holding(path: Path, patch: pytest.MonkeyPatch) -> None:
    held = files.locked(path / "out")
    held.__enter__()
    patch.setattr(Held, "now", held)


class Held:
    """A lock that outlives the preparation."""

    now: Any = None


def env(**values: str) -> Callable[[Path, pytest.MonkeyPatch], object]:
    """Sets variables of the environment."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        for name, value in values.items():
            patch.setenv(name, value)

    return prepare


def absent(*modules: str) -> Callable[[Path, pytest.MonkeyPatch], object]:
    """As if these were not installed."""

    def prepare(path: Path, patch: pytest.MonkeyPatch) -> None:
        for name in modules:
            patch.setitem(sys.modules, name, None)

    return prepare


def offline(path: Path, patch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 makes it, which is read when the library is imported."""
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def no_network(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the hub's address."""
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    patch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")


def nothing(path: Path, patch: pytest.MonkeyPatch) -> None:
    """As it is."""


CACHE = "datasets.config.HF_DATASETS_CACHE"
DISKS = [
    place(
        "output_dir is a file",
        nothing,
        "output_dir: pairs.jsonl cannot be made",
        "--output_dir=pairs.jsonl",
    ),
    place(
        "output_dir below a file",
        nothing,
        "output_dir: pairs.jsonl/out cannot be made",
        "--output_dir=pairs.jsonl/out",
    ),
    place(
        "output_dir in /proc",
        nothing,
        "output_dir: /proc/out cannot be made",
        "--output_dir=/proc/out",
    ),
    place("output_dir is unwritable", _unwritable, "output_dir: out cannot be written to"),
    place("output_dir is held", _holding, "output_dir: another run is writing to out"),
    place(
        "output_dir holds a run",
        nothing,
        "output_dir: out holds another run; choose another",
        "--no_overwrite_output_dir",
    ),
    place(
        "output_dir holds a model",
        _somebodys,
        "output_dir: mine holds chat_template.jinja, config.json…no run of fastdpo",
        "--output_dir=mine",
    ),
    place(
        "output_dir holds the model",
        nothing,
        "output_dir: model_name_or_path model lies in",
        "--output_dir=model",
    ),
    place(
        "the model lies in output_dir",
        nothing,
        "output_dir: model_name_or_path out lies in",
        "--model_name_or_path=out",
    ),
    place(
        "the reference lies in output_dir",
        nothing,
        "output_dir: ref_model_name_or_path out/check",
        "--ref_model_name_or_path=out/checkpoint-1",
    ),
    place(
        "a strange checkpoint",
        _strange_checkpoint,
        "output_dir: out holds checkpoint-9, which no run",
    ),
    place("the cache is a file", nothing, "pairs.jsonl…", "--reference_cache_dir=pairs.jsonl"),
    place(
        "XDG_CACHE_HOME is a file",
        lambda path, patch: patch.setenv("XDG_CACHE_HOME", str(path / "pairs.jsonl")),
        "…pairs.jsonl/fastdpo/reference…",
    ),
    place("the disk is full", refuse("fsync", errno.ENOSPC), "…the disk is full"),
    place(
        "no memory for an adapter",
        _no_memory,
        "there is not enough memory for model, adapter",
        "--use_peft",
    ),
    place(
        "the state of a run of numbers",
        _earlier(b'{"files": 5, "step": 1}'),
        "output_dir: out holds …no run of fastdpo",
    ),
    place(
        "the state of a run elsewhere",
        _earlier(b'{"files": ["/etc/hosts"], "step": 1}'),
        "output_dir: out holds …no run of fastdpo",
    ),
    place("the quota is reached", refuse("replace", errno.EDQUOT), "…the disk is full"),
    place(
        "the disk is read-only",
        refuse("mkdir", errno.EROFS),
        "output_dir: new cannot be made (Read-only",
        "--output_dir=new",
    ),
    place(
        "the disk has errors", refuse("fsync", errno.EIO), "…cannot be written (Input/output error)"
    ),
]

ENVIRONMENT = [
    place(
        "the cache of data sets is a file",
        lambda path, patch: patch.setattr(
            "datasets.config.HF_DATASETS_CACHE", path / "config.yaml"
        ),
        "pairs.jsonl: …config.yaml…: cannot be read or written (…); HF_DATASETS_CACHE",
    ),
    place(
        "two processes",
        env(WORLD_SIZE="2", RANK="0"),
        "LOCAL_RANK: expected a number, …got nothing",
    ),
    place("WORLD_SIZE of text", env(WORLD_SIZE="two"), "WORLD_SIZE: expected a number, …got two"),
    place("a hub model offline", offline, "…someone/model…", "--model_name_or_path=someone/model"),
    place(
        "a hub reference offline",
        offline,
        "…someone/model…",
        "--ref_model_name_or_path=someone/model",
    ),
    place("hub data offline", offline, "someone/pairs: …", "--dataset_name=someone/pairs"),
    place(
        "a hub model without network",
        no_network,
        "…someone/model…",
        "--model_name_or_path=someone/model",
    ),
    place(
        "hub data without network", no_network, "someone/pairs: …", "--dataset_name=someone/pairs"
    ),
    place(
        "no such name on any hub",
        nothing,
        "a b (no directory here, so a model of the hub): no model could be loaded",
        "--model_name_or_path=a b",
    ),
    place("wandb is missing", absent("wandb"), "--report_to: wandb …", "--report_to=wandb"),
    place("trackio is missing", absent("trackio"), "--report_to: trackio …", "--report_to=trackio"),
    place(
        "tensorboard is missing",
        absent("tensorboard", "torch.utils.tensorboard"),
        "--report_to: tensorboard …",
        "--report_to=tensorboard",
    ),
    place(
        "bitsandbytes is missing",
        absent("bitsandbytes"),
        "optim: adamw_bnb_8bit needs bitsandbytes: pip install",
        "--optim=adamw_bnb_8bit",
    ),
    place(
        "torchao is missing",
        absent("torchao", "torchao.optim"),
        "optim: adamw_torch_8bit needs torchao: pip install",
        "--optim=adamw_torch_8bit",
    ),
    place(
        "bitsandbytes is missing for a base",
        absent("bitsandbytes"),
        "load_in_4bit needs bitsandbytes: pip install",
        "--load_in_4bit",
        "--use_peft",
    ),
]


CASES = [*DISKS, *ENVIRONMENT]
