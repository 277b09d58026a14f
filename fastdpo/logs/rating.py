"""What a user said of an answer by a number, a word or a thumb."""

import math
from collections.abc import Mapping
from typing import Any

THUMBS = {
    **dict.fromkeys(("up", "thumbs_up", "thumbsup", "like", "liked", "good", "positive"), 1.0),
    **dict.fromkeys(("👍", "yes", "helpful", "accepted", "true"), 1.0),
    **dict.fromkeys(("down", "thumbs_down", "thumbsdown", "dislike", "disliked", "bad"), 0.0),
    **dict.fromkeys(("negative", "👎", "no", "unhelpful", "rejected", "false"), 0.0),
}
THUMB = "a thumb"
"""The kind of ratings that are thumbs."""


def read_rating(name: str, value: Any) -> tuple[float, str] | None:
    """A rating and its kind."""
    if isinstance(value, Mapping):
        known = ("rating", "score", "value", "thumb", "thumbs", "stars", "vote", "label")
        inner = (read_rating(one, value.get(one)) for one in known)
        return next((one for one in inner if one), None)
    if isinstance(value, bool):
        return float(value), THUMB
    if isinstance(value, str):
        word = value.strip().lower().replace(" ", "_")
        word = word.replace("-up", "_up").replace("-down", "_down")
        if word in THUMBS:
            return THUMBS[word], THUMB
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not math.isfinite(value):
        return None
    if name in ("thumb", "thumbs", "vote") and value in (-1, 0, 1):
        return None if name == "vote" and value == 0 else (float(value > 0), THUMB)
    return value, name
