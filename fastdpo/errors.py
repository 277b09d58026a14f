"""What a user can get wrong, each a `ValueError` with a message that says where and what was
expected; and the words that such messages share.
"""

from collections.abc import Sequence

_LONGEST = 240
_SHOWN = 3


class FastDPOError(ValueError):
    """Base class of every error that is the input's and not the program's.

    Attributes:
        said: whether another process says it on the same terminal.
        status: the exit code of a command that it ends.
    """

    said = False
    status = 2


class ConfigError(FastDPOError):
    """A configuration key or value that cannot be honoured."""


class DataError(FastDPOError):
    """A file, row or field of the data that cannot be used."""


class ModelError(FastDPOError):
    """A model or tokenizer that cannot be trained."""


class CheckpointError(FastDPOError):
    """A checkpoint that is incomplete or belongs to another run."""


def one_line(error: Exception) -> str:
    """The first thing that another library's error says, with its type where that says more; never
    empty.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    if not isinstance(error, OSError | ValueError | RuntimeError | ImportError) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
