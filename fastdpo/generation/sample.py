"""`fastdpo sample`: answers to one prompt, or to those of a data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import terminal
from ..arguments import check_output, own_flags
from ..config.datasets import paths_read
from ..data.columns import LINE_COLUMN, PREFERENCES, PROBLEM_COLUMN
from ..data.write import json_line, writer_of
from ..errors import ConfigError
from ..hub import reached
from ..model.sampler import Answer, Sampler
from .command import SAMPLING, model_config, number, sampling
from .prompts import Prompt, read_prompts

USAGE = """\
fastdpo sample: answers of a model, to one prompt or to those of a file

  fastdpo sample out --prompt "Why is the sky blue?" -n 4
  fastdpo sample out --dataset_name prompts.jsonl -n 4 -o samples.jsonl

Each row keeps its columns but for its responses, and gets responses, and complete: whether the
model ended each one itself. Text prompts are continued as they stand, messages go through the chat
template; --prompt is one user message where there is a template. fastdpo score reads the result.

  -n, --number N        answers a prompt, 1 unless it is given
  -o, --output FILE     where rows go: .jsonl, .jsonl.gz or .parquet; else they are printed
  --temperature T       0 takes the likeliest token each time; 1 unless it is given
  --top_p P, --top_k K  draw from the likeliest tokens only
  --max_new_tokens N    tokens of an answer at most, 256 unless it is given
  --batch_size N        prompts at a time, 8 unless it is given
  --seed N              of what is drawn
"""
_REPLACED = frozenset(
    {"complete", "responses", "chosen", "rejected", "completion", "label", "logps"}
    | {*PREFERENCES, LINE_COLUMN, PROBLEM_COLUMN}
)


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        FastDPOError: a model or data that cannot be loaded, or a flag that is wrong.
    """
    values = SAMPLING | {
        "prompt": "a text",
        "number": "a number of answers",
        "output": "a file",
        "batch_size": "a number of prompts",
    }
    words, given, _ = own_flags(arguments, values, (), "fastdpo sample --help")
    config, how = model_config(words, "sample", values), sampling(given)
    if ("prompt" in given) == (config.dataset_name is not None):
        raise ConfigError("expected one of --prompt and --dataset_name (fastdpo sample --help)")
    counts = {
        name: int(number(name, given.get(name, default), least=1))
        for name, default in (("number", "1"), ("batch_size", "8"))
    }
    write = writer_of(Path(given["output"])) if "output" in given else None
    if write is not None:
        check_output(Path(given["output"]), paths_read([], config.dataset_name))
    with reached(config), terminal.withheld(), terminal.progress_bars(config.disable_tqdm):
        prompts = [] if "prompt" in given else read_prompts(config, answers=False)
        sampler = Sampler.load(config)
        if "prompt" in given:
            chat = sampler.tokenizer.chat_template is not None
            text = given["prompt"]
            prompts = [Prompt([{"role": "user", "content": text}] if chat else text, {}, 1)]
        rows: list[dict[str, Any]] = [{**one.row, "prompt": one.text} for one in prompts]
        found = sampler.sample(
            [sampler.encode(one.text, one.template) for one in prompts],
            how,
            counts["number"],
            seed=config.seed,
            batch_size=counts["batch_size"],
        )
        for index, answers in tqdm(found, "sample", len(rows), disable=config.disable_tqdm):
            rows[index] = with_answers(rows[index], answers)
        if write is not None:
            write(rows)
            print(f"{len(rows)} rows, {counts['number']} answers each: {given['output']}")
            return
    for row in rows:
        print(json_line(row))


def with_answers(row: Mapping[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
    """A row with sampled responses, of its prompt's own type, in place of those that it had."""
    kept = {name: value for name, value in row.items() if name not in _REPLACED}
    responses: list[Any] = [answer.text for answer in answers]
    if not isinstance(row["prompt"], str):
        responses = [[{"role": "assistant", "content": text}] for text in responses]
    return {**kept, "responses": responses, "complete": [answer.complete for answer in answers]}
