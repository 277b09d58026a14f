"""Responses and prompts that are wrong by themselves."""

import re
from collections.abc import Iterator, Sequence

from .findings import Finding, of_rows
from .texts import Texts, holds

TEMPLATED = re.compile(
    r"\{\{?\s*[A-Za-z_][\w. ]{0,40}\}?\}|\[(?:insert|your|name|company|date|placeholder)[^\]\n]*\]|"
    r"<(?:insert|your)[^>\n]*>|lorem ipsum|\bTODO\b|as an AI language model",
    re.IGNORECASE,
)
_TEMPLATES = (
    *("{", "<insert", "<your", "lorem ipsum", "todo", "as an ai language model"),
    *(f"[{word}" for word in ("insert", "your", "name", "company", "date", "placeholder")),
)
"""One of these, in lower case, is in every text that matches."""
SPECIAL = re.compile(
    r"<\|[a-z0-9_▁|-]{2,40}\|>|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]|<</?SYS>>|"
    r"<(?:start|end)_of_turn>|<｜[^｜\n]{1,40}｜>"
)
_CODE = re.compile(r"```")
_OPEN_END = re.compile(r"[,;:(\[{\-–—/&+=]\s*\Z|\b(?:and|or|the|a|an|of|to|with|for|in)\s*\Z")


def unreadable_rows(texts: Texts) -> Iterator[Finding]:
    """Rows that a run would stop at."""
    of = len(texts.rows) + len(texts.bad)
    yield from of_rows(
        "unreadable", "error", texts.bad, of, "rows cannot be read; skip_bad_rows leaves them out"
    )


def empty_responses(texts: Texts) -> Iterator[Finding]:
    """Responses, or prompts, that say nothing."""
    found = [
        (texts.row_of(place), "an empty response")
        for place, text in enumerate(texts.responses)
        if not text.strip()
    ]
    text = "rows with a response that says nothing"
    yield from of_rows("empty_response", "error", found, len(texts.rows), text)
    prompts = [
        (row, "an empty prompt")
        for row, prompt in zip(texts.rows, texts.prompts, strict=True)
        if not prompt.strip()
    ]
    yield from of_rows("empty_prompt", "warning", prompts, len(texts.rows), "rows without a prompt")


def identical_responses(texts: Texts) -> Iterator[Finding]:
    """Pairs whose responses are the same but for white space and case."""
    found = [
        (texts.rows[row], texts.responses[winner])
        for row, winner, loser in texts.pairs.tolist()
        if texts.plain_responses[winner] == texts.plain_responses[loser]
    ]
    text = "rows compare two responses that are the same but for white space and case"
    yield from of_rows("identical_responses", "error", found, len(texts.rows), text)


def templated_texts(texts: Texts) -> Iterator[Finding]:
    """Placeholders that nobody filled in, and stock phrases of other models."""
    text = "rows with a placeholder or a stock phrase of a model's"
    yield from _matching(texts, "templated", TEMPLATED, text, _TEMPLATES)


def special_tokens(texts: Texts) -> Iterator[Finding]:
    """Text that a tokenizer may take for tokens of its own."""
    text = "rows with text that looks like a special token, which a tokenizer may read as one"
    yield from _matching(texts, "special_token", SPECIAL, text, prompts=True)


def clipped_responses(texts: Texts) -> Iterator[Finding]:
    """Better responses that end before their end: in a clause, in a word, in a block of code."""
    better, _ = texts.compared
    found = []
    for place in dict.fromkeys(better.tolist()):
        text = texts.responses[place].rstrip()
        if len(_CODE.findall(text)) % 2:
            found.append((texts.row_of(place), f"... {text[-60:]} (a code block stays open)"))
        elif len(text) > 200 and _OPEN_END.search(text):
            found.append((texts.row_of(place), f"... {text[-60:]}"))
    text = "rows whose better response seems to be cut off"
    yield from of_rows("clipped", "warning", found, len(texts.rows), text)


def _matching(
    texts: Texts,
    name: str,
    pattern: re.Pattern[str],
    text: str,
    parts: Sequence[str] = (),
    prompts: bool = False,
) -> Iterator[Finding]:
    found = []
    for place, response in enumerate(texts.responses):
        if (match := pattern.search(response) if holds(response, parts) else None) is not None:
            found.append((texts.row_of(place), match[0]))
    for row, prompt in zip(texts.rows, texts.prompts, strict=True) if prompts else ():
        if match := pattern.search(prompt):
            found.append((row, match[0]))
    yield from of_rows(name, "warning", sorted(found), len(texts.rows), text)
