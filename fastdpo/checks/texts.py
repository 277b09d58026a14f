"""The rows of a data set as texts, for checks that need no tokenizer."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import datasets
import numpy as np

from ..data.columns import PROBLEM_COLUMN, RowKind, row_kind
from ..data.messages import BadRow, Text, plain_message
from ..data.prompts import repeats_prompt
from ..data.rows import parse_row

_BATCH = 1000
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass
class Texts:
    """Rows in columns.

    Attributes:
        kind: the layout they were read in.
        rows: the number of each row that could be read, from 1.
        prompts: a row's prompt, messages joined.
        questions: the same without system messages, where there are others.
        first: where a row's responses begin in `responses`; one entry more than rows.
        responses: texts of all responses.
        pairs: (C, 3) int64: a row's place in `rows`, and winner and loser in `responses`.
        labels: of each response whether it is a good one, 1 or 0, -1 where the row does not say.
        bad: the number of each row that could not be read, and why.
    """

    kind: RowKind
    rows: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    first: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    responses: list[str] = field(default_factory=list)
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    bad: list[tuple[int, str]] = field(default_factory=list)

    @property
    def compared(self) -> tuple[np.ndarray, np.ndarray]:
        """The better and the worse responses, as places in `responses`: of one pair each, or all
        that are labelled so.
        """
        if len(self.pairs):
            return self.pairs[:, 1], self.pairs[:, 2]
        return np.flatnonzero(self.labels == 1), np.flatnonzero(self.labels == 0)

    @cached_property
    def plain_prompts(self) -> list[str]:
        """The prompts without case and white space, see `plain`."""
        return [plain(text) for text in self.prompts]

    @cached_property
    def plain_responses(self) -> list[str]:
        """The same of the responses."""
        return [plain(text) for text in self.responses]

    def verdict(self, place: int) -> str:
        """What a row, by its place, says of its responses, as text."""
        start, end = self.first[place], self.first[place + 1]
        begin, stop = np.searchsorted(self.pairs[:, 0], (place, place + 1))
        pairs = sorted(tuple(pair) for pair in (self.pairs[begin:stop, 1:] - start).tolist())
        return f"{self.labels[start:end].tolist()} {pairs}"

    def place_of(self, response: int) -> int:
        """The place of the row that a response stands in."""
        return int(np.searchsorted(self.first, response, side="right")) - 1

    def row_of(self, response: int) -> int:
        """The number of the row that a response stands in."""
        return self.rows[self.place_of(response)]


def read_texts(dataset: datasets.Dataset, source: str, limit: int | None = None) -> Texts:
    """The texts of a data set in one of the layouts for training; with `limit`, those of so many
    rows, spread evenly.

    Raises:
        DataError: columns of no layout.
    """
    kind = row_kind(dataset.column_names, source)
    repeated = repeats_prompt(dataset, kind)
    places = np.arange(len(dataset))
    if limit is not None and limit < len(dataset):
        places = np.linspace(0, len(dataset) - 1, limit).astype(np.int64)
        dataset = dataset.select(places)
    found, pairs, labels, first = Texts(kind), [], [], [0]
    number = 0
    for batch in dataset.with_format(None).iter(_BATCH):
        for values in zip(*batch.values(), strict=True):
            raw = dict(zip(batch, values, strict=True))
            number += 1
            try:
                if problem := raw.get(PROBLEM_COLUMN):
                    raise BadRow(problem)
                row = parse_row(raw, kind, _AnyRole(), repeated=repeated)
            except BadRow as problem:
                found.bad.append((int(places[number - 1]) + 1, str(problem)))
                continue
            start = len(found.responses)
            said = row.preferences
            pairs += [(len(found.rows), start + w, start + n) for w, n, _ in said.comparisons]
            labels += [-1 if said.label is None else int(said.label)] * len(row.responses)
            found.rows.append(int(places[number - 1]) + 1)
            found.prompts.append(as_text(row.prompt))
            found.questions.append(as_text(_asked(row.prompt)))
            found.responses += [as_text(response) for response in row.responses]
            first.append(len(found.responses))
    found.first = np.array(first, np.int64)
    found.pairs = np.array(pairs, np.int64).reshape(-1, 3)
    found.labels = np.array(labels, np.int8)
    return found


class _AnyRole:
    """Every role that there is: what a chat template takes is not looked at."""

    def __contains__(self, role: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def _asked(prompt: Text) -> Text:
    if isinstance(prompt, str):
        return prompt
    return [m for m in prompt if m.get("role") not in ("system", "developer")] or prompt


def as_text(value: Text) -> str:
    """A text, or the contents of messages with who said them where that is not clear."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return _content(value[0])
    return "\n".join(f"{message.get('role')}: {_content(message)}" for message in value)


def _content(message: Mapping[str, Any]) -> str:
    """What a message says: its thoughts, its text and its calls."""
    content = plain_message(message).get("content")
    parts = [message[name] for name in _THOUGHTS if message.get(name)]
    parts += [] if content is None else [content if isinstance(content, str) else str(content)]
    listed = [*(message.get("tool_calls") or ()), message.get("function_call")]
    parts += [_call(call) for call in listed if call]
    return "\n".join(str(part) for part in parts if part != "")


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function") or call
    given = function.get("arguments")
    if not isinstance(given, str):
        given = json.dumps(given, ensure_ascii=False, sort_keys=True, default=str)
    return f"{function.get('name')}({given})"


_NOT_WORDS = re.compile(r"[\W_]+")
_ASCII_WORDS = str.maketrans({chr(i): " " for i in range(128) if not chr(i).isalnum()})


def plain(text: str) -> str:
    """A text without case, white space at its ends and more than one within."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words_alone(text: str) -> str:
    """A text's words and numbers, without case and punctuation."""
    if text.isascii():  # nine times faster
        return " ".join(text.lower().translate(_ASCII_WORDS).split())
    return _NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def holds(text: str, parts: Sequence[str]) -> bool:
    """Whether one of these parts, which are in lower case, is in a text; true where there are no
    parts.
    """
    if not parts:
        return True
    lower = text.lower()
    return any(part in lower for part in parts)
