"""Rows to the texts that are tokenised, by the tokenizer's chat template, and what it leaves out.

A template renders what its author thought of and passes over the rest without a word: tool calls,
tools, thinking, contents that are lists of parts. What is lost so is found by rendering, once as
the row is and, where there are tools, once with something changed: what changes nothing is not
rendered.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import ModelError
from .messages import CALLS, RESULT_ROLES, BadRow, content_parts, join_parts, says_something
from .notes import CONTENT_DROPPED, DOUBLE_EOS, EMPTY_RESPONSE, TOOLS_IGNORED
from .rows import Row

_MARK = "fastdpo_probe_"
_THINKING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Rendered:
    """A row and what the tokenizer's chat template makes of it.

    Attributes:
        row: as it was checked.
        texts: the prompt and, for each response, prompt and response: each a text or, of messages
            and a tokenizer with its own way, ids.
        notes: what there is to say of the row, of `fastdpo.data.notes`.
    """

    row: Row
    texts: list[Any]
    notes: frozenset[str]


@dataclass(frozen=True)
class Renderer:
    """What a tokenizer makes of a row before it tokenises.

    Attributes:
        tokenizer: any transformers tokenizer.
        source: what the rows came from, in a user's words.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str

    @functools.cached_property
    def to_text(self) -> bool:
        """Whether `apply_chat_template` is transformers' own, which tokenises what it renders."""
        method = type(self.tokenizer).apply_chat_template
        return method is PreTrainedTokenizerBase.apply_chat_template

    @functools.cached_property
    def eos(self) -> str | None:
        """What ends a response of plain text; the tokenizer looks it up at every call."""
        return self.tokenizer.eos_token

    def render(self, row: Row) -> Rendered:
        """The row's texts, and what there is to note of it.

        Raises:
            BadRow: the template cannot render the row, or leaves out what must not be missing.
            ModelError: a tokenizer without what the row needs.
        """
        if isinstance(row.prompt, str):
            texts = [row.prompt, *(row.prompt + self._end(str(r)) for r in row.responses)]
            shown, ignored = row, {TOOLS_IGNORED} if row.tools else set()
        else:
            texts, shown = self._render_messages(row)
            self._check_calls(shown, texts)
            ignored = self._ignored(shown, texts)
        return Rendered(row, texts, row.notes | ignored | self._ends(shown, texts))

    def _end(self, response: str) -> str:
        eos = self.eos
        if eos is None:
            raise ModelError(
                "the tokenizer has no eos_token, which ends every response of plain text; set one, "
                "or use a tokenizer that has it"
            )
        return response if response.endswith(eos) else response + eos

    def _render_messages(self, row: Row) -> tuple[list[Any], Row]:
        """The texts of a row of messages, and the row with such contents as were rendered: those
        that are parts are joined to text where the template does not read parts.
        """
        if not any(isinstance(message.get("content"), list) for message in _messages(row)):
            return self._render_all(row), row
        try:
            texts = self._render_all(row)
        except BadRow:
            texts = []  # not rendered as it is; joined, it may be
        if texts and (not self.to_text or _reads_parts(row, texts)):
            return texts, row
        row = _replace_messages(row, join_parts)
        return self._render_all(row), row

    def _render_all(self, row: Row) -> list[Any]:
        prompt = list(row.prompt)
        full = [self._apply(row, [*prompt, *response], False) for response in row.responses]
        return [self._apply(row, prompt, True), *full]

    def _apply(self, row: Row, messages: list[Any], generate: bool) -> Any:
        has_template = self.tokenizer.chat_template or "chat_template" in row.template_kwargs
        if self.to_text and not has_template:
            raise ModelError(
                f"{self.source} holds messages, but the tokenizer has no chat template; use the "
                "tokenizer of a chat model, or give prompt and responses as text"
            )
        kwargs: dict[str, Any] = {"tools": row.tools, **row.template_kwargs}
        if generate:
            kwargs["add_generation_prompt"] = True
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=not self.to_text, **kwargs
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadRow(f"the chat template cannot render it: {error}") from error
        return rendered if self.to_text else rendered["input_ids"]

    def _check_calls(self, row: Row, texts: list[Any]) -> None:
        """Refuse a template that leaves out a call of a tool: what is left says something else.

        Every called function gets another name, which must be in the text where the call is.
        """
        if not any(message.get(name) for message in _messages(row) for name in CALLS):
            return
        marks: dict[str, str] = {}
        marked = _replace_messages(row, lambda message, field: _mark_calls(message, field, marks))
        try:
            others = self._render_all(marked)
        except BadRow:
            return  # a template that looks at the functions' names does not leave them out
        for field, name in marks.items():
            own = [i for i, start in enumerate(row.names, 1) if field.startswith(f"{start}[")]
            for place in own or range(1, len(texts)):
                known = name in others[place] if self.to_text else others[place] != texts[place]
                if not known:
                    raise BadRow(
                        f"{field}: the chat template renders nothing of it; expected the chat "
                        "template of a model that calls tools"
                    )

    def _ignored(self, row: Row, texts: list[Any]) -> set[str]:
        """Notes of what the template leaves out, but for what makes a row unusable."""
        notes = set()
        if row.tools and self._apply(replace(row, tools=None), list(row.prompt), True) == texts[0]:
            notes.add(TOOLS_IGNORED)
        if self.to_text:
            for text, response in zip(texts[1:], row.responses, strict=True):
                if not all(_holds(text, said) for said in _said(row.prompt, response)):
                    notes.add(CONTENT_DROPPED)
        return notes

    def _ends(self, row: Row, texts: list[Any]) -> set[str]:
        """Notes of responses that are nothing but their end, and of an end that is there twice."""
        eos, notes = self.eos or "", set()
        for response in row.responses:
            own = response.removesuffix(eos) if isinstance(response, str) else response
            if not says_something(own, ("content", *CALLS, *_THINKING)):
                notes.add(EMPTY_RESPONSE)
        for text in texts[1:] if eos else ():
            if isinstance(text, str):
                rest = text.rstrip().removesuffix(eos)
                twice = len(rest) < len(text.rstrip()) and rest.rstrip().endswith(eos)
            else:
                twice = text[-2:] == [self.tokenizer.eos_token_id] * 2
            if twice:
                notes.add(DOUBLE_EOS)
        return notes


def _messages(row: Row) -> Iterator[dict[str, Any]]:
    for text in (row.prompt, *row.responses):
        yield from () if isinstance(text, str) else text


def _replace_messages(row: Row, change: Callable[[dict[str, Any], str], dict[str, Any]]) -> Row:
    """The row with other messages, made of each and of how it is called."""
    changed = [
        [change(message, f"{name}[{i}]") for i, message in enumerate(text)]
        for name, text in zip(("prompt", *row.names), (row.prompt, *row.responses), strict=True)
        if not isinstance(text, str)
    ]
    return replace(row, prompt=changed[0], responses=tuple(changed[1:]))


def _mark_calls(message: dict[str, Any], field: str, marks: dict[str, str]) -> dict[str, Any]:
    """The message with another name for each function that it calls; `marks` has them by field."""

    def mark(call: Mapping[str, Any], where: str) -> dict[str, Any]:
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": mark(call["function"], where)}
        marks[where] = f"{_MARK}{len(marks)}_"
        return {**call, "name": marks[where]}

    changed = dict(message)
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [
            mark(call, f"{field}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    if call := message.get("function_call"):
        changed["function_call"] = mark(call, f"{field}.function_call")
    return changed


def _reads_parts(row: Row, texts: list[str]) -> bool:
    """Whether the texts hold what the parts of contents say, and not how Python or JSON writes
    them.
    """
    for message in _messages(row):
        for part in content_parts(message):
            said = [value for key, value in part.items() if key != "type" and value]
            if not all(
                _holds(texts[-1] + texts[1], said) for said in said if isinstance(said, str)
            ):
                return False
            written = (str(part), json.dumps(part, ensure_ascii=False))
            if any(notation in text for notation in written for text in texts):
                return False
    return True


def _said(prompt: Any, response: Any) -> Iterator[str]:
    """What of a response, and of who speaks, should be in the text."""
    for message in response:
        for key in ("content", *_THINKING):
            if isinstance(message.get(key), str):
                yield message[key]
    for message in (*prompt, *response):
        if message["role"] not in RESULT_ROLES and isinstance(message.get("name"), str):
            yield message["name"]


def _holds(text: str, part: str) -> bool:
    """Whether a part is in a text, white space aside, which templates trim."""
    part = part.strip()
    return part in text or "".join(part.split()) in "".join(text.split())
