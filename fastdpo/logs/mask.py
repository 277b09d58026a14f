"""Personal data in texts, by its patterns: what a pattern cannot tell, such as names, stays."""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import ConfigError


class _Kind(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = lambda text: True


def _luhn(text: str) -> bool:
    """Whether the digits of a card number add up (ISO/IEC 7812)."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def _iban(text: str) -> bool:
    """Whether the check digits of an account number hold (ISO 13616)."""
    plain = "".join(text.split())
    number = "".join(str(int(c, 36)) for c in plain[4:] + plain[:4])
    return 15 <= len(plain) <= 34 and int(number) % 97 == 1


def _address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


_KINDS = (
    _Kind(
        "KEY",
        re.compile(
            r"\b(?:sk|pk|rk)[-_](?:[a-z]+[-_])*[A-Za-z0-9]{16,}[\w-]*|\bgh[pousr]_[A-Za-z0-9]{20,}|"
            r"\bgithub_pat_\w{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}|"
            r"\bAIza[\w-]{30,}|\bhf_[A-Za-z0-9]{20,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
        ),
    ),
    _Kind("EMAIL", re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")),
    _Kind(
        "IBAN", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"), _iban
    ),
    _Kind("CARD", re.compile(r"\b\d(?:[ -]?\d){12,18}\b"), _luhn),
    _Kind("IP", re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b"), _address),
    _Kind("IP", re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{1,4}\b"), _address),
    _Kind(
        "PHONE",
        re.compile(
            r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,12}|"
            r"\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?!\w)"
        ),
    ),
)


class Masker:
    """Puts `[EMAIL]` and the like in the place of personal data, and counts it."""

    def __init__(self, pattern: str | None = None) -> None:
        """`pattern` is a regular expression of one's own, masked as `[MASKED]`.

        Raises:
            ConfigError: no regular expression.
        """
        self.counts: Counter[str] = Counter()
        self.kinds = list(_KINDS)
        if pattern is not None:
            try:
                self.kinds.insert(0, _Kind("MASKED", re.compile(pattern)))
            except re.error as error:
                raise ConfigError(f"--mask_pattern: no regular expression ({error})") from None

    def __call__(self, value: Any) -> Any:
        """A text, or every text in lists and objects, without personal data."""
        if isinstance(value, list):
            return [self(item) for item in value]
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        for kind in self.kinds:

            def mask(match: re.Match[str], kind: _Kind = kind) -> str:
                if not match[0] or not kind.holds(match[0]):
                    return match[0]
                self.counts[kind.name] += 1
                return f"[{kind.name}]"

            value = kind.pattern.sub(mask, value)
        return value
