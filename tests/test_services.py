"""`report_to`: what every service gets, in files of its own library where that is installed, and
that no service can stop a run.
"""

import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from training import assert_same_weights, metrics, run

from fastdpo import TrainConfig
from fastdpo.errors import ConfigError
from fastdpo.training.services import make_trackers, require_trackers

KEYS = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "hub_token": None}


@pytest.fixture
def go(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Any:
    keys = {**KEYS, "eval_dataset_name": str(pairs_file)}
    return partial(run, tiny_model, pairs_file, tmp_path / "out", **keys)


def logged(output: Path, prefixed: bool = True) -> dict[tuple[str, int], float]:
    """The lines of metrics.jsonl by the names that services give metrics, and by step."""
    found = {}
    for row in metrics(output):
        step = int(row.pop("step"))
        whole = any(name.startswith("eval_") for name in row)
        for name, value in row.items():
            if prefixed:
                name = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            if not whole or name not in ("train/epoch", "train/num_tokens"):
                found[name, step] = value
    return found


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> MagicMock:
    """A library that notes what is called."""
    library = MagicMock(__spec__=ModuleType("spec"), **attributes)
    monkeypatch.setitem(sys.modules, name, library)
    return library


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    names = read.Tags()["scalars"]
    return {(name, event.step): event.value for name in names for event in read.Scalars(name)}


tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")


@tensorboard
@pytest.mark.parametrize("place", ["runs", "key", "variable"])
def test_tensorboard_reads_every_metric(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    keys = {"logging_dir": str(tmp_path / "key")} if place == "key" else {}
    if place == "variable":
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "variable"))
    go(report_to="tensorboard", **keys)
    found = scalars(tmp_path / ("out/runs" if place == "runs" else place))
    known = logged(tmp_path / "out")
    assert {("train/loss", 1), ("train/rewards/margins", 3), ("eval/loss", 2)} <= found.keys()
    for name, value in known.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


@tensorboard
def test_steps_that_are_repeated_are_shown_once(go: Any, tmp_path: Path) -> None:
    keys = {"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 1}
    go(**keys)
    (tmp_path / "out" / "checkpoint-3" / "manifest.json").unlink()
    go(**keys, resume_from_checkpoint=True)
    found = scalars(tmp_path / "out" / "runs")
    assert sorted(step for name, step in found if name == "train/loss") == [1, 2, 3]


def sent(calls: Any) -> dict[tuple[str, int], float]:
    """What `log` of wandb or trackio was handed."""
    found = {}
    for call in calls:
        row = dict(call.args[0])
        step = row.pop("train/global_step")
        found |= {(name, step): value for name, value in row.items()}
    return found


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_what_transformers_sends(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    library = stand_in(monkeypatch, name, run=None)
    go(report_to=name, run_name="mine", project="cats", learning_rate=1e-2)
    keys = library.init.call_args.kwargs
    assert keys["project"] == "cats" and keys["name"] == "mine"
    config = keys.get("config") or library.config.update.call_args.args[0]
    assert config["learning_rate"] == 1e-2
    known = logged(tmp_path / "out")
    assert {key: sent(library.log.call_args_list)[key] for key in known} == known
    assert library.finish.call_count == 1
    if name == "wandb":
        library.define_metric.assert_any_call("*", step_metric="train/global_step", step_sync=True)
        assert library.finish.call_args.kwargs == {"exit_code": 0}


def test_a_run_of_the_users_is_used_and_left_open(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = stand_in(monkeypatch, "wandb")
    go(report_to="wandb")
    assert not library.init.called and library.log.called and not library.finish.called


def test_variables_of_wandb_go_before_keys(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "from-outside")
    library = stand_in(monkeypatch, "wandb", run=None)
    go(report_to="wandb", project="cats")
    assert library.init.call_args.kwargs["project"] == "from-outside"


def test_trackio_gets_its_space(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = stand_in(monkeypatch, "trackio")
    go(report_to="trackio", trackio_space_id="me/space", trackio_bucket_id="me/bucket")
    keys = library.init.call_args.kwargs
    assert (keys["space_id"], keys["bucket_id"]) == ("me/space", "me/bucket")


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    library = stand_in(monkeypatch, "mlflow")
    library.active_run.return_value = None
    limits = MagicMock(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=20)
    monkeypatch.setitem(sys.modules, "mlflow.utils.validation", limits)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return library


def test_mlflow_gets_parameters_in_parts_and_metrics(
    go: Any, tmp_path: Path, mlflow: MagicMock
) -> None:
    go(report_to="mlflow", run_name="mine", project="cats")
    mlflow.set_experiment.assert_called_once_with("cats")
    mlflow.start_run.assert_called_once_with(run_name="mine")
    parts = [call.args[0] for call in mlflow.log_params.call_args_list]
    assert all(len(part) <= 20 for part in parts)
    assert {name for part in parts for name in part} == TrainConfig.key_fields().keys()
    found = {
        (name, call.kwargs["step"]): value
        for call in mlflow.log_metrics.call_args_list
        for name, value in call.args[0].items()
    }
    known = logged(tmp_path / "out", prefixed=False)
    assert {key: found[key] for key in known} == known
    mlflow.end_run.assert_called_once_with("FINISHED")


def test_a_run_that_fails_is_a_failed_one_there(
    go: Any, mlflow: MagicMock, tiny_model: Path, pairs_file: Path
) -> None:
    with pytest.raises(ValueError, match="loss is"):
        go(report_to="mlflow", learning_rate=1e30, max_grad_norm=0, max_steps=6)
    mlflow.end_run.assert_called_once_with("FAILED")


def test_all_is_what_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def of(*names: str) -> list[str]:
        config = TrainConfig(report_to=list(names), output_dir=str(tmp_path))
        require_trackers(config)
        return [getattr(tracker, "name", "") for tracker in make_trackers(config, tmp_path, None)]

    there = {"wandb", "trackio"}
    monkeypatch.setattr(
        "fastdpo.training.services.importlib.util.find_spec",
        lambda name: True if name in there else None,
    )
    for name in there:
        stand_in(monkeypatch, name, run=None)
    assert of("all") == ["wandb", "trackio"]
    assert of("trackio", "wandb", "trackio") == ["trackio", "wandb"]
    assert of() == []
    with pytest.raises(ConfigError, match="report_to: mlflow is not installed: pip install mlflow"):
        of("mlflow")


@pytest.mark.parametrize("at", ["log", "finish"])
def test_a_service_that_fails_stops_nothing_and_is_said_once(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    library = stand_in(monkeypatch, "wandb", run=None)
    getattr(library, at).side_effect = ConnectionError("the network\nis gone")
    _, said = go(report_to="wandb")
    result = {"log": "gets no more metrics", "finish": "has not ended the run"}[at]
    lines = [line for line in said if line.startswith("report_to: ")]
    assert lines == [f"report_to: wandb {result} (the network); metrics.jsonl has them all"]
    assert len(metrics(tmp_path / "out")) == 5
    library = stand_in(monkeypatch, "wandb", run=None)
    go(report_to="none", output_dir=str(tmp_path / "plain"))
    assert_same_weights(tmp_path / "out", tmp_path / "plain")


def test_a_service_that_cannot_be_started_ends_the_run_before_it_begins(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = stand_in(monkeypatch, "wandb", run=None)
    library.init.side_effect = RuntimeError("no api key")
    with pytest.raises(ConfigError, match=r"report_to: wandb cannot be started \(no api key\)"):
        go(report_to="wandb")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow")
def test_mlflow_reads_every_metric(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    go(report_to="mlflow", run_name="mine", project="cats")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("cats")
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.params["beta"] == "0.1"
    for (name, step), value in logged(tmp_path / "out", prefixed=False).items():
        history = {
            metric.step: metric.value
            for metric in client.get_metric_history(found.info.run_id, name)
        }
        assert history[step] == pytest.approx(value), name


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_wandb_writes_a_run_that_can_be_synced(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    go(report_to="wandb", run_name="mine", project="cats")
    [file] = tmp_path.rglob("run-*.wandb")
    records = list(wandb_records(file.read_bytes()))
    [begun] = [record.run for record in records if record.HasField("run")][:1]
    assert (begun.project, begun.display_name) == ("cats", "mine")
    found = {}
    for record in records:
        row = {(item.key or "/".join(item.nested_key)): item for item in record.history.item}
        if "train/global_step" in row:
            step = int(row["train/global_step"].value_json)
            found |= {(name, step): float(item.value_json) for name, item in row.items()}
    known = logged(tmp_path / "out")
    assert {key: found[key] for key in known} == pytest.approx(known)


def wandb_records(data: bytes) -> Iterator[Any]:
    """The records of a file of wandb's, which is a log as LevelDB writes it after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio")
def test_trackio_keeps_every_metric(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    go(report_to="trackio", run_name="mine", project="cats")
    rows = SQLiteStorage.get_logs("cats", "mine")
    found = {
        (name, row["train/global_step"]): value
        for row in rows
        if "train/global_step" in row
        for name, value in row.items()
    }
    known = logged(tmp_path / "out")
    assert {key: found[key] for key in known} == pytest.approx(known)
