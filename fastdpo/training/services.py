"""The services that `report_to` names, as transformers' callbacks use them: metrics have the same
names there, and the environment the same variables.
"""

import importlib.util
import json
import os
import re
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..config.schedule import TRACKERS
from ..errors import one_line
from .trackers import Guarded, Tracker

_STEP = "train/global_step"


def require_trackers(config: TrainConfig) -> None:
    """Raise ConfigError for a service of `report_to` that is not installed."""
    for name in config.report_to:
        if name != "all" and importlib.util.find_spec(name) is None:
            raise config.error("report_to", f"{name} is not installed: pip install {name}")


def make_trackers(config: TrainConfig, folder: Path, resumed: int | None) -> list[Tracker]:
    """The services that `report_to` names, for a run that writes to `folder`.

    Raises:
        ConfigError: one that cannot be started.
    """
    found: list[Tracker] = []
    for name in _names(config):
        try:
            found.append(Guarded(name, _MAKERS[name](config, folder, resumed)))
        except Exception as error:  # of any library
            for tracker in found:
                tracker.close(failed=True)
            what = f"{name} cannot be started ({one_line(error)})"
            raise config.error("report_to", f"{what}; leave it out to train without it") from error
    return found


def _names(config: TrainConfig) -> list[str]:
    if "all" in config.report_to:
        return [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    return list(dict.fromkeys(config.report_to))


def _sectioned(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics under the names that transformers gives them there: `train/loss`, `eval/loss`."""
    return {
        f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in metrics.items()
    }


class _TensorBoard:
    def __init__(self, config: TrainConfig, folder: Path, resumed: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        chosen = config.logging_dir or os.environ.get("TENSORBOARD_LOGGING_DIR")
        path = Path(chosen).expanduser() if chosen else folder / "runs"
        # What an interrupted run had written of the steps that are repeated is not shown.
        purge = None if resumed is None else resumed + 1
        self.make = partial(SummaryWriter, str(path), purge_step=purge)
        self.config = config
        self.writer: Any = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.writer is None:  # it writes a file when it is made
            self.writer = self.make()
            self.writer.add_text("args", json.dumps(self.config.to_dict(), indent=2))
        for name, value in _sectioned(metrics).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        if self.writer is not None:
            self.writer.close()


class _Wandb:
    def __init__(self, config: TrainConfig, folder: Path, resumed: int | None) -> None:
        self.wandb = wandb = import_module("wandb")
        self.owned = wandb.run is None
        if self.owned:
            project = os.environ.get("WANDB_PROJECT", config.project)
            wandb.init(project=project, name=config.run_name)
        wandb.config.update(config.to_dict(), allow_val_change=True)
        wandb.define_metric(_STEP)
        wandb.define_metric("*", step_metric=_STEP, step_sync=True)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.wandb.log({**_sectioned(metrics), _STEP: step})

    def close(self, failed: bool) -> None:
        if self.owned:
            self.wandb.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, config: TrainConfig, folder: Path, resumed: int | None) -> None:
        self.trackio = trackio = import_module("trackio")
        keys = {
            "space_id": config.trackio_space_id,
            "bucket_id": config.trackio_bucket_id,
            "private": config.hub_private_repo,
        }
        trackio.init(
            project=config.project,
            name=config.run_name,
            config=config.to_dict(),
            resume="allow",
            **{name: value for name, value in keys.items() if value is not None},
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.trackio.log({**_sectioned(metrics), _STEP: step})

    def close(self, failed: bool) -> None:
        self.trackio.finish()


class _MLflow:
    def __init__(self, config: TrainConfig, folder: Path, resumed: int | None) -> None:
        self.mlflow = mlflow = import_module("mlflow")
        validation = import_module("mlflow.utils.validation")
        self.owned = mlflow.active_run() is None or "MLFLOW_RUN_ID" in os.environ
        if self.owned:
            if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "project" in config.changed():
                mlflow.set_experiment(config.project)
            mlflow.start_run(run_name=config.run_name)
        longest = int(validation.MAX_PARAM_VAL_LENGTH)
        values = {k: v for k, v in config.to_dict().items() if len(str(v)) <= longest}
        batch, keys = int(validation.MAX_PARAMS_TAGS_PER_BATCH), list(values)
        if resumed is None:  # they cannot be changed
            for start in range(0, len(keys), batch):
                mlflow.log_params({key: values[key] for key in keys[start : start + batch]})

    def log(self, metrics: dict[str, float], step: int) -> None:
        names = {name: re.sub(r"[^0-9A-Za-z_\-. :/]", "_", name) for name in metrics}
        values = {names[name]: value for name, value in metrics.items()}
        self.mlflow.log_metrics(values, step=step, synchronous=False)

    def close(self, failed: bool) -> None:
        self.mlflow.flush_async_logging()
        if self.owned:
            self.mlflow.end_run("FAILED" if failed else "FINISHED")


_MAKERS: dict[str, Any] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _MLflow,
}
