"""Checked rows to token ids, exactly as TRL 1.16 makes them but in batches.

TRL tokenises each row by three calls: the prompt (with the generation prompt), the prompt with the
chosen and the prompt with the rejected response. `apply_chat_template` renders text and tokenises
that, without special tokens; doing the two apart lets one call tokenise a whole batch. A completion
starts where the tokenised prompt and a full sequence diverge, at the smallest such place over the
row's responses, so a token merged across the boundary belongs to the completion.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .columns import (
    LINE_COLUMN,
    PROBLEM_COLUMN,
    ROW_COLUMN,
    RowKind,
    speaks_of_system,
    unread_columns,
)
from .digests import responses_digests
from .encoded import NOTHING, to_table
from .messages import BadRow, plain_message, template_roles
from .needs import COMPARISONS, Needs
from .notes import (
    BOUNDARY_MOVED,
    DOUBLE_BOS,
    EMPTY_PROMPT,
    IDENTICAL_AFTER_TRUNCATION,
    SAME_SCORES,
    TRUNCATED,
    UNREAD_COLUMN,
)
from .readers import row_label
from .rows import Row, limit_comparisons, parse_row
from .template import Rendered, Renderer

Ids: TypeAlias = np.ndarray

# What became of a row; stored with it, so that a cached data set can still be reported on.
KEPT, BAD, IDENTICAL, PROMPT_TOO_LONG = range(4)
NO_COMPARISON, ONE_RESPONSE, SAME_RANKS = range(4, 7)

_UNREAD = (
    "holds text that is in none of prompt and responses, and would not be trained on; expected it "
    "in prompt: rename the column to prompt, put its text there, or remove it (this layout is not "
    "read yet)"
)


def common_prefix_length(prompt: Ids, full: Ids) -> int:
    """How many leading tokens two sequences share."""
    shortest = min(len(prompt), len(full))
    differ = prompt[:shortest] != full[:shortest]
    return int(differ.argmax()) if differ.any() else shortest


@dataclass(frozen=True)
class Encoder:
    """A function from batches of raw rows to an Arrow table of `FEATURES`, a row for each.

    The attributes are arguments of `tokenize_dataset`, and what it found of the data set:

    Attributes:
        kind: the rows' layout.
        num_rows: rows of the whole data set before a conversion, to name a row by its line.
        needs: what the loss has to know of a row's responses.
        max_comparisons: `max_comparisons_per_group`.
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
    needs: Needs = COMPARISONS
    watched: tuple[str, ...] = ()
    repeated: bool = False

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Any:
        return to_table(self.encode(batch, indices))

    def encode(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
    ) -> list[dict[str, Any]]:
        """What became of each row, by the names of `FEATURES`: tokens as arrays, digests as bytes.

        Raises:
            DataError: naming the first row that cannot be trained on, but with `skip_bad_rows`.
        """
        columns = {name: batch[name] for name in batch}
        raws = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
        rows = [self._render(raw, index) for raw, index in zip(raws, indices, strict=True)]
        tokens = iter(self._tokenize([row for row in rows if isinstance(row, Rendered)]))
        outputs = []
        for raw, index, row in zip(raws, indices, rows, strict=True):
            if isinstance(row, Rendered):
                output = self._judge(row, next(tokens))
            else:
                output = {"outcome": BAD, "reason": str(row)}
            place = {"row": raw.get(ROW_COLUMN, index), "line": raw.get(LINE_COLUMN)}
            output = NOTHING | output | place
            if output["outcome"] in (BAD, IDENTICAL) and not self.skip_bad_rows:
                raise DataError(f"{self._label(raw, index)}: {output['reason']}")
            outputs.append(output)
        return outputs

    def _label(self, raw: Mapping[str, Any], index: int) -> str:
        row = raw.get(ROW_COLUMN, index)
        return row_label(self.source, row, self.num_rows, raw.get(LINE_COLUMN))

    @functools.cached_property
    def _roles(self) -> frozenset[str]:
        return template_roles(self.tokenizer.chat_template)

    @functools.cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.source)

    def _render(self, raw: Mapping[str, Any], index: int) -> Rendered | BadRow:
        if problem := raw.get(PROBLEM_COLUMN):
            return BadRow(problem)
        try:
            row = parse_row(raw, self.kind, self._roles, repeated=self.repeated)
            if unread := unread_columns(raw, self.watched, row.prompt, row.responses):
                asked = "prompt" in raw and EMPTY_PROMPT not in row.notes
                if wrong := [name for name in unread if not asked or speaks_of_system(name)]:
                    # Not a row that could be skipped: the data set is laid out in another way.
                    label = self._label(raw, index)
                    raise DataError(f"{label}: {', '.join(wrong)}: {_UNREAD}")
                row = replace(row, notes=row.notes | {UNREAD_COLUMN})
            self.needs.check_row(row.preferences, len(row.responses))
            return self._renderer.render(row)
        except BadRow as problem:
            return problem

    def _tokenize(self, rendered: list[Rendered]) -> list[list[Ids]]:
        """For every row the ids of its prompt, and of prompt and response for each response."""
        ids: dict[tuple[bool, str], Ids] = {}
        for conversational in (False, True):
            # Rows of one prompt stand together in most files: more than half of the texts repeat.
            texts: dict[str, None] = {}
            for one in rendered:
                if one.row.conversational is conversational:
                    texts |= dict.fromkeys(text for text in one.texts if isinstance(text, str))
            if texts:
                tokenised = self.tokenizer(
                    list(texts),
                    add_special_tokens=not conversational,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    verbose=False,
                )["input_ids"]
                arrays = (np.array(one, np.int32) for one in tokenised)
                ids |= zip(((conversational, text) for text in texts), arrays, strict=True)

        def of_text(text: Any, conversational: bool) -> Ids:
            return ids[conversational, text] if isinstance(text, str) else np.array(text, np.int32)

        return [[of_text(t, one.row.conversational) for t in one.texts] for one in rendered]

    def _judge(self, rendered: Rendered, tokens: list[Ids]) -> dict[str, Any]:
        """What becomes of a row, and its tokens where it is kept."""
        row, (prompt, *sequences) = rendered.row, tokens
        said = row.preferences
        start = min(common_prefix_length(prompt, full) for full in sequences)
        comparisons = limit_comparisons(row, self.max_comparisons, self.seed)
        if self.max_length is not None and start >= self.max_length:
            return {"outcome": PROMPT_TOO_LONG}
        if (outcome := _teaches_nothing(row, self.needs)) is not None:
            return {"outcome": outcome}
        if reason := self._unusable(row, sequences, start):
            return {"outcome": BAD, "reason": reason}
        # A model that is asked again may answer the same, and a scorer may give it another score.
        trains = bool(self.needs.columns)
        scored = not trains or ("scores" in self.needs.columns and said.scores)
        for winner, loser, _ in () if scored else comparisons:
            if np.array_equal(sequences[winner], sequences[loser]):
                return {"outcome": IDENTICAL, "reason": _identical(row, winner, loser)}
        cut = [full[: self.max_length] for full in sequences]
        # A labelled response is scored after the prompts of other rows too, and cut with each.
        whole = trains and said.label is not None
        responses = [full[start:] for full in (sequences if whole else cut)]
        digests = responses_digests(prompt[:start], responses)
        bos = self._bos
        truncated = any(map(self._is_too_long, sequences))
        noted = {
            BOUNDARY_MOVED: start < len(prompt),
            DOUBLE_BOS: any(full[:2].tolist() == [bos, bos] for full in sequences),
            SAME_SCORES: "scores" in self.needs.columns and len(set(said.scores)) == 1,
            TRUNCATED: truncated,
            IDENTICAL_AFTER_TRUNCATION: (truncated or bool(scored))
            and any(np.array_equal(cut[w], cut[loser]) for w, loser, _ in comparisons),
        }
        return {
            "outcome": KEPT,
            "prompt_ids": prompt[:start],
            "response_ids": responses,
            "winners": [winner for winner, _, _ in comparisons],
            "losers": [loser for _, loser, _ in comparisons],
            "weights": [weight for _, _, weight in comparisons],
            "labels": [] if said.label is None else [said.label],
            "scores": list(said.scores),
            "ranks": list(said.ranks),
            "logps": list(said.logps),
            "digests": b"".join(digests),
            "notes": sorted(rendered.notes | {note for note, holds in noted.items() if holds}),
        }

    @functools.cached_property
    def _bos(self) -> int | None:
        return self.tokenizer.bos_token_id

    def _is_too_long(self, full: Ids) -> bool:
        return self.max_length is not None and len(full) > self.max_length

    def _unusable(self, row: Row, sequences: list[Ids], start: int) -> str | None:
        """Why tokens cannot be trained on: none of a response's own, or one the model lacks."""
        for name, full in zip(row.names, sequences, strict=True):
            if len(full) == start:
                return f"{name}: has no tokens; expected a response that is not empty"
            if self.vocab_size is not None and (largest := int(full.max())) >= self.vocab_size:
                token = self.tokenizer.convert_ids_to_tokens(largest)
                return (
                    f"{name}: token {largest} ({token!r}) is outside the model's vocabulary of "
                    f"{self.vocab_size}; expected the model's own tokenizer"
                )
        return None


def _teaches_nothing(row: Row, needs: Needs) -> int | None:
    """The outcome of a row from which the loss can learn nothing; None of all others."""
    said = row.preferences
    if not needs.columns or said.label is not None:
        return None
    if "comparisons" in needs.columns and said.comparisons:
        return None
    if needs.columns == ("comparisons",):
        return NO_COMPARISON
    if len(row.responses) == 1:
        return ONE_RESPONSE
    if "ranks" in needs.columns:
        return SAME_RANKS if len(set(said.ranks)) == 1 else None
    return None if said.scores else NO_COMPARISON


def _identical(row: Row, winner: int, loser: int) -> str:
    """Why two responses have the same tokens: they say the same, or differ in what is dropped."""
    names = f"{row.names[winner]} and {row.names[loser]}"
    one, other = row.responses[winner], row.responses[loser]
    identical = f"{names}: are identical; expected two different responses"
    if isinstance(one, str) or isinstance(other, str):
        return identical
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        a, b = plain_message(a), plain_message(b)
        if keys := sorted(key for key in {*a, *b} if a.get(key) != b.get(key)):
            return (
                f"{names}: differ in [{position}].{keys[0]}, but the chat template drops the part "
                "in which they differ; expected a template that renders it"
            )
    return identical
