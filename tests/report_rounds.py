"""Directories as `fastdpo rounds` leaves them, made by hand."""

import json
from pathlib import Path
from typing import Any

import datasets
from report_runs import HOSTILE

from fastdpo.config.rounds import RoundsConfig


def write_rounds(path: Path, number: int = 3, wanted: int = 3) -> Path:
    """So many rounds that have ended, of those that were wanted; text that would act in all."""
    path.mkdir(parents=True)
    prompts: list[Any] = [[{"role": "user", "content": HOSTILE}], "a text " + HOSTILE]
    lines = []
    for index in range(number + 1):
        folder = path / f"round-{index}"
        folder.mkdir()
        columns = {
            "prompt": [json.dumps(prompt) for prompt in prompts],
            "row": [1, 4],
            "responses": [[f"answer {index} " + HOSTILE.replace("\ud800", "")], [""]],
            "complete": [[True], [False]],
            "scores": [[index / 4], [None]],
        }
        datasets.Dataset.from_dict(columns).to_parquet(str(folder / "held-out.parquet"))
        line = {"round": index, "score": index / 4, "win_rate": 0.5 + index / 10, "kl": index / 50}
        line |= {"tokens": 40.0 - index, "complete": 0.9, "repetition": 0.1, "unscored": 1}
        line |= {"model": f"round-{index}/model", "taken": index != 2, "rows": 40, "loss": 0.5}
        line |= {"scores": [0, 0.25, 0.5, 0.75, 1], "left_out": {HOSTILE: 3}, "failures": {}}
        line |= {"comparisons": {"ties": 2}, "said": ["held-out score fell"] if index == 2 else []}
        line |= {"seconds": {"sampling": 60.0, "training": 30.0}} if index else {}
        lines.append(line)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "rounds.jsonl").write_text(text + '{"round": 9, "sco', encoding="utf-8")
    (path / "round-1" / "model").mkdir()
    (path / "round-1" / "model" / "report.html").write_text("<html>")
    config = RoundsConfig(
        model_name_or_path="org/model-1b", dataset_name="asked.jsonl", judge="math", rounds=wanted
    )
    (path / "rounds_config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return path
