"""The hub, where it cannot be reached: asked once. Its library would ask six times for every file,
half a minute each, before it looked at what it has cached. And whether a model may be uploaded to
it, asked before there is one.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import get_session

from .config import TrainConfig
from .data.load import FILE_KINDS, looks_local
from .errors import ModelError
from .model.place import find_model
from .terminal import one_line

logger = logging.getLogger(__name__)


@contextmanager
def reached(config: TrainConfig) -> Iterator[None]:
    """Work offline, with what is cached, if something of the configuration lies on the hub and
    nobody answers there.
    """
    problem = None if constants.HF_HUB_OFFLINE or not _needed(config) else _problem()
    if problem is None:
        yield
        return
    reason = f"{constants.ENDPOINT} cannot be reached ({problem})"
    logger.warning(f"hub: {reason}; only what is cached is used")
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _needed(config: TrainConfig) -> bool:
    """Whether a model, the base of an adapter, or a data set is not on this machine."""
    for name in (config.model_name_or_path, config.ref_model_name_or_path):
        base = name and _base(config, name)
        if base and not Path(base).exists() and not looks_local(base):
            return True
    names = [config.dataset_name, config.eval_source and config.eval_source[0]]
    names += [str(entry["path"]) for entry in config.datasets if entry["path"] not in FILE_KINDS]
    return any(name and not Path(name).exists() and not looks_local(name) for name in names)


def _base(config: TrainConfig, name: str) -> str:
    """The model below an adapter that is on this machine; the model itself in every other case."""
    if not Path(name).exists():
        return name
    try:
        return find_model(config, name).name
    except ModelError:  # is told where it is loaded
        return name


def _problem() -> str | None:
    """Why the hub does not answer; None if it does."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of whichever library carries the requests
        return one_line(str(error)) or type(error).__name__
    return None


def open_repository(config: TrainConfig) -> str:
    """The full name of the repository that the model is going to be uploaded to, made where there
    is none, with its branch.

    Raises:
        ConfigError: there is no token, it may not write there, or the hub does not answer.
    """
    api, name = HfApi(token=config.hub_token), config.hub_model_id
    key = "hub_token" if config.hub_token else "push_to_hub"
    if config.hub_token is None and get_token() is None:
        raise config.error(key, "there is no token: hf auth login, HF_TOKEN or hub_token gives one")
    try:
        name = name or Path(config.output_dir).expanduser().resolve().name
        if "/" not in name:
            name = f"{api.whoami()['name']}/{name}"
        api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        api.auth_check(name, write=True)  # a repository that is there is none that may be written
        if config.hub_revision is not None:
            api.create_branch(name, branch=config.hub_revision, exist_ok=True)
    except HFValidationError as error:
        raise config.error("hub_model_id", one_line(str(error))) from None
    except HfHubHTTPError as error:
        raise config.error(key, _refusal(name, error)) from None
    except Exception as error:  # of whichever library carries the requests
        reason = one_line(str(error)) or type(error).__name__
        raise config.error(
            "push_to_hub",
            f"{constants.ENDPOINT} cannot be reached ({reason}); leave it out, and "
            "upload after the run with hf upload",
        ) from None
    return name


def _refusal(name: str | None, error: HfHubHTTPError) -> str:
    """Why the hub does not take uploads, and what to do about it."""
    status = error.response.status_code
    settings = f"{constants.ENDPOINT}/settings/tokens"
    if status == 401:
        return f"the hub does not know the token: make one with write access at {settings}"
    if status in (403, 404):
        return f"the token may not write to {name}: give it write access at {settings}"
    return f"the hub answered {status} about {name} ({one_line(error.server_message or '')})"
