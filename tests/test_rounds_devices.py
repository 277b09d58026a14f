"""Rounds whose training has several processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rounds_settings import rounds_settings
from training import metrics, weights

from fastdpo.config.rounds import RoundsConfig
from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.rounds.loop import rounds


@pytest.fixture
def settings(still_model: Path, tmp_path: Path, monkeypatch) -> dict[str, Any]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prompts = [{"prompt": f"yes no {'big ' * (i % 3)}{i}"} for i in range(5)]
    keys = {"rounds": 1, "num_generations": 4, "eval_prompts": 1, "loss_type": ["sppo"]}
    keys |= {"global_batch_size": 8, "logging_steps": 1}
    return rounds_settings(still_model, tmp_path, prompts) | keys


def test_two_processes_train_what_one_does(settings, tmp_path):
    found = {}
    for devices in (1, 2):
        out = tmp_path / f"on-{devices}"
        config = RoundsConfig(**settings | {"devices": devices, "output_dir": str(out)})
        found[devices] = rounds(config).rounds[1]
    for name in ("score", "rows", "kl"):
        assert found[2][name] == pytest.approx(found[1][name], rel=1e-3, abs=1e-5)
    one, two = (tmp_path / f"on-{devices}/round-1/model" for devices in (1, 2))
    for mine, theirs in zip(metrics(one), metrics(two), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)
    start = weights(Path(settings["model_name_or_path"]))
    for name, weight in weights(one).items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(weights(two)[name], weight, rtol=0, atol=2e-5)


def test_training_that_fails_on_devices_costs_no_sample(settings, tmp_path):
    config = RoundsConfig(**settings | {"devices": 2})
    (tmp_path / "reference").write_text("a file where a directory is to be")
    with pytest.raises(FastDPOError, match=r"training on 2 devices ended with exit code [1-9]"):
        rounds(config)
    assert (tmp_path / "out/round-1/scored.parquet").exists()
    (tmp_path / "reference").unlink()
    assert len(rounds(config).rounds) == 2


def test_several_processes_of_torchrun_are_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="devices: torchrun started 2 processes") as caught:
        rounds(RoundsConfig(**settings))
    assert "--devices N" in str(caught.value) and not (tmp_path / "out").exists()
