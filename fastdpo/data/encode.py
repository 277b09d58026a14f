"""Checked rows to token ids, exactly as TRL 1.16 makes them but in batches.

TRL tokenises each row by three calls: the prompt (with the generation prompt), the prompt with the
chosen and the prompt with the rejected response. `apply_chat_template` renders text and tokenises
that, without special tokens; doing the two apart lets one call tokenise a whole batch. A completion
starts where the tokenised prompt and a full sequence diverge, at the smallest such place over the
row's responses, so a token merged across the boundary belongs to the completion.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, ModelError
from .messages import BadRow, Text, template_roles
from .readers import row_label
from .rows import (
    LINE_COLUMN,
    PROBLEM_COLUMN,
    Row,
    RowKind,
    limit_comparisons,
    parse_row,
)

Ids: TypeAlias = list[int]

# What became of a row; stored with it, so that a cached data set can still be reported on.
KEPT, BAD, IDENTICAL, PROMPT_TOO_LONG, NO_COMPARISON = range(5)

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
        "truncated": datasets.Value("bool"),
        "boundary_moved": datasets.Value("bool"),
        "identical_after_truncation": datasets.Value("bool"),
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
    "truncated": False,
    "boundary_moved": False,
    "identical_after_truncation": False,
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

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        columns = {name: batch[name] for name in batch}
        lines = columns.pop(LINE_COLUMN, [None] * len(indices))
        problems = columns.pop(PROBLEM_COLUMN, [None] * len(indices))
        rows: list[Row | BadRow] = []
        for position, problem in enumerate(problems):
            raw = {name: values[position] for name, values in columns.items()}
            rows.append(BadRow(problem) if problem else self._parse(raw))
        outputs = []
        for position, (row, ids) in enumerate(zip(rows, self._tokenize(rows), strict=True)):
            output = self._finish(row, ids)
            output["line"] = lines[position]
            if output["outcome"] in (BAD, IDENTICAL) and not self.skip_bad_rows:
                label = row_label(self.source, indices[position], self.num_rows, lines[position])
                raise DataError(f"{label}: {output['reason']}")
            outputs.append(output)
        return {name: [output[name] for output in outputs] for name in FEATURES}

    def _parse(self, raw: Mapping[str, Any]) -> Row | BadRow:
        try:
            return parse_row(raw, self.kind, self._roles)
        except BadRow as problem:
            return problem

    @functools.cached_property
    def _roles(self) -> frozenset[str]:
        return template_roles(self.tokenizer.chat_template)

    @functools.cached_property
    def _renders_to_text(self) -> bool:
        """Whether `apply_chat_template` is transformers' own, which tokenises what it renders."""
        method = type(self.tokenizer).apply_chat_template
        return method is PreTrainedTokenizerBase.apply_chat_template

    def _tokenize(self, rows: list[Row | BadRow]) -> list[list[Ids] | BadRow]:
        """For every row the ids of its prompt and of prompt and response, for each response."""
        texts: dict[bool, list[str]] = {False: [], True: []}
        places: list[tuple[bool, slice] | list[Ids] | BadRow] = []
        for row in rows:
            if isinstance(row, BadRow):
                places.append(row)
                continue
            try:
                rendered = self._render(row)
            except BadRow as problem:
                places.append(problem)
                continue
            if row.conversational and not self._renders_to_text:
                places.append(rendered)
                continue
            waiting = texts[row.conversational]
            places.append((row.conversational, slice(len(waiting), len(waiting) + len(rendered))))
            waiting += rendered
        ids = {
            conversational: self._ids(waiting, add_special_tokens=not conversational)
            for conversational, waiting in texts.items()
        }
        return [ids[p[0]][p[1]] if isinstance(p, tuple) else p for p in places]

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

    def _render(self, row: Row) -> list[Any]:
        """The texts to tokenise (or, of a tokenizer with its own way, their ids)."""
        prompt, responses = row.prompt, row.responses
        if isinstance(prompt, str):
            return [prompt, *(prompt + self._end(response) for response in responses)]
        apply = functools.partial(self._apply_template, row)
        return [apply(prompt, True), *(apply([*prompt, *r], False) for r in responses)]

    def _end(self, response: Text) -> str:
        eos = self.tokenizer.eos_token
        if eos is None:
            raise ModelError(
                "the tokenizer has no eos_token, which ends every response of plain text; set one, "
                "or use a tokenizer that has it"
            )
        text = str(response)
        return text if text.endswith(eos) else text + eos

    def _apply_template(self, row: Row, messages: list[Any], generate: bool) -> Any:
        as_text = self._renders_to_text
        has_template = self.tokenizer.chat_template or "chat_template" in row.template_kwargs
        if as_text and not has_template:
            raise ModelError(
                f"{self.source} holds messages, but the tokenizer has no chat template; use the "
                "tokenizer of a chat model, or give prompt and responses as text"
            )
        kwargs: dict[str, Any] = {"tools": row.tools, **row.template_kwargs}
        if generate:
            kwargs["add_generation_prompt"] = True
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=not as_text, **kwargs)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadRow(f"the chat template cannot render it: {error}") from error
        return rendered if as_text else rendered["input_ids"]

    def _finish(self, row: Row | BadRow, ids: list[Ids] | BadRow) -> dict[str, Any]:
        if isinstance(row, BadRow) or isinstance(ids, BadRow):
            return _NOTHING | {"outcome": BAD, "reason": str(ids)}
        prompt, *sequences = ids
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
                names = f"{row.names[winner]} and {row.names[loser]}"
                reason = f"{names}: are identical; expected two different responses"
                return _NOTHING | {"outcome": IDENTICAL, "reason": reason}
        cut = [full[: self.max_length] for full in sequences]
        return _NOTHING | {
            "prompt_ids": prompt[:start],
            "response_ids": [full[start:] for full in cut],
            "winners": [winner for winner, _, _ in comparisons],
            "losers": [loser for _, loser, _ in comparisons],
            "weights": [weight for _, _, weight in comparisons],
            "labels": [] if row.label is None else [row.label],
            "boundary_moved": start < len(prompt),
            "truncated": cut != sequences,
            "identical_after_truncation": any(cut[w] == cut[loser] for w, loser, _ in comparisons),
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
