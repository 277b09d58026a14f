"""Libraries that a run needs only for some keys: imported where used, named where missing."""

from importlib import import_module
from typing import Any

from .errors import ConfigError


def need(module: str, key: str, extra: str = "memory") -> Any:
    """The module, for what `key` asks for.

    Raises:
        ConfigError: its library is not installed; names the extra of this package that has it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        raise ConfigError(
            f"{key} needs {library}: pip install 'fastdpo[{extra}]' ({error})"
        ) from error
