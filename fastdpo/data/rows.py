"""One raw row of preference data, checked and brought into a single shape.

Four layouts are read. Pairs and labels mean what they mean in TRL; groups are ours:

- `prompt`, `chosen`, `rejected`: a pair, each field text or a list of messages;
- `chosen`, `rejected`: a pair whose prompt is what both begin with;
- `prompt`, `responses` and `comparisons`, `scores` or `rankings`: N responses to one prompt, with
  the `logps` of the policy that made them where they are known;
- `prompt`, `completion`, `label`: one labelled response (KTO).

Messages may be written as JSON in a column of text.
"""

import json
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

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
from .preferences import Comparison, Preferences, parse_preferences
from .prompts import split_explicit, split_implicit


@dataclass(frozen=True)
class Row:
    """A checked row: a prompt, its responses and what is said about them.

    Attributes:
        prompt: text, or the prompt's messages.
        responses: what follows the prompt, each of the prompt's own type.
        names: the responses' field names, for messages to the user.
        preferences: what the row says of the responses.
        tools: what the chat template is given as tools.
        template_kwargs: further variables of the chat template.
        notes: what there is to say of the row, of `fastdpo.data.notes`.
    """

    prompt: Text
    responses: tuple[Text, ...]
    names: tuple[str, ...]
    preferences: Preferences
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
        responses = check_texts(_responses(row, kind), roles)
        prompt, *rest = split_implicit(*responses.values())
        responses = dict(zip(responses, rest, strict=True))
    else:
        prompt = check_texts({"prompt": row.get("prompt")}, roles)["prompt"]
        responses = check_texts(_responses(row, kind), roles)
        prompt, responses, note = split_explicit(prompt, responses, repeated=repeated)
        notes |= {note} if note else set()
    for name, response in responses.items():
        _check_response(name, response, prompt)
    if any(map(_leaves_the_assistant, responses.values())):
        notes.add(NOT_THE_ASSISTANT)
    if not says_something(prompt):
        notes.add(EMPTY_PROMPT)
    return Row(
        prompt,
        tuple(responses.values()),
        tuple(responses),
        parse_preferences(row, kind, len(responses)),
        parse_tools(row.get("tools")),
        parse_template_kwargs(row.get("chat_template_kwargs")),
        frozenset(notes),
    )


def limit_comparisons(row: Row, limit: int | None, seed: int) -> tuple[Comparison, ...]:
    """At most `limit` of the row's comparisons, in their order.

    The choice depends on the seed and on what the row says, never on where the row stands, so
    it survives shuffling, sharding and resuming.
    """
    comparisons = row.preferences.comparisons
    if limit is None or len(comparisons) <= limit:
        return comparisons
    content = json.dumps([seed, row.prompt, row.responses], sort_keys=True, default=str)
    choice = random.Random(xxhash.xxh64_intdigest(content.encode()))
    kept = sorted(choice.sample(range(len(comparisons)), limit))
    return tuple(comparisons[i] for i in kept)


def _responses(row: Mapping[str, Any], kind: RowKind) -> dict[str, Any]:
    if kind != "group":
        return {name: row.get(name) for name in RESPONSES[kind]}
    listed = row.get("responses")
    if not isinstance(listed, list) or not listed:
        raise BadRow.expected("a list of texts or of lists of messages", "responses", listed)
    return {f"responses[{position}]": item for position, item in enumerate(listed)}


def check_texts(named: dict[str, Any], roles: Collection[str]) -> dict[str, Text]:
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
