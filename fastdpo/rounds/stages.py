"""The stages of a round, each of which leaves a file that a later start finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import xxhash
from tqdm import tqdm

from .. import files
from ..config.rounds import RoundsConfig
from ..data.write import writer_of
from ..errors import DataError
from ..scoring.score import score
from ..terminal import withheld
from .engines import free, load_engine
from .judges import Question
from .prompts import Prompts, as_completion
from .verdict import load_judge


def sample(
    config: RoundsConfig, file: Path, prompts: Prompts, number: int, round_number: int
) -> datasets.Dataset:
    """`number` answers to each prompt by the model at `model_name_or_path`, in the prompts' order.

    Each batch has a seed of its own and a file in `parts` until all are there.

    Raises:
        FastDPOError: an engine that cannot be loaded, or a prompt without room for an answer.
    """
    if file.exists():
        return datasets.Dataset.from_parquet(str(file))
    parts = file.with_name(f"{file.stem}-parts")
    parts.mkdir(exist_ok=True)
    engine = load_engine(config)
    tokens = [engine.encode(prompt) for prompt in prompts.texts]
    for index, ids in enumerate(tokens):
        if config.max_length is not None and len(ids) >= config.max_length:
            raise DataError(
                f"{prompts.where(index)}: the prompt has {len(ids)} tokens and max_length is "
                f"{config.max_length}: no room for an answer"
            )
    order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
    size = config.generation_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    answers: dict[int, list[Any]] = {}
    for place, some in enumerate(tqdm(batches, "sampling", disable=config.disable_tqdm)):
        part = parts / f"{place:06d}.json"
        if not part.exists():
            seed = _seed(config.seed, round_number, file.stem, place)
            found = engine.answer([tokens[i] for i in some], number, seed)
            made = [[[answer.text, answer.complete] for answer in each] for each in found]
            files.write_text(part, json.dumps(made, ensure_ascii=False))
        answers |= zip(some, files.read_json(part), strict=True)
    del engine
    free()
    rows = [
        {
            "prompt": json.dumps(text, ensure_ascii=False),
            "row": prompts.numbers[i],
            "responses": [answer for answer, _ in answers[i]],
            "complete": [complete for _, complete in answers[i]],
        }
        for i, text in enumerate(prompts.texts)
    ]
    samples = datasets.Dataset.from_list(rows)
    writer_of(file)(samples)
    shutil.rmtree(parts)
    return samples


def _seed(*parts: Any) -> int:
    return int(xxhash.xxh32_intdigest(json.dumps(parts).encode()))


def judged(
    config: RoundsConfig, file: Path, prompts: Prompts, samples: datasets.Dataset, cache: Path
) -> tuple[datasets.Dataset, dict[str, int]]:
    """The samples with the judge's scores, and how many could not be scored, by reason; what an
    endpoint says is kept in `cache`.

    Raises:
        FastDPOError: a judge that cannot be loaded, or that raises.
    """
    if file.exists():
        found = datasets.Dataset.from_parquet(str(file))
        return found, json.loads(found[0]["failures"])
    judge = load_judge(config, cache)
    scores: list[list[float | None]] = []
    size, rows = config.generation_batch_size, list(samples)
    for start in tqdm(range(0, len(rows), size), "judging", disable=config.disable_tqdm):
        scores += judge(
            [
                Question(prompts.texts[i], rows[i]["responses"], prompts.rows[i])
                for i in range(start, min(start + size, len(rows)))
            ]
        )
    failures = dict(judge.failures)
    del judge
    free()
    kind = datasets.List(datasets.Value("float64"))
    made = samples.add_column("scores", scores, feature=kind)
    made = made.add_column("failures", [json.dumps(failures)] * len(samples))
    writer_of(file)(made)
    return made, failures


def gains(
    config: RoundsConfig, file: Path, prompts: Prompts, samples: datasets.Dataset, start: str
) -> dict[str, list[Any]]:
    """Of the one answer to each prompt: `tokens`, and `gains`, log π(y|x) − log π_start(y|x)."""
    if file.exists():
        known: dict[str, list[Any]] = files.read_json(file)
        return known
    rows = [
        {"prompt": prompt, "responses": [as_completion(prompt, row["responses"][0])]}
        for prompt, row in zip(prompts.texts, samples, strict=True)
    ]
    moved = config.model_name_or_path != start
    with withheld():
        made = score(
            config.of_round(
                ref_model_name_or_path=start if moved else None, dataset_name=None, datasets=[]
            ),
            rows,
        ).columns
    found = {"tokens": [each[0] if each else 0 for each in made["response_tokens"]]}
    found["gains"] = [0.0] * len(found["tokens"])
    if moved:
        pairs = zip(made["response_logps"], made["response_ref_logps"], strict=True)
        found["gains"] = [mine[0] - theirs[0] if mine else 0.0 for mine, theirs in pairs]
    files.write_text(file, json.dumps(found))
    return found
