"""What reaches the terminal: our own lines, and of the libraries only what a user can act on.

Importing this module imports none of them.
"""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import MemoryHandler

from .errors import FastDPOError

_CHATTY_IMPORTS = ("bitsandbytes", "torch.utils._pytree", "torchao")
"""Libraries that warn of kernels they lack, or of their own deprecated calls, on being imported."""


def prepare() -> None:
    """Make the process's streams take every text, and its libraries' imports quiet."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the process started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name in _CHATTY_IMPORTS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)


def is_lost() -> bool:
    """Whether nothing more can be written to the output: its reader has gone, as that of
    `fastdpo train | head` does, or its disk is full. What still comes then goes nowhere.
    """
    try:
        number = sys.stdout.fileno()
    except ValueError:  # a stream of a program's own, without a file
        return False
    try:
        os.write(number, b"\n")
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return True
    return False


def one_line(text: str) -> str:
    """The text in one line, without what a terminal would obey."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


@contextmanager
def withheld() -> Iterator[None]:
    """What transformers warns of, once each, at the end of the block: where it ends with an error
    of the user's, that line is all there is to read.
    """
    logger = logging.getLogger("transformers")
    handlers, kept = logger.handlers, MemoryHandler(sys.maxsize, sys.maxsize, flushOnClose=False)
    logger.handlers = [kept]
    try:
        yield
    except FastDPOError:
        kept.buffer.clear()
        raise
    finally:
        logger.handlers = handlers
        for record in {record.getMessage(): record for record in kept.buffer}.values():
            logger.handle(record)


@contextmanager
def progress_bars(disable: bool | None) -> Iterator[None]:
    """With the progress bars of our libraries, or without: as `disable_tqdm` says, and by default
    only where somebody watches.
    """
    import datasets
    import huggingface_hub.utils as hub
    import transformers.utils.logging as transformers

    libraries = (
        (
            datasets.are_progress_bars_disabled,
            datasets.disable_progress_bars,
            datasets.enable_progress_bars,
        ),
        (
            hub.are_progress_bars_disabled,
            hub.disable_progress_bars,
            hub.enable_progress_bars,
        ),
        (
            lambda: not transformers.is_progress_bar_enabled(),
            transformers.disable_progress_bar,
            transformers.enable_progress_bar,
        ),
    )
    hide = not sys.stderr.isatty() if disable is None else disable
    with ExitStack() as restored:
        for hidden, off, on in libraries:
            if hide and not hidden():
                off()
                restored.callback(on)
        yield
