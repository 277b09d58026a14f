"""`python -m fastdpo.demo --rounds`: a model learns from its own answers, scored by a function.

It is asked for capitals. Of eight answers to each question the best one trains it against the
worst, and the model of each round answers in the next.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.rounds import RoundsConfig
from .model import demo_model_path

FLAG = "--rounds"
_HERE = Path(__file__).parent
PROMPTS = _HERE / "capitals.jsonl"


def run(arguments: Sequence[str]) -> Path | None:
    """Run the rounds with `arguments` over the demo's configuration, and show what changed.

    Returns:
        The report; None where none was asked for.

    Raises:
        FastDPOError: wrong arguments, or no model to be had.
    """
    config = rounds_config(arguments)
    from ..rounds.loop import rounds

    start = time.perf_counter()
    result = rounds(config)
    print(summary(result.rounds, (time.perf_counter() - start) / 60, result.model))
    return Path(config.output_dir) / "report.html" if config.report else None


def rounds_config(arguments: Sequence[str]) -> RoundsConfig:
    """`rounds.yaml` of this directory with the demo's prompts, judge and model, overridden by
    `arguments`, of which a `--rounds` without a number says nothing.

    Raises:
        FastDPOError: wrong arguments, or no model to be had.
    """
    words = [
        word
        for word, after in zip(arguments, [*arguments[1:], ""], strict=True)
        if word != FLAG or after.isdigit()
    ]
    shipped = ["--dataset_name", str(PROMPTS)]
    shipped += ["--judge", f"{_HERE / 'score.py'}:score"]
    named = any(word.partition("=")[0] == "--model_name_or_path" for word in words)
    model = [] if named else ["--model_name_or_path", str(demo_model_path())]
    return RoundsConfig.parse([str(_HERE / "rounds.yaml"), *shipped, *model, *words])


def summary(lines: Sequence[dict[str, Any]], minutes: float, model: str) -> str:
    """What the demo prints at its end."""
    scores = " -> ".join("none" if one["score"] is None else f"{one['score']:.2f}" for one in lines)
    lengths = " -> ".join(f"{one['tokens']:.0f}" for one in lines)
    return "\n".join(
        [
            "",
            f"Held-out score: {scores}",
            f"Tokens an answer: {lengths}",
            f"Sampled, judged and trained in {minutes:.1f} minutes",
            f"Model of the last round: {model}",
        ]
    )
