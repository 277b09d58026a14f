"""Warnings of other libraries that say nothing to the user of this one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_warnings(category: type[Warning] = Warning) -> Iterator[None]:
    """Show none of a category; Python 3.10 has no such argument of `warnings.catch_warnings`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield
