"""Personal data in texts, by its patterns: what a pattern cannot tell, such as names, stays."""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import ConfigError


class _Kind(NamedTuple):
    """Personal data of one kind: what it looks like, and how much of that it is, 0 for nothing."""

    name: str
    pattern: re.Pattern[str]
    length: Callable[[str], int] = len
    sign: str = ""  # without it in a text there is none, which is told faster


def _longest(holds: Callable[[str], bool]) -> Callable[[str], int]:
    """The length of the longest part that holds, from the start to the end of a word."""

    def length(text: str) -> int:
        ends = [len(text), *(match.start() for match in re.finditer("[ -]", text))]
        return next((end for end in sorted(ends, reverse=True) if holds(text[:end])), 0)

    return length


def _whole(holds: Callable[[str], bool]) -> Callable[[str], int]:
    return lambda text: len(text) * holds(text)


# By first digits and length: Visa, Mastercard, American Express, Diners, JCB, Discover, UnionPay.
_CARD = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|"
    r"(?:35|6\d)\d{14}(?:\d{3})?"
)


def _is_card(text: str) -> bool:
    """Whether the digits are of a card number and add up (ISO/IEC 7812)."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    is_known = _CARD.fullmatch("".join(map(str, digits))) is not None
    return is_known and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def _is_iban(text: str) -> bool:
    """Whether the check digits of an account number hold (ISO 13616)."""
    plain = "".join(text.split())
    number = "".join(str(int(c, 36)) for c in plain[4:] + plain[:4])
    return 15 <= len(plain) <= 34 and int(number) % 97 == 1


def _is_address(text: str) -> bool:
    """Whether this is an address that a single machine may have, and not every one."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_reserved)


def _is_long_address(text: str) -> bool:
    """Whether this is IPv6 of three groups and more: of two, code has slices and names."""
    groups = [group for group in text.split(":") if group]
    return len(groups) > 2 and any(map(str.isdigit, text)) and _is_address(text)


def _is_random(text: str) -> bool:
    """Whether a part has letters and digits mixed as names of things have not."""
    runs = [run for run in re.split("[-_]", text) if len(run) >= 8]
    return any(re.search(r"\d", run) and re.search(r"[A-Za-z]", run) for run in runs)


_PRIVATE = r"[A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
_KINDS = (
    _Kind("KEY", re.compile(r"\b[spr]k[-_][\w-]{16,200}"), _whole(_is_random), "k"),
    _Kind(
        "KEY",
        re.compile(
            r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|"
            r"A[KS]IA[A-Z0-9]{16}\b|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{30,}|"
            r"(?:hf|gsk|npm)_[A-Za-z0-9]{20,}|eyJ[\w-]{10,999}\.[\w-]{10,}\.[\w-]{10,})"
        ),
    ),
    _Kind(
        "KEY",
        re.compile(
            rf"-----BEGIN {_PRIVATE}"
            rf"(?:[^-]{{16,}}-----END {_PRIVATE}|(?:\s+[A-Za-z0-9+/=]{{40,}})+)"
        ),
    ),
    _Kind(
        "EMAIL",
        re.compile(r"\b[\w.+-]{1,64}@(?!v?\d+\.\d)[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}\b"),
        sign="@",
    ),
    _Kind(
        "IBAN",
        re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"),
        _longest(_is_iban),
    ),
    _Kind(
        "CARD",
        re.compile(r"\b[2-6]\d{3}(?<!\d[.,]\d{4})(?:[ -]?\d){9,15}(?!\w)"),
        _longest(_is_card),
    ),
    _Kind(
        "IP",
        re.compile(
            r"\b\d(?<![Vv]ersion \d)(?<![A-Za-z]/\d)(?<!\.\d)\d{0,2}(?:\.\d{1,3}){3}(?!\.?\d|\w)"
        ),
        _whole(_is_address),
    ),
    _Kind(
        "IP",
        re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{1,4}\b"),
        _whole(_is_long_address),
        ":",
    ),
    _Kind(
        "IP",
        re.compile(r"\b(?<![:\[])(?=[a-f]*\d)[0-9a-f]{4}::[0-9a-f]{1,4}(?![\w:\]])", re.I),
        sign="::",
    ),
    _Kind(
        "PHONE",
        re.compile(r"\+(?<![\w.]\+)\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,12}(?!\w)"),
        sign="+",
    ),
    _Kind(
        "PHONE",
        re.compile(r"(?:\b1[ .-])?\((?<![\w.]\()\d{3}\) ?\d{3}[ .-]\d{4}(?!\w)"),
        sign="(",
    ),
    _Kind(
        "PHONE",
        re.compile(
            r"\b(?=\d)(?<!\.)(?:(?:1[ .-])?\d{3}[.-]\d{3}[.-]\d{4}(?!\w)|"
            r"(?<!\d[ -])(?:[2-9]\d{2} \d{3} \d{4}|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5}|"
            r"0\d(?:[ .-]\d{2}){4})(?![ -]\d|\w))"
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
        if pattern == "":
            raise ConfigError("--mask_pattern: expected a regular expression, got nothing")
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
            if kind.sign in value:
                value = self._without(kind, value)
        return value

    def _without(self, kind: _Kind, text: str) -> str:
        kept, copied, at = [], 0, 0
        while at <= len(text) and (match := kind.pattern.search(text, at)):
            at = match.start()
            if length := kind.length(match[0]):
                kept += [text[copied:at], f"[{kind.name}]"]
                self.counts[kind.name] += 1
                copied = at = at + length
            else:
                at += 1
        return "".join([*kept, text[copied:]])
