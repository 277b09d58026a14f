"""`rounds`: the stages of every round, each of which leaves a file.

    output_dir/rounds.jsonl            a line for the start, and one for each round that has ended
    output_dir/round-N/samples.parquet prompts with their answers
    output_dir/round-N/scored.parquet  the same with scores
    output_dir/round-N/train.parquet   what was trained on
    output_dir/round-N/held-out.parquet, and held-out-pairs.parquet of a judge that changes
    output_dir/round-N/model           the model of the round

A stage whose file is there is not done again; one that was broken off goes on from the batches that
it has, in `parts`. Every batch has a seed of its own, so it comes out the same in a later start.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .. import files
from ..config.rounds import RoundsConfig
from ..data.write import writer_of
from ..errors import ConfigError, one_line
from ..hub import reached
from ..report.rounds import CONFIG, LOG, write_rounds_report
from ..terminal import progress_bars
from ..training.changes import COMPARED, FIXED, FOLLOWED
from ..training.output import METRICS
from .devices import check_alone, train_on_devices
from .inputs import check_inputs
from .pairing import Scored, check_loss, describe, make_rows, ratio_keys, reads_logps
from .prompts import Prompts, load_prompts
from .stages import add_logps, as_samples, judged, logps, sample
from .verdict import check_judge
from .watch import Watched, watched

logger = logging.getLogger(__name__)

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
    check_alone(config)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder, _refuse(folder)), progress_bars(config.disable_tqdm), reached(config):
        begun = (folder / _START).exists()
        _check_directory(folder, config, begun)
        check_loss(config)
        prompts = load_prompts(config)
        check_judge(config, folder, [prompts, prompts.held_out])
        check_inputs(config, folder, prompts, begun)
        files.write_text(folder / CONFIG, config.to_yaml())
        return _Rounds(config, folder, prompts).run()


def _refuse(folder: Path) -> Callable[[], None]:
    def refuse() -> None:
        raise ConfigError(f"{folder}: another run is writing there")

    return refuse


def _check_directory(folder: Path, config: RoundsConfig, begun: bool) -> None:
    """Raise ConfigError where the directory holds something else than these rounds."""
    file = folder / CONFIG
    if not file.exists():
        if any(entry.name != ".fastdpo-lock" for entry in folder.iterdir()):
            raise config.error(
                "output_dir", f"{folder} holds other files; expected a new directory"
            )
        return
    if not begun:
        return
    before = RoundsConfig.load(file).to_dict()
    for name, value in config.to_dict().items():
        if value != before[name] and not _may_change(config, name):
            raise config.error(
                name, f"differs from the rounds in {folder}; expected another output_dir"
            )


def _may_change(config: RoundsConfig, name: str) -> bool:
    """Whether a key decides nothing of what comes after."""
    if name in (*FIXED, *FOLLOWED, *COMPARED):
        return False
    free = {"rounds", "judge_max_tokens", "engine_url", "check_data", "dataset_num_proc"}
    free.add("max_tokens_per_batch")
    group = config.key_fields()[name].metadata["group"]
    return name in free or group in ("logging", "saving", "hub", "memory", "parallel")


class _Rounds:
    """The state of the rounds."""

    def __init__(self, config: RoundsConfig, folder: Path, prompts: Prompts) -> None:
        self.config, self.folder, self.prompts = config, folder, prompts
        self.start = self.policy = str(config.model_name_or_path)
        self.lines: list[dict[str, Any]] = _read_lines(folder / LOG)
        for line in self.lines:
            if line.get("taken"):
                self.policy = str(folder / line["model"])

    def run(self) -> RoundsResult:
        if not self.lines:
            found = self._watch(0)
            self._end({"round": 0, "model": None, "taken": False, **found})
        for number in range(len(self.lines), self.config.rounds + 1):
            if self.lines[-1].get("last"):
                break
            self._report(live=True)
            self._round(number)
        self._report(live=False)
        return RoundsResult(self.policy, self.lines)

    def _report(self, live: bool) -> None:
        """Write the page; what goes wrong with it is said and stops nothing."""
        if not self.config.report:
            return
        try:
            write_rounds_report(self.folder, live)
        except Exception as error:
            logger.warning(f"report: not written ({one_line(error)}); the rounds go on")

    def _round(self, number: int) -> None:
        folder = self.folder / f"round-{number}"
        times: dict[str, float] = {}
        some = self.prompts.of_round(number, self.config.prompts_per_round)
        config = self._with(self.policy)
        with _timed(times, "sampling"):
            file, count = folder / "samples.parquet", self.config.num_generations
            samples = sample(config, file, some, count, number)
        with _timed(times, "scoring"):
            file = folder / "scored.parquet"
            scored, counts = judged(config, file, some, samples, self.folder)
        made = make_rows(self.config, _as_scored(some, scored), counts["failures"])
        line: dict[str, Any] = {
            "round": number,
            "model": f"round-{number}/model",
            "prompts": len(some),
            "rows": len(made.rows),
            "left_out": made.left_out,
            **counts,
            **_distribution(scored),
        }
        if not made.rows:
            self._end(self._untrained(line, times))
            return
        if reads_logps(self.config):
            add_logps(config, folder / "logps.json", made.rows)
        writer_of(folder / "train.parquet")(made.rows)
        with _timed(times, "training"):
            self._train(folder)
        line["loss"] = _last_loss(folder / "model" / METRICS)
        with _timed(times, "watching"):
            line |= self._watch(number)
        self._end(self._judged(line) | {"seconds": times})

    @property
    def _last_taken(self) -> dict[str, Any]:
        return next(one for one in reversed(self.lines) if one.get("taken") or one["round"] == 0)

    def _untrained(self, line: dict[str, Any], times: dict[str, float]) -> dict[str, Any]:
        """The line of a round whose answers there is nothing to learn from."""
        held_out = {name: self._last_taken[name] for name in Watched.__dataclass_fields__}
        said = ["nothing to train on"]
        return {**line, **held_out, "model": None, "taken": False, "said": said, "seconds": times}

    def _judged(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line of a round with what is to be said of it, and whether it counts."""
        before, said = self._last_taken, []
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

    def _train(self, folder: Path) -> None:
        """Train the policy on the round's rows; go on where that was broken off."""
        output = folder / "model"
        values: dict[str, Any] = {
            "model_name_or_path": self.policy,
            "dataset_name": str(folder / "train.parquet"),
            "dataset_train_split": "train",
            "dataset_config": None,
            "layout": None,
            "columns": None,
            "eval_dataset_name": None,
            "output_dir": str(output),
            "eval_strategy": "no",
            "do_eval": False,
            "eval_on_start": False,
            **ratio_keys(self.config),
        }
        moved = self.config.reference == "start" and self.policy != self.start
        if moved and self.config.needs_reference:
            values["ref_model_name_or_path"] = self.start
        if (output / "trainer_state.json").exists():
            values["resume_from_checkpoint"] = True
        train_on_devices(self.config.of_round(**values), folder / "training.yaml")

    def _watch(self, number: int) -> dict[str, Any]:
        """The held-out figures of the round's model, or of the start."""
        folder, held_out = self.folder / f"round-{number}", self.prompts.held_out
        config = self._with(str(folder / "model") if number else self.start)
        samples = sample(config, folder / "held-out-samples.parquet", held_out, 1, 0)
        scored, _ = judged(config, folder / "held-out.parquet", held_out, samples, self.folder)
        of_start = datasets.Dataset.from_parquet(str(self.folder / _START / "held-out.parquet"))
        found = logps(config, folder / "held-out-logps.json", held_out, scored, self.start)
        return watched(
            [row["responses"][0] for row in scored],
            [row["complete"][0] for row in scored],
            [row["scores"][0] for row in scored],
            [row["scores"][0] for row in of_start],
            [len(row["tokens"][0]) for row in scored],
            [each[0] for each in found["policy"]],
            [each[0] for each in found["start"]],
            [sum(row["engine_logps"][0]) if row["engine_logps"][0] else None for row in scored],
            self._judged_pairs(config, number),
        ).as_dict()

    def _judged_pairs(self, config: RoundsConfig, number: int) -> list[Any]:
        """Scores of the answers of held-out pairs; once where the judge stays what it is."""
        held_out = self.prompts.held_out
        places = [i for i in range(len(held_out)) if held_out.pair(i) is not None]
        if not places or config.judge == "row":
            return []
        folder = self.folder / (f"round-{number}" if config.judge == "self" else _START)
        some = held_out.of(places)
        pairs = as_samples(some, [some.pair(i) for i in range(len(some))])
        scored, _ = judged(config, folder / "held-out-pairs.parquet", some, pairs, self.folder)
        return list(scored["scores"])

    def _with(self, model: str) -> RoundsConfig:
        return self.config.choose("the round before", model_name_or_path=model)


def _as_scored(prompts: Prompts, scored: datasets.Dataset) -> list[Scored]:
    return [
        Scored(
            prompts.all[i].text,
            row["responses"],
            row["scores"],
            row["complete"],
            prompts.own(i),
            prompts.all[i].template,
        )
        for i, row in enumerate(scored)
    ]


def _distribution(scored: datasets.Dataset) -> dict[str, Any]:
    """Quantiles of the scores of a round's answers."""
    known = [value for row in scored for value in row["scores"] if value is not None]
    if not known:
        return {"scores": None}
    return {"scores": [float(q) for q in np.quantile(known, (0, 0.25, 0.5, 0.75, 1))]}


class _timed:
    """Adds the seconds of a block to a dictionary."""

    def __init__(self, times: dict[str, float], name: str) -> None:
        self.times, self.name = times, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.times[self.name] = round(time.perf_counter() - self.began, 2)


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
    if line["judge_accuracy"] is not None:
        parts.append(
            f"the judge prefers the chosen answer in {line['judge_accuracy']:.0%} of pairs"
        )
    parts += [f"{count} answers: {reason}" for reason, count in line.get("failures", {}).items()]
    return ", ".join(parts) + "".join(f"; {said}" for said in line.get("said", ()))
