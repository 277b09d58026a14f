"""What tells the better from the worse responses by their form alone: length, lists, phrases."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from .findings import Finding
from .texts import Texts, holds

EMOJI = "[\U0001f300-\U0001faff\u2600-\u27bf]"
FORMS: Mapping[str, re.Pattern[str]] = {
    "a list": re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+\S", re.MULTILINE),
    "a heading": re.compile(r"^#{1,6}\s+\S", re.MULTILINE),
    "bold text": re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
    "a code block": re.compile(r"```"),
    "a table": re.compile(r"^\s*\|.*\|.*\|\s*$", re.MULTILINE),
    "a link": re.compile(r"https?://"),
    "an emoji": re.compile(EMOJI),
    "an exclamation mark": re.compile(r"!"),
    "a question at the end": re.compile(r"\?\s*\Z"),
    "an apology": re.compile(r"\b(?:sorry|apologi[sz]e)\b", re.IGNORECASE),
    "a refusal": re.compile(
        r"\b(?:I(?:'m| am) (?:unable|not able|sorry)|I (?:can(?:no|')t|won't) (?:help|assist|"
        r"provide|answer|do that)|as an AI\b)",
        re.IGNORECASE,
    ),
}
PARTS: Mapping[str, tuple[str, ...]] = {
    "an apology": ("sorry", "apolog"),
    "a refusal": ("i'm ", "i am ", "i can", "i won't", "as an ai"),
}
"""One of these, in lower case, is in every text that matches: looked for first, where the pattern
is slow.
"""
_UNLIKELY = 4.0  # standard deviations
_DIFFERENT = 0.05  # share of the pairs
_OPENING = 3  # words


def length_bias(texts: Texts) -> Iterator[Finding]:
    """How often the longer response is the better one, and what a rule of length alone scores; of
    labelled responses, among all pairs of a desirable and an undesirable one.
    """
    better, worse = texts.compared
    if not len(better) or not len(worse):
        return
    sizes = np.array([len(response) for response in texts.responses])
    if len(texts.pairs):
        pairs = len(better)
        longer = int((sizes[better] > sizes[worse]).sum())
        shorter = int((sizes[better] < sizes[worse]).sum())
        spread = math.sqrt(longer + shorter)
        what = "wins {} of the pairs"
    else:
        pairs = len(better) * len(worse)
        others = np.sort(sizes[worse])
        longer = int(np.searchsorted(others, sizes[better], "left").sum())
        shorter = pairs - int(np.searchsorted(others, sizes[better], "right").sum())
        spread = math.sqrt(pairs * (len(better) + len(worse) + 1) / 3)  # Mann and Whitney's
        what = "is the desirable one in {} of all pairs of one and an undesirable one"
    score = (max(longer, shorter) + (pairs - longer - shorter) / 2) / pairs
    side = "longer" if longer >= shorter else "shorter"
    strong = abs(longer - shorter) > _UNLIKELY * spread and score >= 0.6
    share = f"{max(longer, shorter) / pairs:.0%}"
    yield Finding(
        "length_bias",
        "warning" if strong else "note",
        max(longer, shorter),
        pairs,
        f"the {side} response {what.format(share)}: a rule that takes the {side} one scores "
        f"{score:.3f}",
    )


def format_bias(texts: Texts) -> Iterator[Finding]:
    """Forms that are more frequent among the better, or the worse, responses than chance allows."""
    better, worse = texts.compared
    if not len(better) or not len(worse):
        return
    for form, pattern in FORMS.items():
        parts = PARTS.get(form, ())
        has = np.array(
            [holds(text, parts) and pattern.search(text) is not None for text in texts.responses],
            bool,
        )
        yield from _bias("format_bias", form, has[better], has[worse], bool(len(texts.pairs)))


def opening_bias(texts: Texts) -> Iterator[Finding]:
    """Opening phrases that begin far more of the better, or of the worse, responses."""
    better, worse = texts.compared
    if not len(better) or not len(worse):
        return
    openings = [" ".join(text.split(maxsplit=_OPENING)[:_OPENING]) for text in texts.responses]
    counts = Counter(openings[i] for i in (*better, *worse))
    for opening, count in counts.most_common(20):
        if not opening or count < 2 * _DIFFERENT * len(better):
            break
        has = np.array([one == opening for one in openings], bool)
        name = f"the opening {opening!r}"
        yield from _bias("opening_bias", name, has[better], has[worse], bool(len(texts.pairs)))


def _bias(
    name: str, form: str, better: np.ndarray, worse: np.ndarray, paired: bool
) -> Iterator[Finding]:
    """McNemar's test of pairs, or that of two shares."""
    if paired:
        ours, theirs = int((better & ~worse).sum()), int((worse & ~better).sum())
        deviations = (ours - theirs) / math.sqrt(ours + theirs) if ours + theirs else 0.0
    else:
        ours, theirs = int(better.sum()), int(worse.sum())
        share = (ours + theirs) / (len(better) + len(worse))
        spread = math.sqrt(share * (1 - share) * (1 / len(better) + 1 / len(worse)))
        deviations = (better.mean() - worse.mean()) / spread if spread else 0.0
    difference = better.mean() - worse.mean()
    if abs(deviations) < _UNLIKELY or abs(difference) < _DIFFERENT:
        return
    odds = math.log((ours + 0.5) / (theirs + 0.5))
    side = "better" if difference > 0 else "worse"
    yield Finding(
        name,
        "warning",
        ours if difference > 0 else theirs,
        len(better),
        f"{form} speaks for the {side} response: in {better.mean():.0%} of the better and "
        f"{worse.mean():.0%} of the worse ones (log odds {odds:+.2f}, {abs(deviations):.0f} "
        "standard deviations)",
    )
