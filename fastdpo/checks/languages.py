"""Which languages the prompts are in, and which responses answer in another one."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ..extras import need
from .findings import Finding, of_rows
from .texts import Texts

SAMPLE = 1000
_LEAST = 40  # characters, below which a language is a guess
_SURE = 0.95


def languages(texts: Texts) -> Iterator[Finding]:
    """The languages of a sample of rows, and better responses in another than their prompt's.

    Raises:
        ConfigError: the library is not installed.
    """
    langid = need("py3langid.langid", "telling languages", "check")
    judge = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)

    def language(text: str) -> str | None:
        if len(text) < _LEAST:
            return None
        name, certainty = judge.classify(text[:1000])
        return str(name) if certainty >= _SURE else None

    better, _ = texts.compared
    places = dict(zip((texts.row_of(place) for place in better.tolist()), better, strict=True))
    count = min(SAMPLE, len(texts.rows))
    spoken, found = Counter[str](), []
    for place in np.linspace(0, len(texts.rows) - 1, count).astype(int).tolist():
        asked = language(texts.prompts[place])
        spoken[asked or "unsure"] += 1
        row = texts.rows[place]
        answer = texts.responses[places[row]] if row in places else ""
        answered = language(answer)
        if asked and answered and asked != answered:
            found.append((row, f"{asked} -> {answered}: {answer}"))
    said = ", ".join(f"{name} {n / count:.0%}" for name, n in spoken.most_common(5))
    of = f"a sample of {count} rows" if count < len(texts.rows) else "all rows"
    yield Finding("languages", "note", count, len(texts.rows), f"prompts of {of}: {said}")
    text = f"rows of {of} answer in another language than they are asked in"
    yield from of_rows("other_language", "note", found, count, text)
