"""What reaches the terminal: our own lines, and of the libraries only what a user can act on.

Importing this module imports none of them.
"""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import MemoryHandler

from .errors import FastDPOError

LAUNCHER = "FASTDPO_LAUNCHER"
"""The variable that names the process that started this rank and speaks for all of them."""

_CHATTY_IMPORTS = ("bitsandbytes", "torch.utils._pytree", "torchao")
"""Libraries that warn of kernels they lack, or of their own deprecated calls, on being imported."""


def guarded(run: Callable[[], int]) -> int:
    """Run a command and return its exit code: 2 after an error of the user's in one line, 130 after
    an interruption, 141 where nobody reads its output any more. Errors of the program are raised.
    """
    _prepare()
    try:
        status = run()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _say_interrupted()
    except Exception as error:
        if _is_interruption(error):
            return _say_interrupted()
        _leave_word(error)
        if isinstance(error, FastDPOError):
            if not error.said:
                print(f"error: {one_line(str(error))}", file=sys.stderr)
            return error.status
        if not isinstance(error, OSError) or not _is_lost():
            raise
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"error: the output cannot be written ({error.strerror})", file=sys.stderr)
        return 2


def _say_interrupted() -> int:
    if os.environ.get("RANK", "0") == "0" and LAUNCHER not in os.environ:
        print("interrupted", file=sys.stderr)
    return 130


def _leave_word(error: Exception) -> None:
    """Let the process that started this one know that an error is said here."""
    if LAUNCHER in os.environ and not getattr(error, "said", False):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _is_interruption(error: BaseException | None) -> bool:
    """Whether a library made this of a KeyboardInterrupt, as transformers does while importing."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _prepare() -> None:
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


def _is_lost() -> bool:
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


class _Lines(logging.Handler):
    """Prints what is logged between the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record))


@contextmanager
def heard(talks: bool = True) -> Iterator[None]:
    """Print what fastdpo logs, from INFO on, if this process `talks`."""
    if not talks:
        yield
        return
    logger, lines = logging.getLogger(__package__), _Lines()
    before = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before)


@contextmanager
def silent() -> Iterator[None]:
    """Without what fastdpo and transformers log, in a process that is one of several and not the
    first: that one says it.
    """
    loggers = [logging.getLogger(name) for name in (__package__, "transformers")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


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
