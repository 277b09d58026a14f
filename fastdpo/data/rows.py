"""One raw row of preference data, checked and brought into a single shape.

Four layouts are read. Pairs and labels mean what they mean in TRL; groups are ours:

- `prompt`, `chosen`, `rejected`: a pair, each field text or a list of messages;
- `chosen`, `rejected`: a pair whose prompt is what both begin with;
- `prompt`, `responses` and `comparisons` or `scores`: N responses to one prompt;
- `prompt`, `completion`, `label`: one labelled response (KTO).
"""

import json
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import xxhash

from ..errors import DataError
from .messages import (
    ROLES,
    BadRow,
    Text,
    check_text,
    describe,
    implicit_prompt_length,
    parse_template_kwargs,
    parse_tools,
)

RowKind: TypeAlias = Literal["pair", "group", "label"]
Comparison: TypeAlias = tuple[int, int, float]

# Every column that is read; any other is left alone.
FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "responses",
    "comparisons",
    "scores",
    "completion",
    "label",
    "tools",
    "chat_template_kwargs",
)
# Columns of our own readers: the line a row began on, and why it could not be read.
LINE_COLUMN = "fastdpo_line"
PROBLEM_COLUMN = "fastdpo_problem"

_EXPECTED_COLUMNS = (
    "prompt, chosen, rejected; or chosen, rejected; or prompt, responses and comparisons or "
    "scores; or prompt, completion, label"
)


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
    """

    prompt: Text
    responses: tuple[Text, ...]
    names: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    label: bool | None
    tools: list[Any] | None
    template_kwargs: Mapping[str, Any]

    @property
    def conversational(self) -> bool:
        """Whether the row consists of messages rather than of text."""
        return not isinstance(self.prompt, str)


def row_kind(columns: Collection[str], where: str) -> RowKind:
    """The layout that these columns hold; a pair where they hold more than one.

    Raises:
        DataError: where columns are missing, naming those found and those expected.
    """
    names = set(columns)
    if names & {"image", "images"}:
        raise DataError(f"{where}: has a column of images; only text can be trained on")
    if {"chosen", "rejected"} <= names:
        return "pair"
    if {"prompt", "responses"} <= names and names & {"comparisons", "scores"}:
        return "group"
    if {"prompt", "completion", "label"} <= names:
        return "label"
    found = ", ".join(sorted(names - {LINE_COLUMN, PROBLEM_COLUMN})) or "none"
    raise DataError(f"{where}: missing columns: found {found}; expected {_EXPECTED_COLUMNS}")


def parse_row(row: Mapping[str, Any], kind: RowKind, roles: Collection[str] = ROLES) -> Row:
    """Check one row of the given layout.

    Raises:
        BadRow: naming the field and what was expected.
    """
    comparisons: tuple[Comparison, ...] = ()
    label = None
    if kind == "pair":
        prompt, responses = _parse_pair(row, roles)
        comparisons = ((0, 1, 1.0),)
    else:
        prompt = check_text(row.get("prompt"), "prompt", roles)
        if kind == "group":
            responses = _parse_responses(row.get("responses"), roles)
            comparisons = _parse_preferences(row, len(responses))
        else:
            responses = {"completion": check_text(row.get("completion"), "completion", roles)}
            label = _parse_label(row.get("label"))
    for name, response in responses.items():
        if isinstance(prompt, str) != isinstance(response, str):
            raise BadRow(
                f"{name}: is {describe(response)} where prompt is {describe(prompt)}; expected "
                'both to be text, or both messages such as [{"role": "assistant", "content": ""}]'
            )
    return Row(
        prompt,
        tuple(responses.values()),
        tuple(responses),
        comparisons,
        label,
        parse_tools(row.get("tools")),
        parse_template_kwargs(row.get("chat_template_kwargs")),
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


def _parse_pair(row: Mapping[str, Any], roles: Collection[str]) -> tuple[Text, dict[str, Text]]:
    chosen = check_text(row.get("chosen"), "chosen", roles)
    rejected = check_text(row.get("rejected"), "rejected", roles)
    if "prompt" in row:
        prompt = check_text(row["prompt"], "prompt", roles)
        return prompt, {"chosen": chosen, "rejected": rejected}
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(
            f"rejected: is {describe(rejected)} where chosen is {describe(chosen)}; "
            "expected the same of both"
        )
    start = implicit_prompt_length(chosen, rejected)
    if not isinstance(chosen, str) and start == 0:
        raise BadRow(
            "chosen: shares no first message with rejected; expected both to begin with the "
            "prompt's messages, or a field prompt"
        )
    return chosen[:start], {"chosen": chosen[start:], "rejected": rejected[start:]}


def _parse_responses(value: Any, roles: Collection[str]) -> dict[str, Text]:
    if not isinstance(value, list) or not value:
        raise BadRow(
            "responses: expected a list of texts or of lists of messages, found " + describe(value)
        )
    names = [f"responses[{position}]" for position in range(len(value))]
    return {name: check_text(item, name, roles) for name, item in zip(names, value, strict=True)}


def _parse_preferences(row: Mapping[str, Any], count: int) -> tuple[Comparison, ...]:
    """The comparisons that a group states, or those that its scores imply: the higher one wins."""
    stated = row.get("comparisons")
    if stated is not None:
        if not isinstance(stated, list):
            raise BadRow(
                "comparisons: expected a list such as [[0, 1], [0, 2]], found " + describe(stated)
            )
        return tuple(_parse_comparison(item, i, count) for i, item in enumerate(stated))
    scores = row.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        raise BadRow(
            f"scores: expected a list of {count} numbers, one a response, found {describe(scores)}"
        )
    for i, score in enumerate(scores):
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise BadRow(f"scores[{i}]: expected a finite number, found {describe(score)}")
    indices = range(count)
    return tuple((i, j, 1.0) for i in indices for j in indices if scores[i] > scores[j])


def _parse_comparison(item: Any, position: int, count: int) -> Comparison:
    field = f"comparisons[{position}]"
    if isinstance(item, Mapping):
        parts: Sequence[Any] = [item.get("winner"), item.get("loser"), item.get("weight")]
    elif isinstance(item, list) and len(item) in (2, 3):
        parts = [*item, None][:3]
    else:
        expected = "[winner, loser] or [winner, loser, weight]"
        raise BadRow(f"{field}: expected {expected}, found {describe(item)}")
    winner, loser = (_response_index(part, field, count) for part in parts[:2])
    if winner == loser:
        raise BadRow(f"{field}: compares response {winner} with itself; expected two responses")
    weight = 1.0 if parts[2] is None else parts[2]
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < math.inf:
        raise BadRow(f"{field}: expected a finite weight of at least 0, found {describe(weight)}")
    return winner, loser, float(weight)


def _response_index(value: Any, field: str, count: int) -> int:
    # Arrow turns [0, 1, 0.5] into floats, so an index may arrive as 1.0.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value not in range(count):
        raise BadRow(
            f"{field}: expected indices of responses from 0 to {count - 1}, found {describe(value)}"
        )
    return int(value)


def _parse_label(value: Any) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise BadRow(f"label: expected true or false, found {describe(value)}")
