"""`rounds`: the stages of every round, each of which leaves a file.

    output_dir/rounds.jsonl            a line for the start, and one for each round that has ended
    output_dir/round-N/samples.parquet prompts with their answers
    output_dir/round-N/scored.parquet  the same with scores
    output_dir/round-N/train.parquet   what was trained on
    output_dir/round-N/held-out.parquet
    output_dir/round-N/model           the model of the round

A stage whose file is there is not done again; one that was broken off goes on from the batches that
it has, in `parts`. Every batch has a seed of its own, so it comes out the same in a later start.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from tqdm import tqdm

from .. import files
from ..config.rounds import RoundsConfig
from ..errors import ConfigError, DataError
from ..hub import reached
from ..scoring.score import score
from ..terminal import progress_bars, withheld
from ..training.output import METRICS
from ..training.run import train
from .engines import Engine, free, load_engine
from .judges import Judge, Question
from .pairing import Scored, describe, make_rows
from .prompts import Prompts, load_prompts
from .verdict import load_judge
from .watch import Watched, watched

logger = logging.getLogger(__name__)

LOG = "rounds.jsonl"
CONFIG = "rounds_config.yaml"
_START = "round-0"


@dataclass(frozen=True)
class RoundsResult:
    """What the rounds leave behind."""

    model: str
    """The model of the last round that counts; the start where none does."""
    rounds: list[dict[str, Any]]
    """The lines of rounds.jsonl."""


def rounds(config: RoundsConfig) -> RoundsResult:
    """Run, or go on with, the rounds of a configuration.

    Raises:
        FastDPOError: anything wrong with configuration, data, model, engine or judge; what was
            done until then stays, and the same call goes on from there.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder, _refuse(folder)), progress_bars(config.disable_tqdm), reached(config):
        _claim(folder, config)
        return _Rounds(config, folder).run()


def _refuse(folder: Path) -> Callable[[], None]:
    def refuse() -> None:
        raise ConfigError(f"{folder}: another run is writing there")

    return refuse


def _claim(folder: Path, config: RoundsConfig) -> None:
    """Raise ConfigError where the directory holds something else than these rounds."""
    file, text = folder / CONFIG, config.to_yaml()
    if file.exists():
        before = RoundsConfig.load(file).to_dict()
        other = [name for name, value in config.to_dict().items() if value != before[name]]
        if changed := [name for name in other if name not in ("rounds", "disable_tqdm")]:
            raise config.error(
                changed[0], f"differs from the rounds in {folder}; expected another output_dir"
            )
    elif any(entry.name != ".fastdpo-lock" for entry in folder.iterdir()):
        raise config.error("output_dir", f"{folder} holds other files; expected a new directory")
    files.write_text(file, text)


class _Rounds:
    """The state of the rounds."""

    def __init__(self, config: RoundsConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.start = self.policy = str(config.model_name_or_path)
        self.lines: list[dict[str, Any]] = _read_lines(folder / LOG)
        for line in self.lines:
            if line.get("taken"):
                self.policy = str(folder / line["model"])
        self.prompts = load_prompts(config)

    def run(self) -> RoundsResult:
        if not self.lines:
            found = self._watch(0)
            self._end({"round": 0, "model": None, "taken": False, **found})
        for number in range(len(self.lines), self.config.rounds + 1):
            if self.lines[-1].get("last"):
                break
            self._round(number)
        return RoundsResult(self.policy, self.lines)

    def _round(self, number: int) -> None:
        folder = self.folder / f"round-{number}"
        folder.mkdir(exist_ok=True)
        times: dict[str, float] = {}
        some = self.prompts.of_round(number, self.config.prompts_per_round)
        with _timed(times, "sampling"):
            samples = self._samples(folder, some, self.config.num_generations, number)
        with _timed(times, "scoring"):
            scored, failures = self._scored(folder, some, samples)
        made = make_rows(self.config, _as_scored(some, scored))
        datasets.Dataset.from_list(made.rows).to_parquet(str(folder / "train.parquet"))
        with _timed(times, "training"):
            self._train(folder)
        line: dict[str, Any] = {
            "round": number,
            "model": f"round-{number}/model",
            "prompts": len(some),
            "rows": len(made.rows),
            "left_out": made.left_out,
            "failures": failures,
            **_distribution(scored),
            "loss": _last_loss(folder / "model" / METRICS),
        }
        with _timed(times, "watching"):
            line |= self._watch(number)
        self._end(self._judged(line) | {"seconds": {n: round(s, 2) for n, s in times.items()}})

    def _judged(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line of a round with what is to be said of it, and whether it counts."""
        before = next(one for one in reversed(self.lines) if one.get("taken") or one["round"] == 0)
        said = []
        worse = line["score"] is not None and before["score"] is not None
        worse = worse and line["score"] < before["score"]
        if worse:
            said.append(f"held-out score fell from {before['score']:.3f} to {line['score']:.3f}")
        if line["repetition"] > self.config.max_repetition:
            said.append(f"answers repeat themselves ({line['repetition']:.0%} of 4-grams)")
        far = self.config.max_kl is not None and line["kl"] > self.config.max_kl
        if far:
            said.append(
                f"{line['kl']:.3f} nats a token from the start, above max_kl: the last round"
            )
        taken = self.config.take_worse_rounds or not worse
        if not taken:
            said.append("not taken")
        return line | {"taken": taken, "last": far, "said": said}

    def _end(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        text = "".join(json.dumps(one) + "\n" for one in self.lines)
        files.write_text(self.folder / LOG, text)
        if line.get("taken"):
            self.policy = str(self.folder / line["model"])
        logger.info(_describe(line))

    # Stages

    def _samples(
        self, folder: Path, prompts: Prompts, number: int, seed: int, name: str = "samples"
    ) -> datasets.Dataset:
        """The prompts' answers, in their order."""
        file = folder / f"{name}.parquet"
        if file.exists():
            return datasets.Dataset.from_parquet(str(file))
        parts = folder / f"{name}-parts"
        parts.mkdir(exist_ok=True)
        engine: Engine = load_engine(self._now())
        tokens = [engine.encode(prompt) for prompt in prompts.texts]
        room = self.config.max_length
        for index, ids in enumerate(tokens):
            if room is not None and len(ids) >= room:
                raise DataError(
                    f"{prompts.where(index)}: the prompt has {len(ids)} tokens and max_length is "
                    f"{room}: no room for an answer"
                )
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
        size = self.config.generation_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        for place, some in enumerate(tqdm(batches, "sampling", disable=self.config.disable_tqdm)):
            part = parts / f"{place:06d}.json"
            if part.exists():
                continue
            found = engine.answer(
                [tokens[i] for i in some], number, _seed(self.config.seed, seed, name, place)
            )
            made = {
                index: [[answer.text, answer.complete] for answer in answers]
                for index, answers in zip(some, found, strict=True)
            }
            files.write_text(part, json.dumps(made, ensure_ascii=False))
        del engine
        free()
        every: dict[int, list[Any]] = {}
        for part in sorted(parts.glob("*.json")):
            every |= {int(i): answers for i, answers in files.read_json(part).items()}
        rows = [
            {
                "prompt": json.dumps(prompts.texts[i], ensure_ascii=False),
                "row": prompts.numbers[i],
                "responses": [text for text, _ in every[i]],
                "complete": [whole for _, whole in every[i]],
            }
            for i in range(len(prompts))
        ]
        made = datasets.Dataset.from_list(rows)
        with files.atomic_file(file) as temporary:
            made.to_parquet(str(temporary))
        shutil.rmtree(parts)
        return made

    def _scored(
        self, folder: Path, prompts: Prompts, samples: datasets.Dataset, name: str = "scored"
    ) -> tuple[datasets.Dataset, dict[str, int]]:
        """The samples with the judge's scores, and what could not be scored, by reason."""
        file = folder / f"{name}.parquet"
        if file.exists():
            made = datasets.Dataset.from_parquet(str(file))
            return made, json.loads(made[0]["failures"])
        judge = self._judge()
        scores: list[list[float | None]] = []
        size = self.config.generation_batch_size
        rows = list(samples)
        for start in tqdm(range(0, len(rows), size), "judging", disable=self.config.disable_tqdm):
            questions = [
                Question(prompts.texts[i], rows[i]["responses"], prompts.rows[i])
                for i in range(start, min(start + size, len(rows)))
            ]
            scores += judge(questions)
        failures = dict(judge.failures)
        del judge
        free()
        made = samples.add_column(
            "scores", scores, feature=datasets.List(datasets.Value("float64"))
        ).add_column("failures", [json.dumps(failures)] * len(samples))
        with files.atomic_file(file) as temporary:
            made.to_parquet(str(temporary))
        return made, failures

    def _judge(self) -> Judge:
        return load_judge(self._now(), self.folder)

    def _train(self, folder: Path) -> None:
        """Train the policy on the round's rows; go on where that was broken off."""
        output = folder / "model"
        values: dict[str, Any] = {
            "model_name_or_path": self.policy,
            "dataset_name": str(folder / "train.parquet"),
            "dataset_train_split": "train",
            "dataset_config": None,
            "datasets": [],
            "layout": None,
            "columns": None,
            "eval_dataset_name": None,
            "output_dir": str(output),
            "eval_strategy": "no",
            "do_eval": False,
            "eval_on_start": False,
        }
        if self.config.reference == "start" and self.policy != self.start:
            adapter = (Path(self.policy) / "adapter_config.json").is_file()
            start_adapter = (Path(self.start) / "adapter_config.json").is_file()
            if not adapter or start_adapter:  # an adapter's base is the start
                values["ref_model_name_or_path"] = self.start
        elif self.config.reference == "previous" and self.policy != self.start:
            values["ref_model_name_or_path"] = self.policy
        if (output / "trainer_state.json").exists():
            values["resume_from_checkpoint"] = True
        train(self.config.of_round(**values))

    def _watch(self, number: int) -> dict[str, Any]:
        """The held-out figures of a model; those of the start are compared with themselves."""
        folder = self.folder / f"round-{number}"
        folder.mkdir(exist_ok=True)
        held_out = self.prompts.held_out
        trained = self.policy
        if number:
            self.policy = str(folder / "model")
        try:
            samples = self._samples(folder, held_out, 1, 0, "held-out-samples")
            scored, _ = self._scored(folder, held_out, samples, "held-out")
            start = datasets.Dataset.from_parquet(str(self.folder / _START / "held-out.parquet"))
            logps = self._logps(folder, held_out, scored)
        finally:
            self.policy = trained
        found: Watched = watched(
            [row["responses"][0] for row in scored],
            [row["complete"][0] for row in scored],
            [row["scores"][0] for row in scored],
            [row["scores"][0] for row in start],
            logps["tokens"],
            logps["gains"],
        )
        return found.as_dict()

    def _logps(self, folder: Path, held_out: Prompts, scored: datasets.Dataset) -> dict[str, Any]:
        """Tokens of the held-out answers, and how much likelier they are than at the start."""
        file = folder / "held-out-logps.json"
        if file.exists():
            found: dict[str, Any] = files.read_json(file)
            return found
        rows = [
            {"prompt": prompt, "responses": [_completion(prompt, row["responses"][0])]}
            for prompt, row in zip(held_out.texts, scored, strict=True)
        ]
        values: dict[str, Any] = {
            "model_name_or_path": self.policy,
            "ref_model_name_or_path": None if self.policy == self.start else self.start,
            "dataset_name": None,
            "datasets": [],
        }
        with withheld():
            made = score(self.config.of_round(**values), rows)
        tokens = [each[0] if each else 0 for each in made.columns["response_tokens"]]
        gains = [0.0] * len(tokens)
        if self.policy != self.start:
            pairs = zip(
                made.columns["response_logps"], made.columns["response_ref_logps"], strict=True
            )
            gains = [mine[0] - theirs[0] if mine else 0.0 for mine, theirs in pairs]
        found = {"tokens": tokens, "gains": gains}
        files.write_text(file, json.dumps(found))
        return found

    def _now(self) -> RoundsConfig:
        """The configuration with the round's policy."""
        return self.config.choose("the round before", model_name_or_path=self.policy)


def _completion(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _as_scored(prompts: Prompts, scored: datasets.Dataset) -> list[Scored]:
    return [
        Scored(prompts.texts[i], row["responses"], row["scores"], row["complete"], prompts.own(i))
        for i, row in enumerate(scored)
    ]


def _distribution(scored: datasets.Dataset) -> dict[str, Any]:
    """Quantiles of the scores of a round's answers."""
    known = [value for row in scored for value in row["scores"] if value is not None]
    if not known:
        return {"scores": None}
    return {"scores": [float(q) for q in np.quantile(known, (0, 0.25, 0.5, 0.75, 1))]}


def _seed(*parts: Any) -> int:
    return int(xxhash.xxh32_intdigest(json.dumps(parts).encode()))


class _timed:
    """Adds the seconds of a block to a dictionary."""

    def __init__(self, times: dict[str, float], name: str) -> None:
        self.times, self.name = times, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.times[self.name] = time.perf_counter() - self.began


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _last_loss(file: Path) -> float | None:
    """The last loss that a run logged."""
    return next((line["loss"] for line in reversed(_read_lines(file)) if "loss" in line), None)


def _describe(line: dict[str, Any]) -> str:
    """A round in a line."""
    score = "no score" if line["score"] is None else f"held-out score {line['score']:.3f}"
    name = f"round {line['round']}" if line["round"] else "start"
    parts = [f"{name}: {score}"]
    if line["round"]:
        if line["win_rate"] is not None:
            parts.append(f"wins {line['win_rate']:.0%} against the start")
        parts.append(f"{line['kl']:.3f} nats a token from it")
        parts.append(
            f"{line['rows']} rows of {line['prompts']} prompts{describe(line['left_out'])}"
        )
    parts.append(f"{line['tokens']:.0f} tokens an answer")
    parts += [f"{count} answers: {reason}" for reason, count in line.get("failures", {}).items()]
    return ", ".join(parts) + "".join(f"; {said}" for said in line.get("said", ()))
