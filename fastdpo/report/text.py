"""Numbers and foreign text as a page shows them."""

import math


def visible(text: object) -> str:
    """Text that may hold anything, without what a page cannot hold: control characters become the
    signs that Unicode has for them, lone surrogates its sign for what cannot be read.
    """
    return "".join(map(_sign, str(text)))


def _sign(character: str) -> str:
    code = ord(character)
    if code < 32 and character not in "\n\t":
        return chr(0x2400 + code)
    if 0x7F <= code < 0xA0:
        return "\u2421"
    return "\ufffd" if 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF) else character


def number(value: object) -> str:
    """A figure with some four digits: 0.6931, 12.35, 1,234, 1e-06."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-4 else f"{value:.2e}"


def seconds(value: float) -> str:
    """A time in words: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
