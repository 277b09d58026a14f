"""Checked rows to token ids, exactly as TRL 1.16 makes them but in batches.

TRL tokenises each row by three calls: the prompt (with the generation prompt), the prompt with the
chosen and the prompt with the rejected response. `apply_chat_template` renders text and tokenises
that, without special tokens; doing the two apart lets one call tokenise a whole batch. A completion
starts where the tokenised prompt and a full sequence diverge, at the smallest such place over the
row's responses, so a token merged across the boundary belongs to the completion.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import datasets
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .columns import LINE_COLUMN, PROBLEM_COLUMN, RowKind, speaks_of_system, unread_columns
from .messages import BadRow, plain_message, template_roles
from .notes import (
    BOUNDARY_MOVED,
    DOUBLE_BOS,
    EMPTY_PROMPT,
    IDENTICAL_AFTER_TRUNCATION,
    TRUNCATED,
    UNREAD_COLUMN,
)
from .readers import row_label
from .rows import Row, limit_comparisons, parse_row
from .template import Renderer

Ids: TypeAlias = list[int]

# What became of a row; stored with it, so that a cached data set can still be reported on.
KEPT, BAD, IDENTICAL, PROMPT_TOO_LONG, NO_COMPARISON = range(5)

_UNREAD = (
    "holds text that is in none of prompt and responses, and would not be trained on; expected it "
    "in prompt: rename the column to prompt, put its text there, or remove it (this layout is not "
    "read yet)"
)
_IDS = datasets.List(datasets.Value("int32"))
FEATURES = datasets.Features(
    {
        "prompt_ids": _IDS,
        "response_ids": datasets.List(_IDS),
        "winners": _IDS,
        "losers": _IDS,
        "weights": datasets.List(datasets.Value("float32")),
        "labels": datasets.List(datasets.Value("bool")),
        "outcome": datasets.Value("int8"),
        "reason": datasets.Value("string"),
        "line": datasets.Value("int64"),
        "notes": datasets.List(datasets.Value("string")),
    }
)
_NOTHING: dict[str, Any] = {
    "prompt_ids": [],
    "response_ids": [],
    "winners": [],
    "losers": [],
    "weights": [],
    "labels": [],
    "outcome": KEPT,
    "reason": None,
    "line": None,
    "notes": [],
}


def common_prefix_length(prompt: Ids, full: Ids) -> int:
    """How many leading tokens two sequences share."""
    if full[: len(prompt)] == prompt:
        return len(prompt)
    pairs = enumerate(zip(prompt, full, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(full)))


@dataclass(frozen=True)
class Encoder:
    """A function from batches of raw rows to columns of `FEATURES`, a row for each.

    Attributes:
        tokenizer: any transformers tokenizer.
        kind: the rows' layout.
        num_rows: rows of the whole data set, to name a row by its line.
        source: what the rows came from, in a user's words.
        max_length: tokens of a prompt and a response together, or None.
        vocab_size: rows of the model's embedding, or None where it is not known.
        max_comparisons: at most so many comparisons a group, or None.
        seed: of the choice among a group's comparisons.
        skip_bad_rows: note a bad row in `reason` instead of raising.
        watched: columns that are not read, but may hold a part of the prompt.
        repeated: whether texts begin with their prompt, see `fastdpo.data.prompts`.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: RowKind
    num_rows: int
    source: str
    max_length: int | None
    vocab_size: int | None
    max_comparisons: int | None
    seed: int
    skip_bad_rows: bool
    watched: tuple[str, ...] = ()
    repeated: bool = False

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        columns = {name: batch[name] for name in batch}
        lines = columns.pop(LINE_COLUMN, [None] * len(indices))
        problems = columns.pop(PROBLEM_COLUMN, [None] * len(indices))
        raws = [
            {name: values[position] for name, values in columns.items()}
            for position in range(len(indices))
        ]
        labels = [
            functools.partial(row_label, self.source, index, self.num_rows, line)
            for index, line in zip(indices, lines, strict=True)
        ]
        rows: list[Row | BadRow] = [
            BadRow(problem) if problem else self._parse(raw, label)
            for raw, problem, label in zip(raws, problems, labels, strict=True)
        ]
        outputs = []
        for position, (row, tokens) in enumerate(zip(rows, self._tokenize(rows), strict=True)):
            output = self._finish(row, tokens)
            output["line"] = lines[position]
            if output["outcome"] in (BAD, IDENTICAL) and not self.skip_bad_rows:
                raise DataError(f"{labels[position]()}: {output['reason']}")
            outputs.append(output)
        return {name: [output[name] for output in outputs] for name in FEATURES}

    def _parse(self, raw: Mapping[str, Any], label: Callable[[], str]) -> Row | BadRow:
        try:
            row = parse_row(raw, self.kind, self._roles, repeated=self.repeated)
        except BadRow as problem:
            return problem
        unread = unread_columns(raw, self.watched, row.prompt, row.responses)
        if not unread:
            return row
        asked = "prompt" in raw and EMPTY_PROMPT not in row.notes
        if wrong := [name for name in unread if not asked or speaks_of_system(name)]:
            # Not a row that could be skipped: the data set is laid out in another way.
            raise DataError(f"{label()}: {', '.join(wrong)}: {_UNREAD}")
        return replace(row, notes=row.notes | {UNREAD_COLUMN})

    @functools.cached_property
    def _roles(self) -> frozenset[str]:
        return template_roles(self.tokenizer.chat_template)

    @functools.cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.source)

    def _tokenize(self, rows: list[Row | BadRow]) -> list[tuple[list[Ids], set[str]] | BadRow]:
        """For every row the ids of its prompt and of prompt and response, for each response; and
        what there is to note of it.
        """
        texts: dict[bool, list[str]] = {False: [], True: []}
        places: list[tuple[bool, slice, set[str]] | tuple[list[Ids], set[str]] | BadRow] = []
        for row in rows:
            if isinstance(row, BadRow):
                places.append(row)
                continue
            try:
                rendered, notes = self._renderer.render(row)
            except BadRow as problem:
                places.append(problem)
                continue
            if row.conversational and not self._renderer.to_text:
                places.append((rendered, notes))
                continue
            waiting = texts[row.conversational]
            span = slice(len(waiting), len(waiting) + len(rendered))
            places.append((row.conversational, span, notes))
            waiting += rendered
        ids = {
            conversational: self._ids(waiting, add_special_tokens=not conversational)
            for conversational, waiting in texts.items()
        }
        return [
            (ids[p[0]][p[1]], p[2]) if isinstance(p, tuple) and len(p) == 3 else p for p in places
        ]

    def _ids(self, texts: list[str], *, add_special_tokens: bool) -> list[Ids]:
        if not texts:
            return []
        # Rows of one prompt stand together in most files: more than half of the texts repeat.
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        tokenised = self.tokenizer(
            list(distinct),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return [tokenised[distinct[text]] for text in texts]

    def _finish(
        self, row: Row | BadRow, tokens: tuple[list[Ids], set[str]] | BadRow
    ) -> dict[str, Any]:
        if isinstance(row, BadRow) or isinstance(tokens, BadRow):
            return _NOTHING | {"outcome": BAD, "reason": str(tokens)}
        (prompt, *sequences), notes = tokens
        start = min(common_prefix_length(prompt, full) for full in sequences)
        comparisons = limit_comparisons(row, self.max_comparisons, self.seed)
        if self.max_length is not None and start >= self.max_length:
            return _NOTHING | {"outcome": PROMPT_TOO_LONG}
        if row.label is None and not comparisons:
            return _NOTHING | {"outcome": NO_COMPARISON}
        if reason := self._unusable(row, sequences, start):
            return _NOTHING | {"outcome": BAD, "reason": reason}
        for winner, loser, _ in comparisons:
            if sequences[winner] == sequences[loser]:
                return _NOTHING | {"outcome": IDENTICAL, "reason": _identical(row, winner, loser)}
        cut = [full[: self.max_length] for full in sequences]
        bos = self.tokenizer.bos_token_id
        found = {
            BOUNDARY_MOVED: start < len(prompt),
            DOUBLE_BOS: bos is not None and any(full[:2] == [bos, bos] for full in sequences),
            TRUNCATED: cut != sequences,
            IDENTICAL_AFTER_TRUNCATION: any(cut[w] == cut[loser] for w, loser, _ in comparisons),
        }
        return _NOTHING | {
            "prompt_ids": prompt[:start],
            "response_ids": [full[start:] for full in cut],
            "winners": [winner for winner, _, _ in comparisons],
            "losers": [loser for _, loser, _ in comparisons],
            "weights": [weight for _, _, weight in comparisons],
            "labels": [] if row.label is None else [row.label],
            "notes": sorted(notes | {note for note, holds in found.items() if holds}),
        }

    def _unusable(self, row: Row, sequences: list[Ids], start: int) -> str | None:
        """Why tokens cannot be trained on: none of a response's own, or one the model lacks."""
        for name, full in zip(row.names, sequences, strict=True):
            if len(full) == start:
                return f"{name}: has no tokens; expected a response that is not empty"
            if self.vocab_size is not None and (largest := max(full)) >= self.vocab_size:
                token = self.tokenizer.convert_ids_to_tokens(largest)
                return (
                    f"{name}: token {largest} ({token!r}) is outside the model's vocabulary of "
                    f"{self.vocab_size}; expected the model's own tokenizer"
                )
        return None


def _identical(row: Row, winner: int, loser: int) -> str:
    """Why two responses have the same tokens: they say the same, or differ in what is dropped."""
    names = f"{row.names[winner]} and {row.names[loser]}"
    one, other = row.responses[winner], row.responses[loser]
    if isinstance(one, str) or isinstance(other, str):
        return f"{names}: are identical; expected two different responses"
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        a, b = plain_message(a), plain_message(b)
        if keys := sorted(key for key in {*a, *b} if a.get(key) != b.get(key)):
            return (
                f"{names}: differ in [{position}].{keys[0]}, but the chat template drops the part "
                "in which they differ; expected a template that renders it"
            )
    return f"{names}: are identical; expected two different responses"
