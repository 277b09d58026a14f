"""One raw row of preference data, checked and brought into a single shape.

Four layouts are read. Pairs and labels mean what they mean in TRL; groups are ours:

- `prompt`, `chosen`, `rejected`: a pair, each field text or a list of messages;
- `chosen`, `rejected`: a pair whose prompt is what both begin with;
- `prompt`, `responses` and `comparisons` or `scores`: N responses to one prompt;
- `prompt`, `completion`, `label`: one labelled response (KTO).

Messages may be written as JSON in a column of text.
"""

import json
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import xxhash

from .columns import RESPONSES, RowKind
from .messages import (
    ROLES,
    BadRow,
    Text,
    check_text,
    describe,
    parse_template_kwargs,
    parse_tools,
    says_something,
    written_messages,
)
from .notes import EMPTY_PROMPT, NOT_THE_ASSISTANT
from .prompts import split_explicit, split_implicit

Comparison: TypeAlias = tuple[int, int, float]


@dataclass(frozen=True)
class Row:
    """A checked row: a prompt, its responses and what is said about them.

    Attributes:
        prompt: text, or the prompt's messages.
        responses: what follows the prompt, each of the prompt's own type.
        names: the responses' field names, for messages to the user.
        comparisons: `(winner, loser, weight)` with indices into `responses`.
        label: whether the only response is a good one (KTO); None where responses are compared.
        tools: what the chat template is given as tools.
        template_kwargs: further variables of the chat template.
        notes: what there is to say of the row, of `fastdpo.data.notes`.
    """

    prompt: Text
    responses: tuple[Text, ...]
    names: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    label: bool | None
    tools: list[Any] | None
    template_kwargs: Mapping[str, Any]
    notes: frozenset[str] = frozenset()

    @property
    def conversational(self) -> bool:
        """Whether the row consists of messages rather than of text."""
        return not isinstance(self.prompt, str)


def parse_row(
    row: Mapping[str, Any],
    kind: RowKind,
    roles: Collection[str] = ROLES,
    *,
    repeated: bool = False,
) -> Row:
    """Check one row of the given layout.

    Args:
        row: its fields.
        kind: the layout.
        roles: that a message may have.
        repeated: whether the data set's texts begin with their prompt, see `repeats_prompt`.

    Raises:
        BadRow: naming the field and what was expected.
    """
    notes = set()
    if kind == "pair" and "prompt" not in row:
        responses = _check_texts(_responses(row, kind), roles)
        prompt, *rest = split_implicit(*responses.values())
        responses = dict(zip(responses, rest, strict=True))
    else:
        prompt = _check_texts({"prompt": row.get("prompt")}, roles)["prompt"]
        responses = _check_texts(_responses(row, kind), roles)
        prompt, responses, note = split_explicit(prompt, responses, repeated=repeated)
        notes |= {note} if note else set()
    for name, response in responses.items():
        _check_response(name, response, prompt)
    if any(map(_leaves_the_assistant, responses.values())):
        notes.add(NOT_THE_ASSISTANT)
    if not says_something(prompt):
        notes.add(EMPTY_PROMPT)
    comparisons: tuple[Comparison, ...] = ((0, 1, 1.0),) if kind == "pair" else ()
    return Row(
        prompt,
        tuple(responses.values()),
        tuple(responses),
        _parse_preferences(row, len(responses)) if kind == "group" else comparisons,
        _parse_label(row.get("label")) if kind == "label" else None,
        parse_tools(row.get("tools")),
        parse_template_kwargs(row.get("chat_template_kwargs")),
        frozenset(notes),
    )


def limit_comparisons(row: Row, limit: int | None, seed: int) -> tuple[Comparison, ...]:
    """At most `limit` of the row's comparisons, in their order.

    The choice depends on the seed and on what the row says, never on where the row stands, so
    it survives shuffling, sharding and resuming.
    """
    count = len(row.comparisons)
    if limit is None or count <= limit:
        return row.comparisons
    content = json.dumps([seed, row.prompt, row.responses], sort_keys=True, default=str)
    choice = random.Random(xxhash.xxh64_intdigest(content.encode()))
    return tuple(row.comparisons[i] for i in sorted(choice.sample(range(count), limit)))


def _responses(row: Mapping[str, Any], kind: RowKind) -> dict[str, Any]:
    if kind != "group":
        return {name: row.get(name) for name in RESPONSES[kind]}
    listed = row.get("responses")
    if not isinstance(listed, list) or not listed:
        raise BadRow.expected("a list of texts or of lists of messages", "responses", listed)
    return {f"responses[{position}]": item for position, item in enumerate(listed)}


def _check_texts(named: dict[str, Any], roles: Collection[str]) -> dict[str, Text]:
    """The texts or messages of some fields, by name; messages may be written as JSON.

    One response among others may well be a text that shows messages; all of them are not.
    """
    written = {
        name: written_messages(value) if isinstance(value, str) else None
        for name, value in named.items()
    }
    if all(value is not None for value in written.values()):
        for name, value in written.items():
            if isinstance(value, str):
                raise BadRow(f"{name}: {value}")
        named = written
    return {name: check_text(value, name, roles) for name, value in named.items()}


def _check_response(name: str, response: Text, prompt: Text) -> None:
    if isinstance(prompt, str) != isinstance(response, str):
        raise BadRow(
            f"{name}: is {describe(response)} where prompt is {describe(prompt)}; expected "
            'both to be text, or both messages such as [{"role": "assistant", "content": ""}]'
        )
    if not isinstance(response, str) and response[0]["role"] in ("system", "developer"):
        raise BadRow(
            f"{name}[0]: is a {response[0]['role']} message, after the prompt; expected the "
            "assistant's, or the prompt's messages"
        )


def _leaves_the_assistant(response: Text) -> bool:
    ends = () if isinstance(response, str) else (response[0]["role"], response[-1]["role"])
    return "user" in ends or "system" in ends or "developer" in ends


def _parse_preferences(row: Mapping[str, Any], count: int) -> tuple[Comparison, ...]:
    """The comparisons that a group states, or those that its scores imply: the higher one wins."""
    stated = row.get("comparisons")
    if stated is not None:
        if not isinstance(stated, list):
            what = "a list such as [[0, 1], [0, 2]]"
            raise BadRow.expected(what, "comparisons", stated)
        return tuple(_parse_comparison(item, i, count) for i, item in enumerate(stated))
    scores = row.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        raise BadRow.expected(f"a list of {count} numbers, one a response", "scores", scores)
    for i, score in enumerate(scores):
        if not _is_number(score):
            raise BadRow.expected("a finite number", f"scores[{i}]", score)
    indices = range(count)
    return tuple((i, j, 1.0) for i in indices for j in indices if scores[i] > scores[j])


def _parse_comparison(item: Any, position: int, count: int) -> Comparison:
    field = f"comparisons[{position}]"
    if isinstance(item, Mapping):
        parts: Sequence[Any] = [item.get("winner"), item.get("loser"), item.get("weight")]
    elif isinstance(item, list) and len(item) in (2, 3):
        parts = [*item, None][:3]
    else:
        raise BadRow.expected("[winner, loser] or [winner, loser, weight]", field, item)
    winner, loser = (_response_index(part, field, count) for part in parts[:2])
    if winner == loser:
        raise BadRow(f"{field}: compares response {winner} with itself; expected two responses")
    weight = 1.0 if parts[2] is None else parts[2]
    if not _is_number(weight) or weight < 0:
        raise BadRow.expected("a finite weight of at least 0", field, weight)
    return winner, loser, float(weight)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _response_index(value: Any, field: str, count: int) -> int:
    # Arrow turns [0, 1, 0.5] into floats, so an index may arrive as 1.0.
    if not _is_number(value) or value not in range(count):
        raise BadRow.expected(f"indices of responses from 0 to {count - 1}", field, value)
    return int(value)


def _parse_label(value: Any) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise BadRow.expected("true or false", "label", value)
