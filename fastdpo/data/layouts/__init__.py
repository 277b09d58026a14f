"""Layouts of preference data: told from the columns, and made into TRL's columns."""

from .convert import to_canonical
from .registry import LAYOUTS

__all__ = ["LAYOUTS", "to_canonical"]
