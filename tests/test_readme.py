"""What README.md and CONTRIBUTING.md show is there and works."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fastdpo_kernels import LOSSES, Comparisons, register_loss

from fastdpo.cli import COMMANDS
from fastdpo.config import TrainConfig
from fastdpo.config.declare import default_of
from fastdpo.config.inputs import OwnKeys
from fastdpo.config.memory import MemoryKeys

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_example_of_the_kernels_runs() -> None:
    (code,) = blocks(README, "python")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logps"].shape == names["targets"].shape
    assert torch.isfinite(names["loss"])
    assert names["weight"].grad.abs().sum() > 0


def test_the_imports_of_other_trainers_exist() -> None:
    added = re.findall(r"^\+ (from .*)$", "\n".join(blocks(README, "diff")), re.MULTILINE)
    names: dict[str, Any] = {}
    exec("\n".join(added), names)
    assert {"patch_trl", "LigerFusedLinearDPOLoss"} <= set(names)


def test_the_example_of_a_loss_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(CONTRIBUTING, "python")
    monkeypatch.delitem(LOSSES, "my_loss", raising=False)
    names: dict[str, Any] = {
        "register_loss": register_loss,
        "Comparisons": Comparisons,
        "Tensor": torch.Tensor,
        "torch": torch,
    }
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    try:
        zero, one = torch.zeros(2), torch.ones(2)
        pairs = Comparisons(zero, zero, zero, zero, one, one)
        assert LOSSES["my_loss"](pairs, beta=0.1, label_smoothing=0.0).tolist() == [1.0, 1.0]
    finally:
        del LOSSES["my_loss"]


def test_the_configuration_shown_is_valid() -> None:
    (text,) = blocks(README, "yaml")
    config = TrainConfig.from_dict(yaml.safe_load(text))
    assert config.beta == 0.1


@pytest.mark.parametrize(
    ("keys", "start", "end"),
    [
        (OwnKeys, "These are our own:", "Where a TRL user"),
        (MemoryKeys, "What a run keeps in memory", "## The repository"),
    ],
)
def test_keys_are_listed_with_their_defaults(keys: Any, start: str, end: str) -> None:
    section = README.split(start)[1].split(end)[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    declared = {name: default_of(item) for name, item in TrainConfig.key_fields().items()}
    assert {item.name for item in fields(keys)} <= set(shown) <= set(declared)
    for name in shown:
        default = declared[name]
        if default is not None:
            assert shown[name] == f"`{yaml.safe_dump(default).split()[0]}`"


def test_every_loss_is_listed() -> None:
    listed = re.search(r"^- Losses: (.*?) and mixes", README, re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == set(LOSSES)


def test_commands_and_targets_exist() -> None:
    used = set(re.findall(r"fastdpo (\w+)", "\n".join(blocks(README, "sh"))))
    used |= set(re.findall(r"^\| `fastdpo (\w+)`", README, re.MULTILINE))
    assert used == set(COMMANDS)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets


def test_every_path_of_the_tree_exists() -> None:
    tree = README.split("## The repository\n\n```\n")[1].split("```")[0]
    parents: list[Path] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        names = re.match(r"((?:[\w.]+/?)+(?:  [\w.]+\.py)*)", line.strip())
        assert names is not None, line
        for name in names[1].split():
            path = Path(*parents[:depth], name)
            assert (ROOT / path).exists(), path
        parents[depth:] = [Path(names[1].split()[0])]


def test_links_lead_somewhere() -> None:
    for text in (README, CONTRIBUTING):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / target).exists(), target
