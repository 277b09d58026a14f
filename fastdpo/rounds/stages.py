"""The stages of a round, each of which leaves a file that a later start finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from tqdm import tqdm

from .. import files
from ..config.rounds import RoundsConfig
from ..data.groups import Group
from ..data.write import writer_of
from ..scoring.responses import load_response_scorer
from ..scoring.score import score
from ..terminal import withheld
from .engines import free, load_engine
from .judges import Question
from .prompts import Prompts
from .verdict import load_judge


def sample(
    config: RoundsConfig, file: Path, prompts: Prompts, number: int, round_number: int
) -> datasets.Dataset:
    """`number` answers to each prompt by the model at `model_name_or_path`, in the prompts' order.

    Each batch has a seed of its own and a file in `parts` until all are there.

    Raises:
        FastDPOError: an engine that cannot be loaded.
    """
    if file.exists():
        return datasets.Dataset.from_parquet(str(file))
    parts = file.with_name(f"{file.stem}-parts")
    engine = load_engine(config)
    tokens = prompts.tokens
    order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
    size = config.generation_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    answers: dict[int, list[Any]] = {}
    for place, some in enumerate(tqdm(batches, "sampling", disable=config.disable_tqdm)):
        part = parts / f"{place:06d}.json"
        if not part.exists():
            seed = _seed(config.seed, round_number, file.stem, place)
            found = engine.answer([tokens[i] for i in some], number, seed)
            parts.mkdir(parents=True, exist_ok=True)
            made = [
                [[answer.text, answer.complete, answer.ids, answer.logps] for answer in each]
                for each in found
            ]
            files.write_text(part, json.dumps(made, ensure_ascii=False))
        answers |= zip(some, files.read_json(part), strict=True)
    del engine
    free()
    columns: dict[str, list[Any]] = {name: [] for name in _SAMPLED}
    for i, prompt in enumerate(prompts.all):
        columns["prompt"].append(json.dumps(prompt.text, ensure_ascii=False))
        columns["row"].append(prompt.number)
        for name, values in zip(_OF_ANSWERS, zip(*answers[i], strict=True), strict=True):
            columns[name].append(list(values))
    samples = datasets.Dataset.from_dict(columns, _SAMPLED)
    writer_of(file)(samples)
    shutil.rmtree(parts)
    return samples


_OF_ANSWERS = ("responses", "complete", "tokens", "engine_logps")
_SAMPLED = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "row": datasets.Value("int64"),
        "responses": datasets.List(datasets.Value("string")),
        "complete": datasets.List(datasets.Value("bool")),
        "tokens": datasets.List(datasets.List(datasets.Value("int32"))),
        "engine_logps": datasets.List(datasets.List(datasets.Value("float64"))),
    }
)
"""What is kept of each prompt: as JSON, with the number of its row from 1, and of each answer its
text, whether the model ended it, its tokens, and their log-probabilities by the engine.
"""


def as_samples(prompts: Prompts, answers: Sequence[Any]) -> datasets.Dataset:
    """Answers that the rows have, as if they were sampled."""
    return datasets.Dataset.from_dict(
        {
            "prompt": [json.dumps(prompt.text, ensure_ascii=False) for prompt in prompts.all],
            "row": [prompt.number for prompt in prompts.all],
            "responses": [list(each) for each in answers],
        }
    )


def _seed(*parts: Any) -> int:
    return int(xxhash.xxh32_intdigest(json.dumps(parts).encode()))


def judged(
    config: RoundsConfig, file: Path, prompts: Prompts, samples: datasets.Dataset, cache: Path
) -> tuple[datasets.Dataset, dict[str, dict[str, int]]]:
    """The samples with the judge's scores, and the judge's counts: `failures` by reason, and
    `comparisons`; what an endpoint says is kept in `cache`.

    Raises:
        FastDPOError: a judge that cannot be loaded, or that raises.
    """
    if file.exists():
        found = datasets.Dataset.from_parquet(str(file))
        return found, json.loads(found[0]["judge"])
    judge = load_judge(config, cache)
    scores: list[list[float | None]] = []
    size, answers = config.generation_batch_size, samples["responses"]
    for start in tqdm(range(0, len(prompts), size), "judging", disable=config.disable_tqdm):
        scores += judge(
            [
                Question(one.text, answers[i], one.row, one.template)
                for i, one in enumerate(prompts.all[start : start + size], start)
            ]
        )
    counts = {"failures": judge.failures, "comparisons": judge.comparisons}
    del judge
    free()
    kind = datasets.List(datasets.Value("float64"))
    made = samples.add_column("scores", scores, feature=kind)
    made = made.add_column("judge", [json.dumps(counts)] * len(samples))
    writer_of(file)(made)
    return made, counts


def logps(
    config: RoundsConfig, file: Path, prompts: Prompts, samples: datasets.Dataset, start: str
) -> dict[str, list[list[float]]]:
    """Of the very tokens that were drawn, in nats: `policy`, log π(y|x) of each answer by the model
    at `model_name_or_path`, and `start`, that of the model `start`.
    """
    if file.exists():
        known: dict[str, list[list[float]]] = files.read_json(file)
        return known
    groups = [
        Group(np.array(ids, np.int32), [np.array(each, np.int32) for each in drawn])
        for ids, drawn in zip(prompts.tokens, samples["tokens"], strict=True)
    ]
    found = {"policy": _logps(config, groups)}
    moved = config.model_name_or_path != start
    found["start"] = (
        _logps(config.choose("the start", model_name_or_path=start), groups)
        if moved
        else found["policy"]
    )
    files.write_text(file, json.dumps(found))
    return found


def add_logps(config: RoundsConfig, file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Give rows of answers the log-probabilities that the model at `model_name_or_path` has for
    them, as they are trained on.
    """
    if not file.exists():
        with withheld():
            scored = score(config.of_round(dataset_name=None, devices=None), list(rows)).columns
        files.write_text(file, json.dumps([list(each) for each in scored["response_logps"]]))
    for row, found in zip(rows, files.read_json(file), strict=True):
        row["logps"] = found


def _logps(config: RoundsConfig, groups: Sequence[Group]) -> list[list[float]]:
    with withheld():
        alone = config.of_round(dataset_name=None, devices=None)
        scorer = load_response_scorer(alone, referred=False)
        found = [each.logps.tolist() for each in scorer(groups)]
    del scorer
    free()
    return found
