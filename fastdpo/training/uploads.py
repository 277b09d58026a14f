"""What of a run goes to the hub, and when: as transformers' `push_to_hub` does it, in the
background and without a copy of the weights.

A checkpoint that is being uploaded may be removed meanwhile, so what is uploaded is a directory of
hard links. Nothing that fails here ends the run: its files are where they would be without a hub.
"""

import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from .. import files
from ..config import TrainConfig
from ..errors import one_line
from .checkpoint import MANIFEST, OPTIMIZER, REFERENCE, STATE

logger = logging.getLogger(__name__)

_RESUMING = (MANIFEST, STATE, "rng.safetensors")
"""What a checkpoint holds beside the model, OPTIMIZER and REFERENCE apart."""


class Uploads:
    """The uploads of one run to its repository; without a repository, none."""

    def __init__(
        self, config: TrainConfig | None, repo_id: str = "", folder: Path = Path()
    ) -> None:
        self.config, self.repo_id, self.folder = config, repo_id, folder
        self._running: list[Future[Any]] = []

    @property
    def url(self) -> str | None:
        """Where the model is; None where it is not uploaded."""
        return f"{self._api().endpoint}/{self.repo_id}" if self.config and self.repo_id else None

    def checkpoint(self, path: Path, card: str) -> None:
        """Upload the model of a checkpoint with its card, and the checkpoint where `hub_strategy`
        says so, while training goes on; one is skipped while another is under way, unless
        `hub_always_push`.
        """
        config = self.config
        if config is None or config.hub_strategy == "end":
            return
        self._running = [job for job in self._running if not job.done()]
        if self._running and not config.hub_always_push:
            return
        message = f"Training in progress, step {path.name.partition('-')[2]}"
        try:
            made = self._linked(path, config, card)
        except OSError as error:
            self._say(error)
            return
        job = self._api().run_as_future(self._upload, made, message, remove=True)
        self._running.append(job)

    def _linked(self, path: Path, config: TrainConfig, card: str) -> Path:
        """A directory to upload: the model of a checkpoint, with its card and the run's log, and
        where it is wanted the checkpoint below.
        """
        made = files.make_temporary(self.folder / "upload")
        names = files.names_below(path)
        model = [name for name in names if not _resumes(name)]
        _link(path, model, made)
        for name in ("training_config.yaml", "metrics.jsonl"):
            if (self.folder / name).exists():  # a copy, since they grow
                shutil.copyfile(self.folder / name, made / name)
        (made / "README.md").write_text(card, encoding="utf-8")
        if config.hub_strategy != "every_save":
            whole = config.hub_strategy == "all_checkpoints"
            _link(path, names, made / (path.name if whole else "last-checkpoint"))
        return made

    def finish(self) -> None:
        """Upload what the run leaves in its directory, checkpoints apart, after what is still under
        way.
        """
        if self.config is None:
            return
        self.wait()
        logger.info(f"push_to_hub: uploading {self.folder} to {self.repo_id}")
        self._upload(self.folder, "End of training", remove=False)

    def wait(self) -> None:
        """Return when nothing is being uploaded."""
        if any(not job.done() for job in self._running):
            logger.info("push_to_hub: waiting for the upload of the last checkpoint")
        for job in self._running:
            job.result()
        self._running = []

    def _upload(self, folder: Path, message: str, remove: bool) -> None:
        assert self.config is not None
        last = (folder / "last-checkpoint").exists()
        try:
            self._api().upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                commit_message=message,
                revision=self.config.hub_revision,
                ignore_patterns=None if remove else [".fastdpo-*", "checkpoint-*"],
                delete_patterns="last-checkpoint/*" if last else None,
            )
        except Exception as error:  # of the network, or of whichever library carries it
            self._say(error)
        finally:
            if remove:
                shutil.rmtree(folder, ignore_errors=True)

    def _say(self, error: Exception) -> None:
        logger.warning(
            f"push_to_hub: {without_token(one_line(error), self.config)}; everything is kept in "
            f"{self.folder}: hf upload {self.repo_id} {self.folder} . --exclude 'checkpoint-*'"
        )

    def _api(self) -> HfApi:
        assert self.config is not None
        if not hasattr(self, "_made"):
            self._made = HfApi(token=self.config.hub_token)
        return self._made


def without_token(text: str, config: TrainConfig | None) -> str:
    """A message without the token, whoever put it there."""
    token = config and (config.hub_token or os.environ.get("HF_TOKEN"))
    return text.replace(token, "<HUB_TOKEN>") if token else text


def _resumes(name: str) -> bool:
    """Whether a file of a checkpoint is for going on from it alone."""
    return name in _RESUMING or name.split("/")[0].split(".")[0] in (OPTIMIZER, REFERENCE)


def _link(source: Path, names: list[str], target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError:  # a file system without links
            shutil.copyfile(source / name, target / name)
