"""Where a row's prompt ends and its responses begin, in each way in which data sets say it.

TRL reads two of them: a prompt beside responses that follow it, and two responses that begin with
what they share. In many data sets the responses are whole conversations, or texts, that begin with
the prompt that stands beside them. TRL trains on the prompt twice there, or stops; here it counts
once, and the row is noted, for the run to say so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import datasets

from .columns import RESPONSES, RowKind
from .messages import BadRow, Text, describe, plain_message
from .notes import PROMPT_AS_MESSAGE, PROMPT_REPEATED, PROMPT_TWICE

_PROMPTING_ROLES = frozenset({"system", "developer", "user"})
# So many of the rows at least have to repeat their prompt for that to be the data set's layout.
_NEARLY_ALL = 0.95

Message: TypeAlias = Mapping[str, Any]
# A prompt, its responses by their names, and what to note of the row.
Split: TypeAlias = tuple[Text, dict[str, Text], str | None]


def split_implicit(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """A pair without `prompt`: prompt, chosen and rejected.

    The prompt is the longest common prefix, in characters or messages, less a space at its end
    (which belongs to the completions' first word), and never all of the shorter one: its last
    element stays its completion. TRL's `extract_prompt` does the same but where the first
    characters differ already and chosen ends in a space: there it takes all of chosen but that
    space for the prompt, and we take nothing.

    Raises:
        BadRow: where one is text and the other is messages, one is empty, or there is nothing to
            share.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(
            f"rejected: is {describe(rejected)} where chosen is {describe(chosen)}; "
            "expected the same of both"
        )
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text:
            raise BadRow(f"{name}: is empty; expected it to begin with the prompt")
    shorter = min(len(chosen), len(rejected))
    start = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if start is None:
        start = shorter - 1
    elif start > 0 and chosen[start - 1] == " ":
        start -= 1
    if not isinstance(chosen, str) and start == 0:
        raise BadRow(
            "chosen: shares no first message with rejected; expected both to begin with the "
            "prompt's messages, or a field prompt"
        )
    return chosen[:start], chosen[start:], rejected[start:]


def split_explicit(prompt: Text, responses: Mapping[str, Text], *, repeated: bool) -> Split:
    """A prompt and its responses without what they repeat of it, and what to note of the row.

    - Messages that begin with the prompt's messages, or with the last of them from a user's or the
      system's on: these are taken off. No response is likely to begin so by itself.
    - A text and messages: all that the responses share is the prompt where a user says that text in
      it, as in a pair without `prompt`; where the responses hold only what follows, the text is a
      user's message.
    - Texts that begin with the prompt's text: taken off where `repeated` says that it is the data
      set's layout. In one row of many, a response may begin with "A" for other reasons.

    Args:
        prompt: as it stands in the row.
        responses: by their names.
        repeated: whether `repeats_prompt` holds of the data set.

    Raises:
        BadRow: where only some of the responses repeat the prompt, one is nothing else, or the
            prompt is not in them.
    """
    kinds = {type(response) for response in responses.values()}
    if len(kinds) > 1 or (str in kinds and not isinstance(prompt, str)):
        return prompt, dict(responses), None  # refused as a mixture
    if not isinstance(prompt, str):
        return _split_messages(prompt, responses)
    if str in kinds:
        return _split_texts(prompt, responses, repeated)
    return _split_conversations(prompt, responses)


def _split_messages(prompt: list[dict[str, Any]], talks: Mapping[str, Any]) -> Split:
    for start in range(len(prompt)):
        repeat = prompt[start:]
        begins = {name: _begins(talk, repeat) for name, talk in talks.items()}
        if repeat[0]["role"] not in _PROMPTING_ROLES or not any(begins.values()):
            continue
        for name, talk in talks.items():
            if not begins[name]:
                other = next(name for name, does in begins.items() if does)
                raise BadRow(
                    f"{name}: does not begin with the prompt's messages as {other} does; "
                    "expected the same of all"
                )
            if len(talk) == len(repeat):
                raise BadRow(f"{name}: is the prompt's messages alone; expected what follows them")
        rest = {name: talk[len(repeat) :] for name, talk in talks.items()}
        return prompt, rest, PROMPT_REPEATED
    return prompt, dict(talks), None


def _split_texts(prompt: str, texts: Mapping[str, Any], repeated: bool) -> Split:
    if not prompt.strip() or not all(text.startswith(prompt) for text in texts.values()):
        return prompt, dict(texts), None
    if not repeated:
        return prompt, dict(texts), PROMPT_TWICE
    rest = {name: text.removeprefix(prompt) for name, text in texts.items()}
    return prompt, rest, PROMPT_REPEATED


def _split_conversations(prompt: str, talks: Mapping[str, Any]) -> Split:
    shared = _shared_messages(list(talks.values()))
    first = next(iter(talks.values()))
    asked = [message for message in first[:shared] if message["role"] == "user"]
    if any(_stripped(message)["content"] == prompt.strip() for message in asked):
        rest = {name: talk[shared:] for name, talk in talks.items()}
        return first[:shared], rest, PROMPT_REPEATED
    for name, talk in talks.items():
        if talk[0]["role"] in _PROMPTING_ROLES:
            raise BadRow(
                f"{name}: is a conversation in which no user says the text of prompt before it "
                "parts from the others; expected it to begin with the prompt, or to hold only what "
                "follows it"
            )
    return [{"role": "user", "content": prompt}], dict(talks), PROMPT_AS_MESSAGE


def _begins(talk: Sequence[Message], start: Sequence[Message]) -> bool:
    # The last message tells most rows apart, and a conversation has many.
    if len(talk) < len(start) or _stripped(talk[0]) != _stripped(start[0]):
        return False
    return all(_stripped(a) == _stripped(b) for a, b in zip(talk, start, strict=False))


def _stripped(message: Message) -> dict[str, Any]:
    """A message without white space around its text, to be compared with others."""
    plain = plain_message(message)
    content = plain.get("content")
    return plain | {"content": content.strip() if isinstance(content, str) else content}


def _shared_messages(talks: Sequence[Sequence[Message]]) -> int:
    """How many first messages all have in common, never all of the shortest."""
    limit = min(map(len, talks)) - 1
    first = talks[0]
    return next((i for i in range(limit) if any(t[i] != first[i] for t in talks)), limit)


def repeats_prompt(dataset: datasets.Dataset, kind: RowKind) -> bool:
    """Whether nearly every row of text has responses that all begin with its prompt's text.

    Reads no further than it takes to know: a twentieth of the rows, where they do not.
    """
    columns = ["prompt", *RESPONSES[kind]]
    if "prompt" not in dataset.column_names:
        return False
    allowed = (1 - _NEARLY_ALL) * len(dataset)
    repeating = other = 0
    for batch in dataset.with_format(None).select_columns(columns).iter(1000):
        for prompt, *fields in zip(*(batch[name] for name in columns), strict=True):
            responses = fields[0] if kind == "group" else fields
            if not isinstance(prompt, str) or not prompt.strip() or not isinstance(responses, list):
                continue
            if not responses or not all(isinstance(response, str) for response in responses):
                continue
            if all(response.startswith(prompt) for response in responses):
                repeating += 1
            else:
                other += 1
        if other > allowed:
            return False
    return repeating > 0 and other <= (1 - _NEARLY_ALL) * (repeating + other)
