"""Losses as functions of log-probabilities; `registry` says how to add one."""

from . import pairs, responses, tokens, without_reference  # noqa: F401  (they register)
from .registry import LOSSES, Loss, RegisteredLoss, get_loss, register_loss
from .scored import Comparisons, Constants, Responses, Scored, Tokens

__all__ = [
    "LOSSES",
    "Comparisons",
    "Constants",
    "Loss",
    "RegisteredLoss",
    "Responses",
    "Scored",
    "Tokens",
    "get_loss",
    "register_loss",
]
