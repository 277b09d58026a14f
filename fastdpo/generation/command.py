"""What `fastdpo chat`, `fastdpo sample` and `fastdpo merge` read of a command line alike."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import ConfigError
from ..model.sampler import Sampling

SAMPLING = {
    "max_new_tokens": "a number of tokens",
    "temperature": "a number",
    "top_p": "a number",
    "top_k": "a number of tokens",
}


def model_config(words: Sequence[str], command: str, flags: Iterable[str]) -> TrainConfig:
    """The configuration of a command, with flags of its own, whose one word is the model.

    Raises:
        ConfigError: no model, more than one, or keys that are wrong.
    """
    rest = list(words)
    if rest and not rest[0].startswith("-"):
        rest[:1] = ["--model_name_or_path", rest[0]]
    config = TrainConfig.parse(rest, flags)
    if config.model_name_or_path is None:
        raise ConfigError(f"expected a model: fastdpo {command} MODEL (fastdpo {command} --help)")
    return config


def sampling(given: Mapping[str, str], **defaults: float) -> Sampling:
    """How to sample, as the flags say.

    Raises:
        ConfigError: a flag that is no number, or out of its range.
    """
    values: dict[str, Any] = {}
    for name in SAMPLING:
        whole = name in ("max_new_tokens", "top_k")
        if name in given:
            values[name] = number(name, given[name], whole)
        elif name in defaults:
            values[name] = defaults[name]
    return Sampling(**values)


def number(name: str, text: str, whole: bool = True, least: float | None = None) -> float:
    """The value of a flag.

    Raises:
        ConfigError: no number, or one that is too small.
    """
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        kind = "whole number" if whole else "number"
        raise ConfigError(f"--{name}: expected a {kind}, got {text}") from None
    if least is not None and not value >= least:
        raise ConfigError(f"--{name}: expected at least {least}, got {text}")
    return value


def new_directory(name: str) -> Path:
    """A directory to write a model to.

    Raises:
        ConfigError: a file, or a directory that holds something.
    """
    path = Path(name).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path}: is there already; expected a new or an empty directory")
    return path
