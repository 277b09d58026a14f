"""`fastdpo check`: a data set before anything is trained on it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from .. import terminal
from ..arguments import own_flags
from ..config import TrainConfig
from ..data.load import load_rows
from ..files import write_text
from .check import Checked, check

USAGE = """\
fastdpo check: what is wrong with a data set, and what a model may learn from it by mistake

  fastdpo check pairs.jsonl
  fastdpo check pairs.jsonl --test test.jsonl --model_name_or_path Qwen/Qwen3-0.6B --max_length 1024
  fastdpo check config.yaml --json

Looks for rows that cannot be read, empty, identical, clipped, templated and special texts, exact
and near duplicates, contradictions, prompts that are also evaluated on, languages, and for forms
that tell the better response from the worse: length, lists, phrases. With a model, lengths are in
its tokens and truncation is looked at. Takes the keys of fastdpo train; a file may come first.

  --test FILE         rows to evaluate on; else eval_dataset_name, or the split dataset_test_split
                      where eval_strategy says that it is evaluated on
  -o, --output FILE   write what was found as JSON, with every row's number
  --json              print that instead of a table

Near duplicates and languages need pip install 'fastdpo[check]'.
"""
_MARKS = {"error": "!!", "warning": " !", "note": "  "}


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        FastDPOError: data that cannot be read, or keys that are wrong.
    """
    values = {"output": "a file", "test": "a file"}
    words, given, switches = own_flags(arguments, values, ("json",), "fastdpo check --help")
    if words and not words[0].startswith("-") and Path(words[0]).suffix not in (".yaml", ".yml"):
        words[:1] = ["--dataset_name", words[0]]
    config = TrainConfig.parse(words)
    config.require("dataset_name")
    with terminal.heard("json" not in switches), terminal.progress_bars(config.disable_tqdm):
        found = check_config(config, given.get("test"))
    text = json.dumps(found.as_dict(), indent=2, ensure_ascii=False)
    if "output" in given:
        write_text(Path(given["output"]), text + "\n")
    print(text if "json" in switches else describe(found))


def check_config(config: TrainConfig, test: str | None = None) -> Checked:
    """The checks of the data that a configuration names."""
    name = str(config.dataset_name)
    source = (test, "train") if test is not None else None
    if source is None and config.evaluates:
        source = config.eval_source
    tokenizer = None
    if config.model_name_or_path is not None:
        from ..model.load import load_tokenizer

        tokenizer = load_tokenizer(config)
    return check(
        _load(config, name, config.dataset_train_split),
        name,
        None if source is None else (_load(config, *source), source[0]),
        tokenizer,
        config.max_length,
        config.dataset_num_proc,
    )


def _load(config: TrainConfig, name: str, split: str) -> datasets.Dataset:
    return load_rows(
        name,
        split,
        config_name=config.dataset_config,
        num_proc=config.dataset_num_proc,
        skip_bad_rows=True,
        layout=config.layout,
        columns=config.columns,
    )


def describe(found: Checked) -> str:
    """What was found, as lines for a terminal."""
    said = found.summary
    part = "" if said["read"] == said["rows"] else f", of which {said['read']} were read"
    lines = [
        f"{said['source']}: {said['rows']} rows{part}: {said['responses']} responses, "
        f"{said['pairs']} pairs, in {said['seconds']:.1f} s"
    ]
    lines += _length_table(found.lengths)
    for finding in found.findings:
        count = f"{finding.count} " if finding.rows else ""
        lines.append(f"{_MARKS[finding.level]} {count}{finding.text}")
        lines += [f"       row {row}: {text}" for row, text in finding.examples[:3]]
    grave = f"{said['error']} errors, {said['warning']} warnings"
    lines.append("nothing was found" if not found.findings else f"{grave}, {said['note']} notes")
    return "\n".join(lines)


def brief(found: Checked) -> list[str]:
    """The same in a line each, errors and warnings alone."""
    return [
        f"{finding.count} {finding.text}" if finding.rows else finding.text
        for finding in found.findings
        if finding.level != "note"
    ]


def _length_table(lengths: dict[str, Any]) -> list[str]:
    names = [name for name in ("prompt", "chosen", "rejected") if name in lengths]
    if not names:
        return []
    head = "".join(f"{title:>9}" for title in ("least", "median", "90 %", "99 %", "most", "mean"))
    lines = [f"{lengths['unit']:10}{head}"]
    for name in names:
        part = lengths[name]
        numbers = "".join(f"{value:9.0f}" for value in [*part["quantiles"], part["mean"]])
        lines.append(f"{name:10}{numbers}")
    return lines
