"""The prompts of a data set: those of preference rows, as training reads them, or prompts alone."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from ..config import TrainConfig
from ..data.columns import PROBLEM_COLUMN, RESPONSES, TEMPLATE_FIELDS, row_kinds
from ..data.layouts.convert import to_canonical
from ..data.layouts.looks import SYSTEM
from ..data.layouts.mapping import by_columns
from ..data.layouts.recognise import recognise
from ..data.load import Reader
from ..data.messages import ROLES, BadRow, Text, parse_template_kwargs, parse_tools
from ..data.prompts import repeats_prompt
from ..data.rows import check_texts, parse_row
from ..errors import DataError

logger = logging.getLogger(__name__)

_ASKING = ("prompt", "instruction", "system", "history")


@dataclass(frozen=True)
class Prompt:
    """What is asked, and the row that it stands in.

    Attributes:
        text: text, or messages.
        row: its columns; the answers that it has are without what they repeat of the prompt.
        number: of the row in the data set, from 1.
        template: `tools` and further variables of the chat template.
    """

    text: Text
    row: Mapping[str, Any]
    number: int
    template: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(config: TrainConfig, answers: bool = True) -> list[Prompt]:
    """The prompts of `dataset_name`.

    Args:
        config: names the data.
        answers: whether the answers of a row, and what it says of them, have to be whole.

    Raises:
        DataError: a row without one, unless `skip_bad_rows` leaves it out; or none at all.
    """
    name = str(config.dataset_name)
    reader = Reader(config.dataset_train_split, config.dataset_config, all_columns=True)
    raw = reader.read(name)
    prompts: list[Prompt] = []
    bad: list[str] = []
    for number, (row, parse) in enumerate(_rows(raw, config, answers), 1):
        try:
            prompts.append(parse(row, number))
        except BadRow as problem:
            said = f"{name}, row {number}: {problem}"
            if not config.skip_bad_rows:
                raise DataError(said) from None
            bad.append(said)
    if bad:
        logger.warning(f"left out {len(bad)} rows, such as {bad[0]}")
    if not prompts:
        raise DataError(f"{name}: no prompts")
    return prompts


_Parse = Callable[[Mapping[str, Any], int], Prompt]


def _rows(
    raw: datasets.Dataset, config: TrainConfig, answers: bool
) -> Iterator[tuple[Mapping[str, Any], _Parse]]:
    """Every row with what makes a prompt of it."""
    names = _alone(raw, config)
    if names is not None:
        for row in raw.with_format(None):
            yield row, lambda row, number: _read_alone(row, number, names)
        return
    made = to_canonical(raw, str(config.dataset_name), layout=config.layout, columns=config.columns)
    kind = row_kinds(made.column_names)[0]
    repeated = repeats_prompt(made, kind)

    def parse(row: Mapping[str, Any], number: int) -> Prompt:
        if row.get(PROBLEM_COLUMN):
            raise BadRow(str(row[PROBLEM_COLUMN]))
        try:
            found = parse_row(row, kind, repeated=repeated)
        except BadRow:
            if answers or "prompt" not in row:
                raise
            return _read_alone(row, number, _named(row))
        named: dict[str, Any] = dict(zip(found.names, found.responses, strict=True))
        if kind == "group":
            named = {RESPONSES[kind][0]: list(found.responses)}
        template = {"tools": found.tools} if found.tools else {}
        return Prompt(found.prompt, {**row, **named}, number, {**template, **found.template_kwargs})

    for before, row in zip(raw.with_format(None), made.with_format(None), strict=True):
        yield {**before, **row}, parse


def _alone(raw: datasets.Dataset, config: TrainConfig) -> Mapping[str, Any] | None:
    """The columns of prompts without answers; None where the rows are those of a layout."""
    columns: Sequence[str] = raw.column_names
    if config.columns:
        return config.columns if {*config.columns} <= {*_ASKING, *TEMPLATE_FIELDS} else None
    if config.layout or "prompt" not in columns:
        return None
    try:
        recognise(raw, str(config.dataset_name))
    except DataError:
        names = _named(columns)
        system = next((name for name in SYSTEM if name in columns), None)
        return names if system is None else {**names, "system": system}
    return None


def _named(columns: Collection[str]) -> dict[str, str]:
    return {name: name for name in ("prompt", *TEMPLATE_FIELDS) if name in columns}


def _read_alone(row: Mapping[str, Any], number: int, names: Mapping[str, Any]) -> Prompt:
    if row.get(PROBLEM_COLUMN):
        raise BadRow(str(row[PROBLEM_COLUMN]))
    made = by_columns(row, names)
    text = check_texts({"prompt": made.get("prompt")}, ROLES)["prompt"]
    tools = parse_tools(made.get("tools"))
    kwargs = parse_template_kwargs(made.get("chat_template_kwargs"))
    return Prompt(text, row, number, {**({"tools": tools} if tools else {}), **kwargs})
